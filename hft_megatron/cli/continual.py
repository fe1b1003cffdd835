"""``hft-megatron continual``: learns one task after the other, and measures the effect of each on earlier tasks.

Run: ``torchrun --nproc-per-node 8 -m hft_megatron continual --continual-tasks TRACE --load-hf MODEL --save RUN``.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from hft_megatron.cli.boundary import StatusFolder, end_of_peers, note, show
from hft_megatron.cli.training_command import TrainingOptions
from hft_megatron.config.continual import ContinualConfig, sequence_fits_the_run
from hft_megatron.config.data import DataConfig
from hft_megatron.config.declared import check_bounds
from hft_megatron.config.ewc import EwcConfig
from hft_megatron.config.objectives import ObjectivesConfig
from hft_megatron.config.stages import Stage, with_rounds_in_turn
from hft_megatron.config.validation import shape_of, validate
from hft_megatron.errors import UserError
from hft_megatron.parallel import launch

FIRST = (
    *("continual-tasks", "continual-order", "continual-evaluate", "replay-ratio"),
    *("chat-template", "packing", "train-epochs"),
)
"""The options of its own that --help shows."""


@dataclass(frozen=True, kw_only=True)
class ContinualOptions(TrainingOptions):
    """Options of ``hft-megatron continual``: those of fine-tuning, and those of the sequence."""

    data: DataConfig = field(default_factory=DataConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    ewc: EwcConfig = field(default_factory=EwcConfig)


def run(options: ContinualOptions, status: StatusFolder) -> None:
    """Check, and learn the sequence unless --check is given. Raises UserError for every mistake."""
    check_bounds(options)
    base = options.as_run
    if options.stages is not None:
        raise UserError("--stages cannot be used with a sequence of tasks, each of which is a stage; leave it out.")
    sequence_fits_the_run(options.continual, base)
    if not options.check:
        assert base.checkpoint.save is not None
        status.use(Path(base.checkpoint.save))
    world_size = launch.world_size()
    # Imported here and below, because mistakes in the options must not wait for torch and transformers.
    from hft_megatron.data.files.sources import TRAIN_SPLIT, find_input
    from hft_megatron.evaluation.task_files import read_tasks
    from hft_megatron.methods.continual.sequence import parts_of
    from hft_megatron.methods.continual.tasks import read_continual_tasks

    tasks = read_continual_tasks(options.continual, base)
    general = options.continual.continual_general
    find_input("--replay-data-path", options.continual.replay_data_path, TRAIN_SPLIT)
    parts = parts_of(tasks, base, options.continual)
    shape = shape_of(base.model)
    stages = [part.stage for part in parts]
    if options.continual.continual_schedule == "continue":
        stages = [_of_unknown_length(stage) for stage in stages]
    for stage in with_rounds_in_turn(stages):
        validate(stage.config, shape, world_size, stage.method)
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.methods.continual.run import TaskSequence, check_sequence, run_sequence, trained_share

    sequence = TaskSequence(
        options=options.continual,
        base=base,
        tasks=tasks,
        general=() if general is None else read_tasks(Path(general)),
        parts=parts,
    )
    if options.check:
        note("\n".join(check_sequence(sequence, world_size)))
        return
    launch.place_this_process()
    contents = run_sequence(sequence, world_size, announce=note, on_loss=end_of_peers(status))
    if launch.rank() == 0:
        from hft_megatron.report.continual import draw_matrix, matrix_text

        show(matrix_text(contents, trained_share=trained_share(sequence)))
        draw_matrix(contents, sequence.folder / "matrix.png")


def _of_unknown_length(stage: Stage) -> Stage:
    """The stage with an epoch in place of its iterations: a warm-up over all tasks is checked once the data is read."""
    training = stage.config.training
    if training.train_epochs is None:
        training = replace(training, train_iters=None, train_epochs=1)
    return replace(stage, config=replace(stage.config, training=training))
