"""Questions of rank 0 to a model that all ranks hold: the others wait for them and help to answer."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from hft_megatron.errors import RankFailed, UserError
from hft_megatron.evaluation.answers import Progress, Questions, answers_of
from hft_megatron.evaluation.examples import Answer
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.generation import Decoder

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=30)
"""Time-out for the next questions, while rank 0 reads tasks or computes. The end of rank 0 is still noticed at once."""


class Service:
    """A model's ranks at the service of rank 0."""

    def __init__(self, model: ModelInPlace, tokenizer: Decoder, *, batch_size: int, say: Callable[[str], None]) -> None:
        """``say`` prints a line on rank 0. Every rank makes a service and calls ``run``."""
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._say = say
        self._is_answering = False
        self._group: dist.ProcessGroup | None = None

    def run(self, work: Callable[[], T], *, name: str) -> T | None:
        """The result of ``work`` on rank 0, which alone runs it and may ``ask``; None on the others. Collective.

        A UserError of ``work`` is raised on every rank. After any other exception the others raise RankFailed with the
        ``name`` of the work.
        """
        # Not the model's group: NCCL has a watchdog against waits, and needs a device.
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        if dist.get_rank() == 0:
            result = self._work(work, name)
        else:
            result = None
            self._serve()
        # A group that is destroyed on one rank breaks a neighbour which is still receiving.
        dist.barrier()
        dist.destroy_process_group(self._group)
        return result

    def ask(self, questions: Questions, *, name: str) -> list[Answer]:
        """The answers in the order of the questions; on rank 0, within ``run``."""
        self._tell(questions, name)
        return self._answer(questions, name)

    def _work(self, work: Callable[[], T], name: str) -> T:
        end: Exception | None = RankFailed(f"rank 0 cannot continue with {name}; its traceback says why.")
        try:
            result = work()
            end = None
        except UserError as error:
            end = error
            raise
        finally:
            # Where answering has failed the others don't listen: they are in a collective of the model.
            if not self._is_answering:
                self._tell(end, name)
        return result

    def _serve(self) -> None:
        while True:
            message: list[tuple[Questions | Exception | None, str] | None] = [None]
            dist.broadcast_object_list(message, src=0, group=self._group)
            assert message[0] is not None
            order, name = message[0]
            if not isinstance(order, Questions):
                break
            self._answer(order, name)
        if order is not None:
            raise order

    def _tell(self, order: Questions | Exception | None, name: str) -> None:
        dist.broadcast_object_list([(order, name)], src=0, group=self._group)

    def _answer(self, questions: Questions, name: str) -> list[Answer]:
        self._is_answering = True
        answers = answers_of(
            questions.lengths,
            lambda batch: questions.put(self._model, self._tokenizer, batch),
            self._model.placement,
            batch_size=self._batch_size,
            progress=Progress(name=name, say=self._say),
        )
        self._is_answering = False
        return answers
