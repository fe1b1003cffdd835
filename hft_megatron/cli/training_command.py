"""Common parts of the commands that train: their options, the checks, and the start of the run."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from pathlib import Path

from hft_megatron.cli.boundary import StatusFolder, end_of_peers, note
from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.derived import data_parallel_size, global_batch_size
from hft_megatron.config.flags import flags_of
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.loading import read_others, with_checkpoint_args
from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import MethodName
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.stages import read_stages, with_rounds_in_turn
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.config.validation import shape_of, validate
from hft_megatron.methods.registry import METHODS, Declaration
from hft_megatron.parallel import launch


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of every run, and two that are not part of it; a command adds those of its data."""

    config: str | None = None
    """YAML file of options, by name or under a group's name; the command line overrides it."""
    check: bool = False
    """Check options, tokenizer and data for WORLD_SIZE ranks (from the environment) without training."""
    stages: str | None = None
    """YAML list of stages that run one after the other as rounds of one run, each with a `method` and options of its
    own, such as its data; all other options are those given here."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    hft: HFTConfig = field(default_factory=HFTConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def as_run(self) -> RunConfig:
        """The run that these options describe."""
        return self.on(RunConfig())

    def on(self, base: RunConfig) -> RunConfig:
        """``base`` with these options in place of its own; a command's group may have some of a run's group."""
        own = {group.name for group in fields(self)} & {group.name for group in fields(base)}
        return replace(base, **{name: replace(getattr(base, name), **vars(getattr(self, name))) for name in own})


FIRST = (
    *("hft-ratio", "hft-round-interval", "lora-rank"),
    *("tensor-model-parallel-size", "pipeline-model-parallel-size"),
    *("micro-batch-size", "global-batch-size", "seq-length", "train-iters"),
    *("lr", "lr-warmup-fraction"),
    *("save", "save-interval", "load", "save-hf", "eval-interval", "eval-iters"),
)
"""Options of every run that --help shows, after those of its model and data."""


def first_options(of_command: Iterable[str]) -> tuple[str, ...]:
    """Names of the options that --help shows, with those of the command itself; the groups have their order."""
    return ("config", "check", "load-hf", *of_command, *FIRST, "seed")


@cache
def options_of(method: Declaration) -> type[TrainingOptions]:
    """Options of a method's command: those of every run and the method's own."""
    groups = [(name, group, field(default_factory=group)) for name, group in method.groups.items()]
    return make_dataclass(
        f"{method.name.capitalize()}Options",
        groups,
        bases=(TrainingOptions,),
        namespace={"__doc__": f"The options of ``hft-megatron {method.name}``."},
        frozen=True,
        kw_only=True,
    )


def run_method(method: MethodName, options: TrainingOptions, status: StatusFolder) -> None:
    """Check, and train unless --check is given; every rank checks for itself with the same result."""
    config = with_checkpoint_args(options.as_run)
    if config.checkpoint.save is not None and not options.check:
        status.use(Path(config.checkpoint.save))
    world_size = launch.world_size()
    shape = shape_of(config.model)
    if options.stages is not None:
        shared = _with_options_of_others(options, config)
        _run_stages(options.stages, shared, shape, world_size, status, check=options.check)
        return
    validate(config, shape, world_size, method)
    # Imported here and below, because the checks above must not wait for torch and transformers.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    if options.check:
        from hft_megatron.trainer.stages import check_inputs

        check_inputs(METHODS[method], config, shape, world_size, note)
        note(_all_is_well(config, shape, world_size))
        return
    launch.place_this_process()
    from hft_megatron.trainer.assembly import run_training

    run_training(METHODS[method], config, shape, world_size, on_loss=end_of_peers(status))


def _with_options_of_others(options: TrainingOptions, config: RunConfig) -> RunConfig:
    """The options with those of --config that this command lacks and a stage of another method may need."""
    if options.config is None:
        return config
    file = read_others(Path(options.config), flags_of(type(options)))
    return replace(options.on(file), model=config.model)


def _run_stages(
    path: str, config: RunConfig, shape: ModelShape | None, world_size: int, status: StatusFolder, *, check: bool
) -> None:
    stages = read_stages(path, config, note)
    for stage in with_rounds_in_turn(stages):
        validate(stage.config, shape, world_size, stage.method)
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.trainer.stages import check_stages, run_stages

    if check:
        lines, _ = check_stages(stages, world_size, METHODS)
        note("\n".join([*lines, _all_is_well(config, shape, world_size)]))
        return
    launch.place_this_process()
    run_stages(stages, shape, world_size, METHODS, on_loss=end_of_peers(status))


def _all_is_well(config: RunConfig, shape: ModelShape | None, world_size: int) -> str:
    parallel = config.parallel
    layout = (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x "
        f"DP {data_parallel_size(parallel, world_size)}"
    )
    model = "a LLaMA" if shape is None else f"a LLaMA of {shape.parameter_count():,} parameters"
    return f"OK: {model} on {layout}, global batch size {global_batch_size(config, world_size)}"
