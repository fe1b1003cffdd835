"""The training loop. Everything beyond stepping is a hook."""

from collections.abc import Sequence

from hft_megatron.training.hooks import Hook
from hft_megatron.training.run import Run
from hft_megatron.training.step import train_step


def train(run: Run, hooks: Sequence[Hook]) -> None:
    """Steps until --train-iters; every rank calls it."""
    while run.state.iteration < run.config.training.train_iters:
        result = train_step(run)
        run.learning_rate.advance()
        run.advance()
        for hook in hooks:
            hook.after_step(run, result)
    for hook in hooks:
        hook.at_end(run)
