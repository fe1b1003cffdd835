"""Identity of a run: model, data and method, but not the layout or the number of iterations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from hft_megatron.config import derived
from hft_megatron.config.adapters import Adapters
from hft_megatron.config.declared import SAME_RUN, declared, flag
from hft_megatron.config.file_digest import file_digest
from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RUN_IDENTITY_FILE, found_again
from hft_megatron.errors import UserError

_OPTIONS = {
    name: option
    for group in get_type_hints(RunConfig).values()
    for name, option in declared(group).items()
    if SAME_RUN in option.marks
}
"""Declarations of the options that are part of the identity, by name.

Folders of earlier versions lack what came later: a default of such an option must be what runs did before it existed.
"""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Values that a resumed run must share with the run in the folder."""

    method: str
    """The command: ``sft`` and so on."""
    shape: ModelShape
    data_path: str | None
    """Path for error messages only: the same data may have another path on another machine."""
    data_digest: str | None
    """Digest of the training data as tokens are made from it; None when nothing is trained."""
    seq_length: int
    global_batch_size: int
    seed: int
    hft_seed: int
    weights_digest: str | None = None
    """Digest of the Hugging Face folder's weights; None for a run that started from random weights."""
    adapter_digest: str | None = None
    """Digest of the file of --lora-adapter; None for a run whose adapters started fresh, or that has none."""
    options: Mapping[str, Any]
    """Values of the options that ``SAME_RUN`` marks, by name. In the file they stand beside the other values."""
    # Defaults: the values of runs from before these fields existed.
    dpo_average_log_probs: bool = False
    reference_digest: str | None = None
    """Digest of the --dpo-reference-model's weights; None where the run compares with its own first weights."""
    hft_plan: str | None = None
    """Path for error messages only, like ``data_path``."""
    hft_plan_digest: str | None = None
    """Digest of the plan file; None when plans are drawn."""
    finetuned_from: str | None = None
    """Folder of the run whose weights --finetune took; None for other runs, and for a command that only resumes."""
    tokenizer_path: str | None = None
    """Path for error messages only."""
    tokenizer_digest: str | None = None
    """Digest of everything that decides the ids of a text; None where nothing was tokenized."""
    split: str | None = None
    """Value of --split for a corpus; None for other data."""
    order_digest: str | None = None
    """Digest of the order of samples, where it depends on more than the values above."""
    train_iters: int | None = None
    """Iterations that the order of ``order_digest`` was made for; for error messages only."""
    uses_chat_template: bool = True
    """True if the chat template has rendered training data of this run, or of one whose weights it took; not
    compared."""
    run_id: str = ""
    """Name that the run gets when it begins. Recorded beside its exports to recognise them; not compared. Empty before
    that, and for runs of earlier versions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file beside the checkpoints."""
        values = asdict(self)
        options = values.pop("options")
        return {**{_OPTIONS[name].identity_key: value for name, value in options.items()}, **values}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> RunIdentity:
        """The inverse of ``to_dict``."""
        shape = dict(saved["shape"])
        if shape["rope_scaling"] is not None:
            shape["rope_scaling"] = Llama3RopeScaling(**shape["rope_scaling"])
        if shape.get("adapters") is not None:
            adapters = shape["adapters"]
            shape["adapters"] = Adapters(**{**adapters, "targets": tuple(adapters["targets"])})
        keys = {name: option.identity_key for name, option in _OPTIONS.items()}
        options = {name: saved.get(keys[name], option.default) for name, option in _OPTIONS.items()}
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        values = {key: value for key, value in saved.items() if key not in keys.values()}
        return RunIdentity(**{**values, "shape": ModelShape(**shape), "options": options})

    @staticmethod
    def read(option: str, folder: str) -> RunIdentity:
        """Read the identity of the run in ``folder``, the value of ``option``. UserError if it cannot be read."""
        file = Path(folder) / RUN_IDENTITY_FILE
        try:
            noted = RunIdentity.from_dict(json.loads(file.read_text(encoding="utf-8")))
            if noted.finetuned_from is None:
                return noted
            return replace(noted, finetuned_from=str(found_again(Path(noted.finetuned_from), beside=file.parent)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{option} {folder}: {file.name}, the identity of the run, cannot be read ({error}); copy the run's "
                f"folder again, or choose another."
            ) from error


def run_identity(
    config: RunConfig,
    shape: ModelShape,
    world_size: int,
    *,
    method: str,
    data_digest: str | None,
    order_digest: str | None = None,
    tokenizer_digest: str | None = None,
    finetuned_from: str | None = None,
    uses_chat_template: bool = True,
) -> RunIdentity:
    """The identity of the run that these (resolved) options describe, before any weights are read."""
    return RunIdentity(
        method=method,
        shape=shape,
        data_path=_data_words(config),
        data_digest=data_digest,
        seq_length=derived.sequence_length(config.training, shape),
        global_batch_size=derived.global_batch_size(config, world_size),
        seed=config.training.seed,
        hft_seed=derived.hft_seed(config),
        options={name: value for group in asdict(config).values() for name, value in group.items() if name in _OPTIONS},
        dpo_average_log_probs=derived.averages_log_probs(config.dpo),
        hft_plan=config.hft.hft_plan,
        hft_plan_digest=None if config.hft.hft_plan is None else file_digest(Path(config.hft.hft_plan)),
        tokenizer_path=None if tokenizer_digest is None else derived.tokenizer_path(config),
        tokenizer_digest=tokenizer_digest,
        finetuned_from=None if finetuned_from is None else str(Path(finetuned_from).resolve()),
        uses_chat_template=uses_chat_template,
        split=config.corpus.split if config.corpus.data_path else None,
        order_digest=order_digest,
        train_iters=None if order_digest is None else derived.train_iters(config.training),
    )


def _data_words(config: RunConfig) -> str | None:
    if config.corpus.mock_data:
        return "--mock-data"
    return " ".join(config.data.train_data_path or config.corpus.data_path) or None


def check_same_run(saved: RunIdentity, new: RunIdentity, folder: str, *, option: str = "--save") -> None:
    """Raise UserError, with both values of the first difference, when ``folder`` holds another run than ``new``."""
    fix = f"use the run's value, or choose another {option} folder; to start a new run from its weights, give --load "
    fix += f"{folder} --finetune with another --save"
    for name, old_value, new_value in differences(saved, new):
        raise UserError(
            f"{option} {folder} holds another run: its {name} is {old_value}, but this command's is {new_value}; {fix}."
        )


def check_same_model(saved: RunIdentity, new: RunIdentity, folder: str) -> None:
    """Raise UserError, with both values of the first difference, when the weights in ``folder`` don't fit ``new``."""
    _check_same_adapters(saved.shape.adapters, new.shape.adapters, folder)
    saved = replace(saved, shape=replace(saved.shape, adapters=new.shape.adapters))  # except their dropout
    for name, old_value, new_value in _sizes(saved, new):
        if old_value != new_value:
            raise UserError(
                f"--finetune takes the weights of --load {folder}, whose {name} is {old_value}, but this command's is "
                f"{new_value}; give the same model."
            )


def _check_same_adapters(saved: Adapters | None, new: Adapters | None, folder: str) -> None:
    """UserError where the adapters of a run differ, in more than dropout, from those of a run that starts from its
    weights."""
    merged = f"`hft-megatron convert --load {folder} --save-hf MODEL`, and start from that with --load-hf only"
    if saved is None and new is not None:
        raise UserError(
            f"--finetune takes the weights of --load {folder}, which has no adapters, but this command's have rank "
            f"{new.rank}; write that run's model with {merged}."
        )
    if saved is not None and new is None:
        raise UserError(
            f"--finetune takes the weights of --load {folder}, which trained adapters ({saved}), but this command has "
            f"none; give the same --lora-rank, or merge them with {merged}."
        )
    if saved is not None and new is not None and replace(saved, dropout=new.dropout) != new:
        raise UserError(
            f"--finetune takes the weights of --load {folder}, whose adapters have {saved}, but this command's have "
            f"{new}; give the same --lora-rank, --lora-alpha and --lora-targets."
        )


def differences(saved: RunIdentity, new: RunIdentity) -> list[tuple[str, object, object]]:
    """(name, saved value, new value) of everything that differs, under the names of the options."""
    values: list[tuple[str, object, object]] = [("method", saved.method, new.method)]
    values += _sizes(saved, new)
    # Before the data, whose digest depends on it: the more telling difference.
    values.append(("--seq-length", saved.seq_length, new.seq_length))
    if None not in (saved.tokenizer_digest, new.tokenizer_digest) and saved.tokenizer_digest != new.tokenizer_digest:
        values.append(("tokenizer", _tokenizer(saved), _tokenizer(new)))
    sources = saved.finetuned_from, new.finetuned_from
    if None not in sources and sources[0] != sources[1]:
        values.append(("--load of --finetune", *sources))
    if None not in (saved.split, new.split):
        values.append(("--split", saved.split, new.split))
    digests = saved.data_digest, new.data_digest
    # A command that trains nothing (--train-iters 0) reads no data, so it cannot differ in it.
    if None not in digests and digests[0] != digests[1]:
        values.append(("training data", _data(saved), _data(new)))
    weights = saved.weights_digest, new.weights_digest
    if weights[0] != weights[1]:
        shown = [digest and f"digest {digest[:12]}" for digest in weights]
        values.append(("model's weights (--load-hf)", shown[0], shown[1]))
    adapters = [digest and f"digest {digest[:12]}" for digest in (saved.adapter_digest, new.adapter_digest)]
    values.append(("first adapter (--lora-adapter)", adapters[0], adapters[1]))
    references = [digest and f"digest {digest[:12]}" for digest in (saved.reference_digest, new.reference_digest)]
    values.append(("reference model (--dpo-reference-model)", references[0], references[1]))
    if saved.hft_plan_digest != new.hft_plan_digest:
        values.append(("--hft-plan", _plan_file(saved), _plan_file(new)))
    for name in ("global_batch_size", "seed", "hft_seed", "dpo_average_log_probs"):
        values.append((flag(name), getattr(saved, name), getattr(new, name)))
    values += [(flag(name), _written(saved.options[name]), _written(new.options[name])) for name in new.options]
    if None not in (saved.order_digest, new.order_digest) and saved.order_digest != new.order_digest:
        values.append(("order of samples", _order(saved), _order(new)))
    return [entry for entry in values if entry[1] != entry[2]]


def _sizes(saved: RunIdentity, new: RunIdentity) -> list[tuple[str, object, object]]:
    """(name, saved value, new value) of every size of the model."""
    old, now = saved.shape.adapters, new.shape.adapters
    values = _fields_of("model's", replace(saved.shape, adapters=None), replace(new.shape, adapters=None))
    if old is None or now is None:
        return [*values, ("model's adapters", old, now)]
    return [*values, *_fields_of("adapters'", old, now)]


def _fields_of(whose: str, saved: Any, new: Any) -> list[tuple[str, object, object]]:
    """(name, saved value, new value) of every field of two dataclasses of one kind."""
    pairs = ((field.name, getattr(saved, field.name), getattr(new, field.name)) for field in fields(saved))
    return [(f"{whose} {name.replace('_', ' ')}", _written(old), _written(now)) for name, old, now in pairs]


def _written(value: Any) -> Any:
    """An option's value as on the command line where it has several words; None where it has none."""
    return " ".join(map(str, value)) or None if isinstance(value, tuple) else value


def _tokenizer(identity: RunIdentity) -> str:
    assert identity.tokenizer_digest is not None
    return f"{identity.tokenizer_path} (digest {identity.tokenizer_digest[:12]})"


def _data(identity: RunIdentity) -> str:
    assert identity.data_digest is not None
    return f"{identity.data_path} (digest {identity.data_digest[:12]})"


def _order(identity: RunIdentity) -> str:
    assert identity.order_digest is not None
    return f"the one for --train-iters {identity.train_iters} (digest {identity.order_digest[:12]})"


def _plan_file(identity: RunIdentity) -> str | None:
    digest = identity.hft_plan_digest
    return None if digest is None else f"{identity.hft_plan} (digest {digest[:12]})"
