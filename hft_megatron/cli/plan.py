"""``hft-megatron plan``: which units train in which round, and what every rank of a layout would hold and send.

Run: ``hft-megatron plan --load-hf MODEL --tensor-model-parallel-size 8 --world-size 64 --rounds 2``. It needs a
config.json but no weights, no GPU, no ranks and no torch (but for one line of --memory, about this machine).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.declared import check_bounds, flag
from hft_megatron.config.derived import sequence_length
from hft_megatron.config.hf_keys import note_unknown_keys
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.lora import LoraConfig, with_adapters
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.names import SELECTIONS
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import write_atomically
from hft_megatron.config.training import TrainingConfig, batch_divides_over_the_ranks, sequence_fits_the_model
from hft_megatron.config.validation import shape_of, validate_plan
from hft_megatron.costs.part_times import Device
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.costs.rank_memory import MemoryModel, MicroBatch
from hft_megatron.costs.step_time import StepTimeModel
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.plan_file import check_enough_rounds, load_plans, plans_to_json
from hft_megatron.report.plan import MemoryReport, make_report, memory_report, memory_size
from hft_megatron.report.plan_text import report_json, report_text
from hft_megatron.report.plan_time import TimeReport, time_report


@dataclass(frozen=True, kw_only=True)
class PlanTrainingConfig:
    """What a plan, and with --memory its memory, depends on of a run's training options."""

    micro_batch_size: Annotated[int, Ge(1)] = 1
    """For --memory and --time: sequences of one forward pass on one data-parallel rank."""
    global_batch_size: Annotated[int, Ge(1)] | None = None
    """For --time: sequences of one optimizer step over all ranks."""
    seq_length: Annotated[int, Ge(1)] | None = None
    """For --memory and --time: the longest training sequence in tokens; the model's limit when unset."""
    recompute_activations: bool = False
    """The same as --recompute-granularity selective."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """For --memory and --time: what the backward pass makes again, as in a run."""
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Annotated[int, Ge(1)] | None = None
    bf16: bool = True
    """Costs with bf16 weights and fp32 masters, or with fp32 weights (--no-bf16)."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Gradients beside bf16 weights in fp32, or (--no-accumulate-allreduce-grads-in-fp32) in bf16, as in a run."""
    seed: Annotated[int, Ge(0)] = TrainingConfig.seed
    """Seed of the draw when --hft-seed is unset."""


@dataclass(frozen=True, kw_only=True)
class PlanDeviceConfig:
    """What --time takes a device and its links to sustain; shares of data sheets' peaks, or measured."""

    device_tflops: Annotated[float, Gt(0)] | None = None
    """For --time: matrix products that a device sustains, in TFLOP/s: a share of its peak (H100 SXM: 989 in bf16)."""
    memory_bandwidth: Annotated[float, Gt(0)] | None = None
    """For --time: what a device reads and writes of its memory, in GB/s: a share of its peak (H100 SXM: 3350)."""
    node_bandwidth: Annotated[float, Gt(0)] | None = None
    """For --time: what a device sends to others of its node, in GB/s and one direction (H100 SXM, at most: 450)."""
    network_bandwidth: Annotated[float, Gt(0)] | None = None
    """For --time: what a device sends to other nodes, in GB/s and one direction (a link of 400 Gb/s, at most: 50)."""
    devices_per_node: Annotated[int, Ge(1)] = 8
    """For --time: ranks of a node."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan for, and where to put it."""

    config: str | None = None
    """YAML file of a run, of which only the options below are read; the command line wins."""
    world_size: Annotated[int, Ge(1)] | None = None
    """Ranks of the run; those of one replica (TP x PP) when unset."""
    memory: str | None = None
    """A device's memory, such as 80GB: what a rank of the plan and of full fine-tuning holds, whether that fits, and
    the smallest layouts and nearest options that do."""
    time: bool = False
    """Estimate by formula how long a step takes, of the plan and of full fine-tuning, with its parts; needs
    --global-batch-size, --device-tflops, --memory-bandwidth and the bandwidths of the links that the layout uses."""
    rounds: Annotated[int, Ge(1)] | None = None
    """Rounds to plan; all of --hft-plan's when that is given, else 1."""
    json: bool = False
    """Print JSON, with every rank, instead of text."""
    save: str | None = None
    """File for the plans, which --hft-plan reads. A plan that somebody has edited is never written over."""
    png: str | None = None
    """File for a picture of the grid."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: PlanTrainingConfig = field(default_factory=PlanTrainingConfig)
    device: PlanDeviceConfig = field(default_factory=PlanDeviceConfig)
    hft: HFTConfig = field(default_factory=HFTConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def as_run(self) -> RunConfig:
        """The run that is planned for, as far as a plan knows it."""
        training = TrainingConfig(**vars(self.training))
        return RunConfig(parallel=self.parallel, model=self.model, training=training, hft=self.hft, lora=self.lora)


def run(options: PlanOptions, status: StatusFolder) -> None:
    """Print the plans and their costs, and write the files that are asked for. Raises UserError for every mistake."""
    shape, world_size = _checked(options)
    model = CostModel(
        shape=shape,
        parallel=options.parallel,
        world_size=world_size,
        bf16=options.training.bf16,
        fp32_gradients=options.training.accumulate_allreduce_grads_in_fp32,
        vocab_multiple=options.model.make_vocab_size_divisible_by,
    )
    report = make_report(_plans(options, shape), model)
    memory = None if options.memory is None else _memory(options, options.memory, model, report.plans)
    time = _time(options, model, report.plans) if options.time else None
    if options.save is not None:
        _save(options.save, plans_to_json(report.plans))
    if options.png is not None:
        # Imported here, because only this needs Pillow.
        from hft_megatron.report.plan_picture import draw_picture

        try:
            draw_picture(report, Path(options.png))
        except OSError as error:
            raise UserError(f"--png {options.png} can't be written: {error.strerror}.") from None
    notes = _notes(options.model.load_hf)
    shown = report_json if options.json else report_text
    show(shown(report, memory, time, notes))


def _notes(folder: str | None) -> list[str]:
    """What is not known of the model's config, as a run says it in its log."""
    return [] if folder is None else note_unknown_keys(load_hf_config(folder), f"{folder}/{HF_CONFIG_FILE}")


