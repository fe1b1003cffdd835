"""``hft-megatron plan``: the units that train in each round, and the memory and traffic of every rank of a layout.

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
    """Training options of a run that a plan, its memory (--memory) and its time (--time) depend on."""

    micro_batch_size: Annotated[int, Ge(1)] = 1
    """Sequences per forward pass on one data-parallel rank, for --memory and --time."""
    global_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per optimizer step over all ranks, for --time."""
    seq_length: Annotated[int, Ge(1)] | None = None
    """Longest training sequence in tokens, for --memory and --time; the model's limit when unset."""
    recompute_activations: bool = False
    """Recompute attention in the backward pass: the same as --recompute-granularity selective."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations that the backward pass recomputes, as in a run, for --memory and --time: whole layers (full), or the
    core attention alone (selective); none when unset."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Layers that full recomputation covers, as in a run: all (uniform), or the first --recompute-num-layers of a model
    chunk (block)."""
    recompute_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers per recomputed unit (uniform), or recomputed layers per model chunk (block)."""
    bf16: bool = True
    """Data type of the weights: bf16 with fp32 masters, or fp32 (--no-bf16)."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Data type of the gradients of bf16 weights: fp32, or bf16 (--no-accumulate-allreduce-grads-in-fp32), as in a
    run."""
    seed: Annotated[int, Ge(0)] = TrainingConfig.seed
    """Seed of the draw when --hft-seed is unset."""


@dataclass(frozen=True, kw_only=True)
class PlanDeviceConfig:
    """Sustained rates of a device and its links for --time: shares of data sheets' peaks, or measured."""

    device_tflops: Annotated[float, Gt(0)] | None = None
    """Sustained TFLOP/s of matrix products of a device, for --time: a share of its peak (H100 SXM: 989 in bf16)."""
    memory_bandwidth: Annotated[float, Gt(0)] | None = None
    """Sustained memory bandwidth of a device in GB/s, for --time: a share of its peak (H100 SXM: 3350)."""
    node_bandwidth: Annotated[float, Gt(0)] | None = None
    """Bandwidth from a device to others of its node in GB/s and one direction, for --time (H100 SXM: at most 450)."""
    network_bandwidth: Annotated[float, Gt(0)] | None = None
    """Bandwidth from a device to other nodes in GB/s and one direction, for --time (a 400 Gb/s link: at most 50)."""
    devices_per_node: Annotated[int, Ge(1)] = 8
    """Ranks per node, for --time."""


FIRST = (
    *("config", "load-hf", "world-size", "rounds", "memory", "time", "json", "save", "png"),
    *("hft-ratio", "hft-level", "hft-selection", "hft-rotation", "hft-plan", "lora-rank"),
    *("tensor-model-parallel-size", "pipeline-model-parallel-size"),
    *("micro-batch-size", "global-batch-size", "seq-length", "seed"),
)
"""The options that --help shows."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of ``hft-megatron plan``."""

    config: str | None = None
    """YAML file of a run, from which only the options below are read; the command line overrides it."""
    world_size: Annotated[int, Ge(1)] | None = None
    """Ranks of the run; those of one replica (TP x PP) when unset."""
    memory: str | None = None
    """Memory of a device, such as 80GB. Shows the memory of a rank under the plan and under full fine-tuning, whether
    it fits, and the smallest layouts and nearest options that fit."""
    time: bool = False
    """Estimate by formula the time of a step and its parts, under the plan and under full fine-tuning. Needs
    --global-batch-size, --device-tflops, --memory-bandwidth and the bandwidths of the links that the layout uses."""
    rounds: Annotated[int, Ge(1)] | None = None
    """Number of rounds to plan; all rounds of --hft-plan if given, else 1."""
    json: bool = False
    """Print JSON, with every rank, instead of text."""
    save: str | None = None
    """File for the plans, which --hft-plan reads. An edited plan is never overwritten."""
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
        """The run that is planned, as far as a plan knows it."""
        training = TrainingConfig(**vars(self.training))
        return RunConfig(parallel=self.parallel, model=self.model, training=training, hft=self.hft, lora=self.lora)


def run(options: PlanOptions, status: StatusFolder) -> None:
    """Print the plans and their costs, and write the requested files. Raises UserError for every mistake."""
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
            raise UserError(f"--png {options.png} cannot be written: {error.strerror}; choose another file.") from None
    notes = _notes(options.model.load_hf)
    shown = report_json if options.json else report_text
    show(shown(report, memory, time, notes))


def _notes(folder: str | None) -> list[str]:
    """Lines about unknown keys of the model's config, as in a run's log."""
    return [] if folder is None else note_unknown_keys(load_hf_config(folder), f"{folder}/{HF_CONFIG_FILE}")


def _checked(options: PlanOptions) -> tuple[ModelShape, int]:
    """Shape and world size of options that make a plan."""
    check_bounds(options)
    shape = shape_of(options.model)
    if shape is None:
        raise UserError("--vocab-size is missing: a plan reads no tokenizer; give it, or a folder with --load-hf.")
    replica = options.parallel.tensor_model_parallel_size * options.parallel.pipeline_model_parallel_size
    world_size = replica if options.world_size is None else options.world_size
    validate_plan(options.as_run, shape, world_size)
    if options.save is not None and options.lora != LoraConfig():
        raise UserError(
            f"--save {options.save} is for plans that --hft-plan reads, but a run with --lora-rank reads none: it "
            f"trains all adapters; leave --save out."
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
    "device_tflops": "the sustained TFLOP/s of matrix products of a device",
    "memory_bandwidth": "the sustained memory bandwidth of a device in GB/s",
    "node_bandwidth": "the bandwidth from a device to others of its node in GB/s",
    "network_bandwidth": "the bandwidth from a device to other nodes in GB/s",
}


def _check_time(options: PlanOptions, shape: ModelShape, world_size: int) -> None:
    """Raises UserError for options that --time lacks, and for a rate without --time."""
    device = options.device
    given = [name for name in _DEVICE_WORDS if getattr(device, name) is not None]
    if not options.time:
        if given:
            raise UserError(
                f"{flag(given[0])} {getattr(device, given[0]):g} needs --time; add it or leave {flag(given[0])} out."
            )
        return
    if options.lora != LoraConfig():
        raise UserError("--time does not support adapters (--lora-rank); leave one of the two out.")
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
            "`hft-megatron sft` with it and give the plan.json of one of its checkpoints as --hft-plan."
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
            raise UserError(f"--save {file} already exists with other contents; choose another name, or remove it.")
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"--save {file} cannot be written: {error.strerror}; choose another file.") from None
