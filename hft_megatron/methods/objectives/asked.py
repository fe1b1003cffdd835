"""Forward passes before a step's own, without gradients: of the trained model, and of the weights of the start."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hft_megatron.config.derived import train_iters
from hft_megatron.conversion.save import Announce
from hft_megatron.costs.flops import NO_EXTRA_WORK, ExtraWork
from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.methods.dpo.reference import ModelReference, SharedReference
from hft_megatron.methods.dpo.reference_of_run import reference_in_memory
from hft_megatron.methods.objectives.last_hidden import attach_hidden_states, attach_without_adapters
from hft_megatron.methods.objectives.registry import chosen, in_words, kl_weight
from hft_megatron.methods.objectives.weighted import BASE_HEAD
from hft_megatron.model.llama import LlamaModel
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.inputs import Inputs
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.rounds import Rounds
from hft_megatron.trainer.run import Reference, Run

Question = Callable[[Sequence[LlamaModel], StepBatch, Placement], None]
"""Adds the model's output for a batch to its micro-batches; collective."""


class TrainedModel(Hook):
    """Evaluates the trained model itself."""

    held_bytes = 0
    extra_work = ExtraWork(adapted_passes=1)

    def __init__(self, chunks: Sequence[LlamaModel], question: Question, placement: Placement) -> None:
        self._chunks, self._question, self._placement = chunks, question, placement
        self._wrapped: WrappedModel | None = None

    def at_round_start(self, run: Run) -> None:
        self._wrapped = run.wrapped

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        assert self._wrapped is not None, "a step belongs to a round"
        with self._wrapped.gathered_parameters():
            self._question(self._chunks, batch, self._placement)


class FirstWeights(Hook):
    """Evaluates the weights that the run started from, for the divergence from them."""

    def __init__(self, reference: SharedReference | ModelReference, placement: Placement) -> None:
        self._reference = reference
        self._is_last = placement.pipeline_rank == placement.pipeline_size - 1

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return self._reference.held_bytes

    @property
    def extra_work(self) -> ExtraWork:
        """See ``run.Reference``. The head's product is recomputed in the backward pass (``_Divergence``)."""
        return self._reference.extra_work + ExtraWork(head_products=1)

    def at_round_start(self, run: Run) -> None:
        if isinstance(self._reference, Hook):
            self._reference.at_round_start(run)

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        self._reference.attach(batch)
        if self._is_last:
            weight: Tensor = self._reference.head_weight()
            for micro_batch in batch.micro_batches:
                micro_batch[BASE_HEAD] = weight


class InTurn(Hook):
    """Evaluates several in turn."""

    def __init__(self, asked: Sequence[TrainedModel | FirstWeights]) -> None:
        self._asked = asked

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return sum(one.held_bytes for one in self._asked)

    @property
    def extra_work(self) -> ExtraWork:
        """See ``run.Reference``."""
        return sum((one.extra_work for one in self._asked), start=NO_EXTRA_WORK)

    def at_round_start(self, run: Run) -> None:
        for one in self._asked:
            one.at_round_start(run)

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        for one in self._asked:
            one.attach(batch)


def asked_of_run(
    inputs: Inputs,
    chunks: Sequence[LlamaModel],
    rounds: Rounds,
    share: BatchShare,
    placement: Placement,
    announce: Announce,
) -> Reference | None:
    """The passes that a fine-tuning objective needs before each step, None for none; collective.

    ``chunks`` are as for ``dpo.reference_of_run.reference_of_run``.
    """
    config, asked = inputs.config, list[TrainedModel | FirstWeights]()
    if train_iters(config.training) == 0 or inputs.is_over:  # the run that it started from may be deleted by then
        return None
    if in_words(config) is not None:
        announce(f"> objective: {in_words(config)}")
    if kl_weight(config) > 0:
        kind = config.objectives.kl_reference
        assert kind != "precompute", "the rules of the options refuse it"
        adapted = _starts_from_adapters(inputs)
        ask = attach_hidden_states if adapted else attach_without_adapters
        reference = reference_in_memory(kind, None, inputs, chunks, rounds, placement, announce, ask, adapted=adapted)
        asked.append(FirstWeights(reference, placement))
    question = chosen(config).question
    if question is not None:
        asked.append(TrainedModel(chunks, question(), placement))
    return InTurn(asked) if asked else None


def _starts_from_adapters(inputs: Inputs) -> bool:
    """True if the run's first weights have adapters that were trained before; new ones do nothing."""
    began = inputs.config.lora.lora_adapter is not None or inputs.identity.finetuned_from is not None
    return inputs.shape.adapters is not None and began
