"""Preparation of a run before its model is built: process groups, agreement on the inputs, and the first plan."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf

from hft_megatron.config.derived import global_batch_size, train_iters
from hft_megatron.config.parallel import pipeline_words
from hft_megatron.config.run import RunConfig
from hft_megatron.data.batches import BatchShare, PrefetchedSteps
from hft_megatron.engine import cpu_backend
from hft_megatron.hft.plan import Plan
from hft_megatron.model.llama import LlamaModel, check_implementation
from hft_megatron.optimizer.wrapping import adam_in_use
from hft_megatron.parallel.consensus import gathered, together
from hft_megatron.parallel.groups import Placement, make_deterministic, start_groups
from hft_megatron.parallel.peers import Peers
from hft_megatron.tracking.tracker import CompositeTracker
from hft_megatron.tracking.trackers import build_tracker
from hft_megatron.trainer.agreement import check_inputs_agree
from hft_megatron.trainer.inputs import Inputs, scores_of_run
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.profiling import trace_folder
from hft_megatron.trainer.resume import check_plan, idle_skips, with_schedule, with_sound_checkpoint
from hft_megatron.trainer.rounds import Rounds
from hft_megatron.trainer.run import Reference
from hft_megatron.trainer.task_evaluation import evaluations
from hft_megatron.trainer.validation import measure_sources


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Parts that a run is built from, on this rank."""

    inputs: Inputs
    placement: Placement
    announce: Callable[[str], None]
    """Prints one line on rank 0."""
    scores: dict[str, float] | None
    """Scores of --hft-selection spectrum, by unit."""
    rounds: Rounds
    plan: Plan
    """Plan of the round that the run starts in."""
    trains: bool
    """False for a conversion, or a validation of the weights as they are."""
    tracker: CompositeTracker | None
    """None where nothing is trained or validated on."""

    @property
    def config(self) -> RunConfig:
        """All options, resolved."""
        return self.inputs.config

    @property
    def share(self) -> BatchShare:
        """This rank's part of a batch."""
        return BatchShare(
            micro_batch_size=self.config.training.micro_batch_size,
            global_batch_size=global_batch_size(self.config, self.placement.world_size),
            ramp=self.config.training.rampup_batch_size,
            data_parallel_rank=self.placement.data_rank,
            data_parallel_size=self.placement.data_size,
            length_multiple=self.placement.tensor_size,
        )

    def evaluations(self) -> list[Hook]:
        """The hook that evaluates --eval-tasks, where there are some."""
        return evaluations(self.inputs.tasks, self.inputs.tokenizer, self.config)

    def training_steps(self) -> PrefetchedSteps:
        """This rank's part of every step, made one step ahead."""
        assert self.inputs.data is not None
        stop = self.share.sizes.samples_before(train_iters(self.config.training))
        return PrefetchedSteps(self.inputs.data.training(self.share), stop=stop)

    def validate(self, chunks: Sequence[LlamaModel], reference: Reference | None, iteration: int) -> None:
        """Validates weights without training, records the result and closes the tracker; collective.

        Does nothing without validation data. ``chunks`` must hold their weights whole.
        """
        if self.tracker is None:
            return
        assert self.inputs.data is not None
        data, tracker = self.inputs.data, self.tracker

        def measure_and_record() -> None:
            measured = measure_sources(
                data.validation(self.share),
                chunks,
                self.inputs.method.objective(self.config),
                reference,
                self.placement,
                iteration=iteration,
            )
            if metrics := measured.metrics():
                tracker.log(iteration, metrics)

        try:
            together(measure_and_record)
        finally:
            tracker.close()


