"""What --data-keys and --prompt-separator did to the records of a source: what did nothing is a mistake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.config.data_keys import DataKeys
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RecordUse:
    """An account of one source."""

    keys: DataKeys = ()
    """Of those that are mapped, the ones that some record had."""
    separator: str = ""
    """Empty where no record has it."""

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "RecordUse":
        """The inverse of ``asdict``, of JSON."""
        return RecordUse(keys=tuple((key, known) for key, known in saved["keys"]), separator=saved["separator"])

    def merged(self, other: "RecordUse") -> "RecordUse":
        """With another part of the same source."""
        return RecordUse(keys=tuple(sorted({*self.keys, *other.keys})), separator=self.separator or other.separator)

    def words(self) -> str:
        """For the log, to follow a format; empty where nothing was done."""
        mapped = "".join(f", `{key}` as `{known}`" for key, known in self.keys)
        return mapped + (f", {self.separator!r} between prompt and answer" if self.separator else "")


def check_use(keys: DataKeys, separator: str, uses: Sequence[RecordUse], option: str) -> None:
    """Raise UserError for a mapped key that no record has, and for a separator that none has a place for."""
    found = {key for use in uses for key, _ in use.keys}
    for key, known in keys:
        if key not in found:
            raise UserError(f"--data-keys {key}={known}: no record of {option} has the key `{key}`; correct it.")
    if separator and not any(use.separator for use in uses):
        raise UserError(
            f"--prompt-separator {separator!r} stands between a prompt and an answer that are texts, and no record of "
            f"{option} has them; leave it out."
        )
