"""The folders that a merge reads and writes, and checks of them. Imports no torch.

Two models can be merged tensor by tensor when one was trained from the other; their config.json files show it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.checkpoint import CheckpointConfig, outputs_can_be_written
from hft_megatron.config.exports import nothing_is_overwritten
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import same_folder
from hft_megatron.errors import UserError

_MAY_DIFFER = ("max_position_embeddings", "rms_norm_eps", "initializer_range")
"""Keys of config.json that leave every weight its meaning, and that published pairs of a base and a chat model differ
in. Another rotary base or number of heads would give the same numbers another meaning."""


@dataclass(frozen=True, kw_only=True)
class MergeFolders:
    """A fine-tuned model, the model that it was trained from, and a folder for the result."""

    tuned: str | None = None
    """Hugging Face folder of the fine-tuned model; data type, config.json and tokenizer of the output are its."""
    base: str | None = None
    """Hugging Face folder of the model that the tuned one was trained from."""
    output: str | None = None
    """New folder, which appears when it is complete."""


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Two different folders of one shape, and a writable output."""

    tuned: str
    base: str
    output: str
    shape: ModelShape
    """Shape of both, apart from the differences in ``notes``."""
    notes: tuple[str, ...]
    """Harmless differences of the two config.json files, one line each."""


@contextmanager
def options_called(names: dict[str, str]) -> Iterator[None]:
    """Renames options in a UserError of shared code to those of this command: ``{"--load-hf": "--tuned"}``."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for shared, own in names.items():
            message = message.replace(shared, own)
        raise UserError(message) from error


def check_folders(folders: MergeFolders) -> MergeInputs:
    """Checks the options and both config.json files.

    Raises UserError for a missing option, one folder given twice, an output that is not empty or cannot be written, a
    folder that is no LLaMA, and two models of different shapes (naming the first key that differs).
    """
    for name in ("tuned", "base", "output"):
        if getattr(folders, name) is None:
            raise UserError(
                f"--{name} is missing: give two model folders, --tuned and --base, and a new folder, --output."
            )
    assert folders.tuned is not None
    assert folders.base is not None
    assert folders.output is not None
    if same_folder(folders.tuned, folders.base):
        raise UserError(
            f"--base {folders.base} is the folder of --tuned; name the model that the tuned one was trained from."
        )
    tuned, base = _read_shape("--tuned", folders.tuned), _read_shape("--base", folders.base)
    with options_called({"--save-hf": "--output"}):
        for rule in (nothing_is_overwritten, outputs_can_be_written):
            rule(RunConfig(checkpoint=CheckpointConfig(save_hf=folders.output)), tuned, 1)
    return MergeInputs(
        tuned=folders.tuned,
        base=folders.base,
        output=folders.output,
        shape=tuned,
        notes=_differences(folders.tuned, tuned, folders.base, base),
    )


def _read_shape(option: str, folder: str) -> ModelShape:
    with options_called({"--load-hf": option}):
        return ModelShape.from_hf_config(load_hf_config(folder), source=f"{option} {folder}/{HF_CONFIG_FILE}")


def _differences(tuned_folder: str, tuned: ModelShape, base_folder: str, base: ModelShape) -> tuple[str, ...]:
    """Notes about keys that may differ. Raises UserError for the first that may not."""
    notes = []
    theirs = base.to_hf_config()
    for key, value in tuned.to_hf_config().items():
        if value == theirs[key]:
            continue
        if key not in _MAY_DIFFER:
            raise UserError(
                f"--base {Path(base_folder) / HF_CONFIG_FILE} has {key} {theirs[key]!r}, but --tuned "
                f"{Path(tuned_folder) / HF_CONFIG_FILE} has {value!r}; only models of one shape can be merged, so name "
                "the model that the tuned one was trained from."
            )
        notes.append(f"{HF_CONFIG_FILE} has {key} {value!r} in --tuned, which is kept, and {theirs[key]!r} in --base")
    return tuple(notes)


def place_of(coefficient: float) -> str:
    """The name of a coefficient's folder on a path of averages: ``0.25``."""
    return f"{coefficient:g}"
