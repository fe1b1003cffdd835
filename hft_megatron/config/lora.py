"""Options of low-rank adapters (LoRA), which train in place of the model's own weights, and their rules."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from hft_megatron.config.adapters import TARGETS, Adapters
from hft_megatron.config.declared import flag
from hft_megatron.config.hft import CHOICE_OF_UNITS, HFTConfig
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_LIMITED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Keys of adapter_config.json with their supported values. With other biases these train; other initial values change
the matrix itself, so that the adapter belongs to weights that the --load-hf folder does not have."""
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
        *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size"),
    )
)
"""Keys that do not change W x + alpha / r x B A x, whatever their value."""
_READ = frozenset(("peft_type", "r", "lora_alpha", "target_modules"))
"""Keys that are checked one by one. All others, known or not, must be unset: null, false or empty."""
_NOTE_FILE = "adapter_run.json"


@dataclass(frozen=True, kw_only=True)
class AdapterNote:
    """The run and the iteration of the adapter in a --save-lora folder."""

    run: str
    """``RunIdentity.run_id``."""
    iteration: int

    def write(self, folder: Path) -> None:
        """Writes it into the adapter's folder. Raises OSError."""
        (folder / _NOTE_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> AdapterNote | None:
        """The note in the folder; None where there is none that can be read."""
        try:
            return AdapterNote(**json.loads((folder / _NOTE_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights."""

    lora_rank: Annotated[int, Ge(1)] | None = None
    """Rank of adapters to train beside the matrices of every layer, with all of the model's own weights frozen
    (LoRA)."""
    lora_alpha: Annotated[float, Gt(0)] | None = None
    """Scale of the adapters: B A x is multiplied by alpha / rank; twice the rank when unset."""
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout probability of an adapter's input in training."""
    lora_targets: str | None = None
    """Matrices that get an adapter: comma-separated Hugging Face names, such as `q_proj,v_proj`; all seven when
    unset."""
    lora_adapter: str | None = None
    """Folder of a PEFT adapter to continue training; it gives rank, alpha and targets."""


def adapters_of(options: LoraConfig) -> Adapters | None:
    """The adapters that the options describe; UserError for a --lora-adapter folder that is none, or is not
    supported."""
    if options.lora_adapter is not None:
        return _adapters_in(options.lora_adapter, options)
    if options.lora_rank is None:
        return None
    targets = _targets(options)
    return Adapters(
        rank=options.lora_rank,
        alpha=float(2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha),
        dropout=options.lora_dropout,
        targets=targets,
    )


def with_adapters(shape: ModelShape, options: LoraConfig) -> ModelShape:
    """The shape of the model that a run with these options trains."""
    return replace(shape, adapters=adapters_of(options))


def _targets(options: LoraConfig) -> tuple[str, ...]:
    if options.lora_targets is None:
        return TARGETS
    given = [name.strip() for name in options.lora_targets.split(",")]
    unknown = next((name for name in given if name not in TARGETS), None)
    if unknown is not None:
        raise UserError(
            f"--lora-targets {options.lora_targets}: {unknown or 'an empty name'} is not one of {', '.join(TARGETS)}; "
            f"leave --lora-targets out for all of them."
        )
    return tuple(name for name in TARGETS if name in given)


def _adapters_in(folder: str, options: LoraConfig) -> Adapters:
    config = _read_adapter_config(folder)
    where = f"--lora-adapter {folder}: {ADAPTER_CONFIG_FILE}"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where} has peft_type {config.get('peft_type')!r}, but only 'LORA' is supported.")
    _refuse_variants(config, where)
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where} has r = {rank!r}, which is not a whole number of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= sys.float_info.max:
        raise UserError(f"{where} has lora_alpha = {alpha!r}, which is not a finite number above 0.")
    if targets == "all-linear":
        targets = list(TARGETS)
    if not isinstance(targets, list) or not targets or not all(name in TARGETS for name in targets):
        raise UserError(f"{where} has target_modules = {targets!r}; only {', '.join(TARGETS)} are supported.")
    found = Adapters(
        rank=rank,
        alpha=float(alpha),
        dropout=options.lora_dropout,
        targets=tuple(name for name in TARGETS if name in targets),
    )
    targets = None if options.lora_targets is None else ",".join(_targets(options))
    held = {"lora_rank": rank, "lora_alpha": found.alpha, "lora_targets": ",".join(found.targets)}
    for name, value in zip(held, (options.lora_rank, options.lora_alpha, targets), strict=True):
        if value not in (None, held[name]):
            raise UserError(
                f"{flag(name)} {value}: the adapter of --lora-adapter {folder} has {held[name]}; leave {flag(name)} "
                f"out."
            )
    return found


def _refuse_variants(config: dict[str, Any], where: str) -> None:
    """UserError for the first key that changes W x + alpha / r x B A x on all layers into something else, or that is
    unknown and so may change it."""
    for key, value in config.items():
        is_unset = value is None or value is False or value in ("", [], {})  # 0 may be the number of a layer
        if key in _READ | _WITHOUT_EFFECT or value in _LIMITED.get(key, ()) or (is_unset and key not in _LIMITED):
            continue
        allowed = "an adapter without it"
        if key in _LIMITED:
            allowed = " or ".join(repr(one) for one in _LIMITED[key] if one is not None)
        raise UserError(
            f"{where} has {key} = {value!r}, which is not supported; only {allowed} is; convert the adapter to plain "
            f"LoRA with PEFT first."
        )


def _read_adapter_config(folder: str) -> dict[str, Any]:
    path = Path(folder) / ADAPTER_CONFIG_FILE
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--lora-adapter {folder}: {ADAPTER_CONFIG_FILE} cannot be read ({error}); give the folder of a PEFT "
            f"adapter."
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"--lora-adapter {folder}: {ADAPTER_CONFIG_FILE} is not a JSON object.")
    if not (Path(folder) / ADAPTER_WEIGHTS_FILE).is_file():
        raise UserError(
            f"--lora-adapter {folder}: there is no {ADAPTER_WEIGHTS_FILE}; weights are read from safetensors only."
        )
    return loaded


def adapters_are_asked_for(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse options of adapters without adapters, where they would do nothing in silence."""
    if adapters_of(config.lora) is not None:
        return
    for field in fields(LoraConfig):
        value = getattr(config.lora, field.name)
        if value != field.default:
            raise UserError(f"{flag(field.name)} {value} needs --lora-rank; add it or leave {flag(field.name)} out.")
    if config.checkpoint.save_lora is not None:
        raise UserError(
            f"--save-lora {config.checkpoint.save_lora} needs --lora-rank; add it or leave --save-lora out."
        )


def adapters_train_alone(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """With adapters nothing is drawn: they all train, in one round, beside pretrained weights."""
    if adapters_of(config.lora) is None:
        return
    given = "--lora-rank" if config.lora.lora_adapter is None else "--lora-adapter"
    hft, usual = config.hft, HFTConfig()
    numbering = ("hft_seed", "hft_first_round")
    chosen = [name for name in (*CHOICE_OF_UNITS, "hft_plan") if name not in numbering]
    for name in chosen:
        value = getattr(hft, name)
        if value != getattr(usual, name) and (name, value) != ("hft_ratio", 1):
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            raise UserError(
                f"{shown} chooses which of the model's weights train, but with {given} none does: only adapters train; "
                f"leave one of the two out."
            )
    if hft.hft_round_interval != "stage":
        raise UserError(
            f"--hft-round-interval {hft.hft_round_interval} begins rounds that train other weights, but with {given} "
            f"every round would train the same adapters; leave it out."
        )
    if config.optimizer.mofo_fraction is not None:
        raise UserError(
            f"--mofo-fraction {config.optimizer.mofo_fraction:g} chooses entries of the model's own matrices, but "
            f"{given} freezes them; leave one of the two out."
        )
    if config.ewc.ewc_lambda > 0:
        raise UserError(
            f"--ewc-lambda {config.ewc.ewc_lambda:g} penalises changes of the model's own weights, but {given} freezes "
            f"them; leave one of the two out."
        )


def adapters_fit_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Adapters need a pretrained model and one place to start from, and leave embedding and head frozen, so that these
    have no learning rate."""
    if adapters_of(config.lora) is None:
        return
    folder, rate = config.lora.lora_adapter, config.optimizer.decoupled_lr
    given = "--lora-rank" if folder is None else "--lora-adapter"
    if config.model.load_hf is None:
        raise UserError(f"{given} trains adapters of a pretrained model; give its folder with --load-hf.")
    if folder is not None and config.checkpoint.finetune:
        raise UserError(
            f"--lora-adapter {folder} gives the adapters to start from, and so does --finetune with --load "
            f"{config.checkpoint.load}; leave one of the two out."
        )
    if rate is not None:
        raise UserError(
            f"--decoupled-lr {rate:g} is the learning rate of embedding and head, but {given} freezes them; leave it "
            f"out."
        )


def for_later_stages(options: LoraConfig) -> LoraConfig:
    """The options of a stage or task that takes its adapters from the one before: --lora-adapter as rank, alpha and
    targets."""
    adapters = adapters_of(options)
    if options.lora_adapter is None or adapters is None:
        return options
    return replace(
        options,
        lora_adapter=None,
        lora_rank=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_targets=",".join(adapters.targets),
    )


def are_alike(one: LoraConfig, other: LoraConfig) -> bool:
    """Whether one stage or task can train another's adapters; their dropout may differ."""
    return replace(one, lora_dropout=other.lora_dropout) == other


def note_dropout(options: LoraConfig) -> list[str]:
    """A line for the log where the adapter of --lora-adapter was trained with another dropout."""
    if options.lora_adapter is None:
        return []
    held = _read_adapter_config(options.lora_adapter).get("lora_dropout") or 0.0
    if held == options.lora_dropout:
        return []
    return [
        f"--lora-adapter {options.lora_adapter} has lora_dropout {held}, which is not used: this run has "
        f"--lora-dropout {options.lora_dropout:g}"
    ]


LORA_RULES = (adapters_are_asked_for, adapters_train_alone)
"""Rules of adapters that also hold for a plan without a run."""