def _checked(options: PlanOptions) -> tuple[ModelShape, int]:
    """Shape and world size of options that make a plan."""
    check_bounds(options)
    shape = shape_of(options.model)
    if shape is None:
        raise UserError("--vocab-size is missing: a plan reads no tokenizer; give it, or a model folder by --load-hf.")
    replica = options.parallel.tensor_model_parallel_size * options.parallel.pipeline_model_parallel_size
    world_size = replica if options.world_size is None else options.world_size
    validate_plan(options.as_run, shape, world_size)
    if options.save is not None and options.lora != LoraConfig():
        raise UserError(
            f"--save {options.save} is for plans that --hft-plan reads, and with --lora-rank a run reads none: all its "
            f"adapters train; leave --save out."
        )
    _check_time(options, shape, world_size)
    return with_adapters(shape, options.lora), world_size


def _memory(options: PlanOptions, memory: str, costs: CostModel, plans: Sequence[Plan]) -> MemoryReport:
    device_bytes, training = memory_size(memory), options.as_run.training
    model = MemoryModel(
        costs=costs,
        training=training,
        micro_batch=MicroBatch(sequences=training.micro_batch_size, seq_length=sequence_length(training, costs.shape)),
    )
    # Imported here, because it takes torch's time.
    from hft_megatron.engine.cpu_backend import has_fast_bf16

    return memory_report(model, plans, device_bytes, bf16_here=has_fast_bf16())


_DEVICE_WORDS = {
    "device_tflops": "the TFLOP/s of matrix products that a device sustains",
    "memory_bandwidth": "the GB/s that a device reads and writes of its memory",
    "node_bandwidth": "the GB/s that a device sends to others of its node",
    "network_bandwidth": "the GB/s that a device sends to other nodes",
}


def _check_time(options: PlanOptions, shape: ModelShape, world_size: int) -> None:
    """Raises UserError for what --time lacks, and for a rate that is of no use without it."""
    device = options.device
    given = [name for name in _DEVICE_WORDS if getattr(device, name) is not None]
    if not options.time:
        if given:
            raise UserError(f"{flag(given[0])} {getattr(device, given[0]):g} is for --time; add it, or leave this out.")
        return
    if options.lora != LoraConfig():
        raise UserError("--time doesn't know the products of adapters (--lora-rank); leave one of the two out.")
    if options.training.global_batch_size is None:
        raise UserError("--time needs --global-batch-size, the sequences of a step over all ranks; add it.")
    batch_divides_over_the_ranks(options.as_run, shape, world_size)
    sequence_fits_the_model(options.as_run, shape, world_size)
    needed = ["device_tflops", "memory_bandwidth"]
    needed += ["node_bandwidth"] if min(world_size, device.devices_per_node) > 1 else []
    needed += ["network_bandwidth"] if world_size > device.devices_per_node else []
    for name in needed:
        if name not in given:
            raise UserError(f"--time needs {flag(name)}, {_DEVICE_WORDS[name]}; add it.")


def _time(options: PlanOptions, costs: CostModel, plans: Sequence[Plan]) -> TimeReport:
    given, training = options.device, options.as_run.training
    assert given.device_tflops is not None
    assert given.memory_bandwidth is not None
    assert training.global_batch_size is not None
    model = StepTimeModel(
        costs=costs,
        training=training,
        micro_batch=MicroBatch(sequences=training.micro_batch_size, seq_length=sequence_length(training, costs.shape)),
        micro_batches=training.global_batch_size // (training.micro_batch_size * costs.data_size),
        device=Device(
            tflops=given.device_tflops,
            memory_bandwidth=given.memory_bandwidth,
            # What isn't given is not used.
            node_bandwidth=given.node_bandwidth or math.inf,
            network_bandwidth=given.network_bandwidth or math.inf,
            devices_per_node=given.devices_per_node,
        ),
    )
    return time_report(model, plans)


def _plans(options: PlanOptions, shape: ModelShape) -> tuple[Plan, ...]:
    path = options.hft.hft_plan
    if path is not None:
        loaded = load_plans(path, shape)
        if options.rounds is not None:
            check_enough_rounds(loaded, options.rounds, path)
        return loaded[: options.rounds]
    selection = options.hft.hft_selection
    if SELECTIONS[selection].needs_scores:
        raise UserError(
            f"--hft-selection {selection} ranks a model's weights, which `hft-megatron plan` doesn't read; run "
            "`hft-megatron sft` with it and give the plan.json of one of its checkpoints by --hft-plan."
        )
    first = options.hft.hft_first_round or 0
    return tuple(
        make_plan(shape, options.hft, default_seed=options.training.seed, round=round)
        for round in range(first, first + (options.rounds or 1))
    )


def _save(file: str, text: str) -> None:
    path = Path(file)
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise UserError(f"--save {file} holds something else already; choose another name, or remove it.")
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"--save {file} can't be written: {error.strerror}.") from None
