"""What the installed transformers makes of a tokenizer folder, next to what is trained on.

Its pipelines of one folder differ between versions; a difference is told, and the export is written so that there is
none.
"""

from pathlib import Path
from typing import Any

from hft_megatron.data.tokenizer import AnyTokenizer, Tokenizer
from hft_megatron.data.tokenizer_files import NAME_KEYS
from hft_megatron.data.tokenizer_probes import first_difference


class TransformersView:
    """transformers' tokenizer of a folder, or why there is none."""

    def __init__(self, folder: Path) -> None:
        import transformers  # here, because it costs seconds that --help shouldn't

        self.version = transformers.__version__
        self.loaded: Any = None
        self.reason = ""
        try:
            self.loaded = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # anything can be wrong with the files, and the Rust reader raises plain Exception
            self.reason = " ".join(str(error).split())[:200]

    @property
    def names(self) -> dict[str, str]:
        """Special tokens by their keys in NAME_KEYS, defaults of the folder's tokenizer class included.

        Others have keys of their own in some versions only.
        """
        if self.loaded is None:
            return {}
        return {key: str(token) for key, token in self.loaded.special_tokens_map.items() if key in NAME_KEYS}

    def compared(self, tokenizer: AnyTokenizer, file: str) -> AnyTokenizer:
        """``tokenizer``, with a line about the first difference; then an export writes its own files.

        ``file`` is where its ids are from.
        """
        difference = self.difference(tokenizer)
        if difference is None:
            return tokenizer
        note = (
            f"{tokenizer.facts.source}: the ids are those of its {file}, but transformers {difference}; an export "
            f"has tokenizer files made for the same ids, and says where it can't (--keep-source-tokenizer leaves the "
            f"source's)"
        )
        return tokenizer.with_facts(notes=(*tokenizer.facts.notes, note), exports_own_files=True)

    def difference(self, tokenizer: Tokenizer) -> str | None:
        """A clause about the first text that transformers makes other ids of, None where there is none."""
        if self.loaded is None:
            return f"{self.version} can't load the folder ({self.reason})"
        found = first_difference(
            tokenizer, lambda text, with_special: list(self.loaded.encode(text, add_special_tokens=with_special))
        )
        return None if found is None else f"{self.version} {found}"
