"""The learning rate as a function of the iteration, through megatron-core's scheduler."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from hft_megatron.config.derived import warmup_iters
from hft_megatron.config.schema import OptimizerConfig


class LearningRate:
    """Warm-up, then constant, linear or cosine decay to --min-lr at --train-iters.

    Holds nothing that a checkpoint would need: the value follows from the iteration alone.
    """

    def __init__(
        self, optimizer: MegatronOptimizer, options: OptimizerConfig, train_iters: int, iteration: int
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=warmup_iters(options, train_iters),
            lr_decay_steps=max(train_iters, 1),
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self._scheduler.step(increment=iteration)
        self.last = self._current()
        """The rate of the newest update, or of the coming one before the first."""

    def _current(self) -> float:
        value = get_canonical_lr_for_logging(self._optimizer.param_groups)
        assert value is not None
        return float(value)

    def advance(self) -> None:
        """Moves on by one iteration; call after each update."""
        self.last = self._current()
        self._scheduler.step(increment=1)
