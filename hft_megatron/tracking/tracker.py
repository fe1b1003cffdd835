"""The one interface through which a run reports, and the names of its metrics.

The loop logs into one tracker and does not know where the numbers go.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

Metrics = Mapping[str, float | int | str]
"""One record: measured values by name. Text is for digests and ranks."""

FILE_NAME = "metrics.jsonl"
"""File in the save folder of a run, with a line per record."""
ITERATION = "iteration"
"""Key of the iteration in each of these lines, beside the metrics."""

CONSUMED_SAMPLES = "consumed samples"
ITERATION_TIME = "elapsed time per iteration (ms)"
TIME_LEFT = "time left (s)"
THROUGHPUT = "throughput per GPU (TFLOP/s/GPU)"
ACTUAL_THROUGHPUT = "actual throughput per GPU (TFLOP/s/GPU)"
TOKENS_PER_SECOND = "tokens per GPU (tokens/s/GPU)"
DEVICE_PEAK = "max allocated memory (GB)"
"""Peak memory of a CUDA device, as torch's allocator counts it."""
PROCESS_PEAK = "max resident memory of the process (GB)"
"""Peak memory without such a device."""
LEARNING_RATE = "learning rate"
DECOUPLED_LEARNING_RATE = "decoupled learning rate"
GLOBAL_BATCH_SIZE = "global batch size"
LOSS = "lm loss"
OBJECTIVE_LOSS = "objective loss"
"""Value of the objective, where it is not the plain loss, which is logged beside it; ift's is a mean over examples."""
KL_TO_BASE = "kl to base"
"""KL(first weights || model), a mean over trained tokens, in nats, without its weight."""
PREFERENCE_LOSS = "preference loss"
CHOSEN_REWARD = "rewards/chosen"
REJECTED_REWARD = "rewards/rejected"
REWARD_MARGIN = "rewards/margins"
REWARD_ACCURACY = "rewards/accuracies"
CHOSEN_LOG_PROBS = "logps/chosen"
REJECTED_LOG_PROBS = "logps/rejected"
KL = "kl"
EWC_PENALTY = "ewc penalty"
"""Penalty of elastic weight consolidation, in the loss's unit; the loss itself is logged without it."""
OF_VALIDATION = " validation"
"""Suffix of the names of validation metrics; for one source of several a slash and its name follow."""
LOSS_SCALE = "loss scale"
GRAD_NORM = "grad norm"
NUM_ZEROS = "num zeros"
PARAMS_NORM = "params norm"
SKIPPED_ITERATIONS = "number of skipped iterations"
"""Number of skipped iterations since the last record, as in Megatron."""
NAN_ITERATIONS = "number of nan iterations"
"""Number of them whose loss is infinite or undefined."""
LOSS_SPIKE = "loss spike (robust z-score)"
"""Score of a spike; absent for other iterations."""
ROUND = "round"
TRAINABLE_PARAMETERS = "trainable params"
FROZEN_PARAMETERS = "frozen params"
PLAN_DIGEST = "plan digest"
ROUND_SWITCH_TIME = "round switch time (ms)"
COMPUTE_TIME_MEDIAN = "compute time, median rank (ms)"
"""Time of forward and backward passes, without waits for other ranks."""
COMPUTE_TIME_WORST = "compute time, slowest rank (ms)"
SLOWEST_RANK = "slowest rank"
"""Slowest rank; absent where it is close to the median."""
FORWARD_TIME = "forward time (ms)"
BACKWARD_TIME = "backward time (ms)"
REDUCE_SCATTER_WAIT = "reduce-scatter wait (ms)"
ALL_GATHER_WAIT = "all-gather wait (ms)"
OPTIMIZER_TIME = "optimizer time (ms)"
FASTEST, SLOWEST = ", fastest rank", ", slowest rank"
"""Suffixes of times that are gathered over ranks: ``optimizer time, slowest rank (ms)``."""
REDUCE_SCATTER_BYTES = "reduce-scatter bytes"
ALL_GATHER_BYTES = "all-gather bytes"
GRADIENT_BYTES = "gradient buffer bytes"
MASTER_BYTES = "master weight bytes"
MOMENT_BYTES = "moment bytes"
OPTIMIZER_BYTES = "optimizer bytes"
REFERENCE_BYTES = "reference bytes"


OF_TASKS = "tasks/"
"""Prefix of the names of values in a task of --eval-tasks: ``tasks/gsm8k/exact_match``."""


def of_task(task: str, measure: str) -> str:
    """The name of a measure's value in a task."""
    return f"{OF_TASKS}{task}/{measure}"


def over_ranks(name: str, which: str) -> str:
    """The name of a time in milliseconds on the ``FASTEST`` or the ``SLOWEST`` rank."""
    return name.replace(" (ms)", f"{which} (ms)")


def of_validation(name: str, source: str | None = None) -> str:
    """The name of a metric on all validation data, or on one ``source`` of several."""
    return f"{name}{OF_VALIDATION}" if source is None else f"{name}{OF_VALIDATION}/{source}"


class Tracker(Protocol):
    """A destination of metrics."""

    is_dashboard: ClassVar[bool]
    """True if it gets training records every --tensorboard-log-interval instead of --log-interval."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics after iteration ``step`` (the first iteration is 1)."""
        ...

    def close(self) -> None:
        """Write pending records and close files; nothing is logged afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompositeTracker:
    """Passes every record to each of its trackers, in order; with none it does nothing."""

    is_dashboard: ClassVar[bool] = False
    trackers: Sequence[Tracker] = ()

    def part(self, *, dashboards: bool) -> "CompositeTracker":
        """Its dashboards alone, or its other trackers."""
        return CompositeTracker(trackers=tuple(one for one in self.trackers if one.is_dashboard == dashboards))

    def log(self, step: int, metrics: Metrics) -> None:
        """Log to every tracker."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Close every tracker, in reverse order."""
        for tracker in reversed(self.trackers):
            tracker.close()


DASHBOARD_NAMES: Mapping[str, tuple[str, float]] = {
    ITERATION_TIME: ("iteration-time", 1e-3),
    THROUGHPUT: ("throughput", 1),
    ACTUAL_THROUGHPUT: ("actual-throughput", 1),
    TOKENS_PER_SECOND: ("tokens-per-second-per-gpu", 1),
    DEVICE_PEAK: ("mem-max-allocated-bytes", 1e9),
    LEARNING_RATE: ("learning-rate", 1),
    DECOUPLED_LEARNING_RATE: ("decoupled-learning-rate", 1),
    GRAD_NORM: ("grad-norm", 1),
    NUM_ZEROS: ("num-zeros", 1),
    PARAMS_NORM: ("params-norm", 1),
    GLOBAL_BATCH_SIZE: ("batch-size", 1),
}
"""Names of the log line that Megatron spells differently in TensorBoard and wandb (or whose slashes wandb would read as
folders), and the factor to the unit there: milliseconds become seconds, gigabytes bytes."""


def dashboard_metrics(metrics: Metrics) -> dict[str, float | int | str]:
    """The record under the names, and in the units, that Megatron's dashboards use."""
    shown: dict[str, float | int | str] = {}
    for name, value in metrics.items():
        spelled, factor = DASHBOARD_NAMES.get(name, (name, 1))
        shown[spelled] = value if factor == 1 or isinstance(value, str) else value * factor
    return shown
