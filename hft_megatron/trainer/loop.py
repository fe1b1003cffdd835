"""The training loop: steps, a switch where a new round begins, and hooks around both."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.rules import RULES
from hft_megatron.optimizer.rounds import LearningRate, span_of_round, switch_round
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.trainer.garbage import collect_after_step, collected_by_hand
from hft_megatron.trainer.nonfinite import check_weights
from hft_megatron.trainer.rounds import Rounds
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.step import StepResult, train_step


class Hook:
    """A hook, which runs on every rank; its methods do nothing unless overridden."""

    def at_round_start(self, run: Run) -> None:
        """Called before the first step, and after every switch to another round."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """Called after every optimizer step."""

    def after_iteration(self, run: Run) -> None:
        """Called after every iteration, with a step or (--iterations-to-skip) without one."""

    def at_round_end(self, run: Run) -> None:
        """Called before every switch to another round, and after the last step."""

    def at_end(self, run: Run) -> None:
        """Called after the last step."""


def train(run: Run, hooks: Sequence[Hook]) -> None:
    """Steps until --train-iters; every rank calls it. Raises RunFailed where the last step left a weight that is not
    finite, and the errors of hooks."""
    with collected_by_hand(run.config.training):
        for hook in hooks:
            hook.at_round_start(run)
        while not run.is_complete:
            enter_round(run, hooks)
            result = None
            if run.is_to_skip:
                skip_iteration(run)
            else:
                result = _take_step(run)
            for hook in hooks:
                if result is not None:
                    hook.after_step(run, result)
                hook.after_iteration(run)
            collect_after_step(run.config.training, run.state.iteration)
        for hook in hooks:
            hook.at_round_end(run)
        for hook in hooks:
            hook.at_end(run)
    check_weights(run)


def next_step(run: Run, hooks: Sequence[Hook] = ()) -> StepResult:
    """One optimizer step, after a switch to a new round where one begins with it."""
    enter_round(run, hooks)
    return _take_step(run)


def _take_step(run: Run) -> StepResult:
    result = train_step(run)
    if result.updated:
        run.learning_rate.advance(run.state.iteration)
    run.advance(updated=result.updated)
    return result


def skip_iteration(run: Run) -> None:
    """Skips the coming iteration and its samples, without an update."""
    run.announce(
        f"> iteration {run.state.iteration + 1} is skipped (--iterations-to-skip); its samples are "
        f"{run.batches.names(run.coming_samples)}"
    )
    run.advance(updated=False)


def enter_round(run: Run, hooks: Sequence[Hook]) -> None:
    """Begins a new round where the coming iteration is its first."""
    round = run.rounds.schedule.round_of(run.state.iteration)
    if round != run.state.round:
        for hook in hooks:
            hook.at_round_end(run)
        begin_round(run, round)
        for hook in hooks:
            hook.at_round_start(run)


def begin_round(run: Run, round: int) -> None:
    """Switches the run to another round's plan, which must be equal on all ranks; every rank calls it."""
    start = time.perf_counter()
    plan = run.rounds.agreed_plan(round, run.placement)
    rewrap(run, plan, run.config.hft)
    run.state = replace(run.state, round=round)
    run.learning_rate = learning_rate(run.wrapped, run.rounds, run.config, run.state)
    torch.cuda.synchronize()
    run.switch_ms = (time.perf_counter() - start) * 1e3
    run.announce(plan.describe())


def rewrap(run: Run, plan: Plan, hft: HFTConfig) -> None:
    """Rewraps the run's model for another plan; ``hft`` decides which optimizer state is kept. Collective."""
    config = run.config
    run.wrapped = switch_round(
        run.wrapped,
        plan,
        config.parallel,
        config.optimizer,
        hft,
        bf16=config.training.bf16 is True,
        fp32_gradients=config.training.accumulate_allreduce_grads_in_fp32,
        group=run.placement.groups.dp,
    )


def learning_rate(wrapped: WrappedModel, rounds: Rounds, config: RunConfig, state: TrainState) -> LearningRate:
    """The learning rate of the round that ``state`` is in, from there on."""
    plan = wrapped.plan
    # By the plan and not by the option: a plan file may hold the rounds of HiFT too.
    cycle = RULES[plan.policy.rule].cycle(plan.units, plan.policy.exact_ratio)
    span = span_of_round(config, rounds.schedule, state.round, cycle=cycle, skipped_iterations=state.skipped_iterations)
    return LearningRate(wrapped.optimizer, config.optimizer, span, state.iteration)
