"""The trainer as a library: a run's options as arguments, and the user's hooks around its steps."""

import sys
from collections.abc import Sequence
from typing import Any

from hft_megatron.config.loading import options_of, with_checkpoint_args
from hft_megatron.config.names import MethodName, known
from hft_megatron.config.run import RunConfig
from hft_megatron.config.validation import shape_of, validate
from hft_megatron.errors import PeersLost, UserError
from hft_megatron.library.plans import in_arguments
from hft_megatron.methods.registry import METHODS
from hft_megatron.parallel import launch
from hft_megatron.parallel.groups import stop_groups
from hft_megatron.trainer.assembly import run_training
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.saving import Signals


class Trainer:
    """One run of a method: ``Trainer("sft", load_hf=..., train_data_path=..., hooks=[...]).train()``.

    Every option of the command line is an argument of the same name with underscores and the same meaning. For more
    than one rank start the program with torchrun. ``hooks`` are objects of classes that extend ``hft_megatron.Hook``:
    they run on every rank, before checkpoints are written.
    """

    def __init__(self, method: MethodName = "sft", *, hooks: Sequence[Hook] = (), **options: Any) -> None:
        """Raises ValueError, before a model is built, for unknown arguments and for those that don't fit together."""
        if method not in known(MethodName):
            raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, known(MethodName)))}.")
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise ValueError(f"hooks has a {type(hook).__name__}, which doesn't extend hft_megatron.Hook.")
        try:
            self.config = with_checkpoint_args(options_of(RunConfig, options, _say))
            """All options of the run with their values."""
            self._shape, self._ranks = shape_of(self.config.model), launch.world_size()
            validate(self.config, self._shape, self._ranks, method)
        except UserError as error:
            raise ValueError(in_arguments(str(error))) from None
        self._method, self._hooks = METHODS[method], tuple(hooks)

    def train(self) -> None:
        """Trains to the end, from the checkpoint in ``load`` if there is one, and saves and exports by the options.

        Raises ValueError for a mistake in the data or folders, and ``hft_megatron.errors.Stopped`` where a signal or a
        time limit ended the run. Where a host is lost, the process ends. In all other cases signal handlers and the
        environment are restored.
        """
        signals = Signals()
        try:
            with launch.placed_process():
                run_training(
                    self._method,
                    self.config,
                    self._shape,
                    self._ranks,
                    on_loss=_say_loss,
                    hooks=self._hooks,
                    signals=signals,
                )
        except UserError as error:
            raise ValueError(in_arguments(str(error))) from None
        finally:
            signals.close()
            if self._ranks == 1:
                stop_groups()  # of a failed run; on several ranks others may still wait for this one's groups


def _say(line: str) -> None:
    if launch.rank() == 0:
        print(line, flush=True)


def _say_loss(loss: PeersLost) -> None:
    if launch.local_rank() == 0 if loss.speaks is None else loss.speaks:
        print(f"error: {loss}", file=sys.stderr, flush=True)
