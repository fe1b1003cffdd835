"""The lines of a log about a Hugging Face folder that is read. Imports no torch."""

from contextlib import suppress
from pathlib import Path

from hft_megatron.config.hf_refusals import note_unknown_keys
from hft_megatron.config.model_shape import HF_CONFIG_FILE, load_hf_config
from hft_megatron.conversion.weight_files import find_weight_files
from hft_megatron.errors import UserError


def notes_on_folder(folder: str) -> list[str]:
    """A line for each key and file that was passed over and might have meant something.

    Says nothing about a set of weight files that isn't clear, which is for ``check_weights`` to refuse.
    """
    notes = note_unknown_keys(load_hf_config(folder), f"{folder}/{HF_CONFIG_FILE}")
    with suppress(UserError):
        notes += find_weight_files(Path(folder), option="--load-hf").notes
    return notes