def prepare(inputs: Inputs, world_size: int, company: Peers) -> Prepared:
    """Prepares a run; collective over all ranks. Raises the same UserError on every rank where their inputs differ, or
    where the checkpoint, its plan or a tracker cannot be used, and PeersLost where they don't meet."""
    if inputs.config.training.deterministic_mode:
        make_deterministic()
    company.join(inputs.config.parallel)
    inputs = _with_dtype(inputs)
    training = inputs.config.training
    check_implementation(training.transformer_impl, bf16=training.bf16 is True)
    trace_folder(inputs.config)
    placement = start_groups(inputs.config.parallel, inputs.shape.num_layers, training.seed)
    announce = _announcer(placement)
    _announce_start(inputs, placement, company, announce)
    check_inputs_agree(inputs, placement)
    inputs = with_sound_checkpoint(inputs, placement, announce)
    inputs = with_schedule(inputs, world_size, announce)
    for line in idle_skips(inputs):
        announce(f"> {line}")
    scores = scores_of_run(inputs, placement)
    rounds = inputs.rounds(world_size, scores)
    plan = rounds.plan(inputs.position.round)
    check_plan(inputs, plan)
    rounds.agreed_plan(inputs.position.round, placement)
    trains = train_iters(training) > 0
    if trains:
        announce(plan.describe())
    return Prepared(
        inputs=inputs,
        placement=placement,
        announce=announce,
        scores=scores,
        rounds=rounds,
        plan=plan,
        trains=trains,
        tracker=None if inputs.data is None else _tracker(inputs, placement, trains=trains),
    )


def _with_dtype(inputs: Inputs) -> Inputs:
    """Decides bf16 where the options don't: only if every rank's processor is fast at it."""
    training = inputs.config.training
    # Collective, so ranks with the option take part, too.
    fast = all(gathered(cpu_backend.has_fast_bf16()))
    bf16 = fast if training.bf16 is None else training.bf16
    return replace(inputs, config=replace(inputs.config, training=replace(training, bf16=bf16)))


def _tracker(inputs: Inputs, placement: Placement, *, trains: bool) -> CompositeTracker:
    """The trackers of this rank; a failure on one rank (a dashboard, a file) is raised on all."""
    mine: list[CompositeTracker] = []
    kept_until: float = inputs.position.iteration
    if not trains:
        kept_until = inf
    elif kept_until == 0 and inputs.config.logging.eval_on_start:
        kept_until = -1

    def build() -> None:
        tracker = build_tracker(
            inputs.config.logging,
            save=inputs.config.checkpoint.save,
            train_iters=train_iters(inputs.config.training),
            start_iteration=inputs.position.iteration,
            kept_until=kept_until,
            resolved_config=asdict(inputs.config),
            is_writer=placement.is_last_rank,
        )
        mine.append(tracker)

    together(build)
    return mine[0]


def _announcer(placement: Placement) -> Callable[[str], None]:
    """Prints a line on rank 0, nothing on others."""

    def announce(line: str) -> None:
        if placement.rank == 0:
            print(line, flush=True)

    return announce


def _precision(config: RunConfig) -> str:
    training = config.training
    if not training.bf16:
        return "fp32"
    return f"bf16 with fp32 masters{'' if training.accumulate_allreduce_grads_in_fp32 else ' and bf16 gradients'}"


def _announce_start(inputs: Inputs, placement: Placement, company: Peers, announce: Callable[[str], None]) -> None:
    for line in inputs.describe():
        announce(f"> {line}")
    config = inputs.config
    kernels = config.training.transformer_impl
    engine = "torch" if kernels == "local" else "transformer-engine"
    adam = adam_in_use(kernels, config.optimizer, steps_per_unit=config.hft.hft_moments == "carry")
    announce(
        f"> TP {placement.tensor_size} x {pipeline_words(config.parallel, inputs.shape.num_layers)} x "
        f"DP {placement.data_size} on "
        f"{placement.device.type}, {_precision(config)}, "
        f"attention and norms by {engine}, Adam by {adam}"
    )
    if len(company.hosts) > 1:
        announce(f"> {len(company.hosts)} hosts: {', '.join(str(host) for host in company.hosts)}")
