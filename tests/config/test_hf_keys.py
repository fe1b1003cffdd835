"""Every key of config.json is used, harmless, refused or named in the log, as the table in config/hf_keys.py says.

Run: pytest tests/config/test_hf_keys.py
docs/models.md shows the table; ``python -m tests.config.test_hf_keys`` prints what must stand there.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.hf_keys import HF_KEYS, QUANTIZED, HfKey, note_unknown_keys, unknown_keys
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError

DOCUMENTATION = Path(__file__).parents[2] / "docs/models.md"
TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
REFUSED = [(row, name) for row in HF_KEYS if row.treatment == "refused" for name in row.names]
HARMLESS = [name for row in HF_KEYS if row.treatment == "harmless" for name in row.names]


def shown_table() -> str:
    """The table as Markdown."""
    lines = ["| keys | what it is | here |", "|---|---|---|"]
    for row in HF_KEYS:
        lines.append(f"| {', '.join(f'`{name}`' for name in row.names)} | {row.meaning} | {_treatment(row)} |")
    return "\n".join(lines)


def _treatment(row: HfKey) -> str:
    if row.treatment != "refused":
        return row.treatment
    return f"refused, unless it is {' or '.join(f'`{json.dumps(value)}`' for value in row.neutral)}"


def test_the_documentation_shows_the_table() -> None:
    assert f"\n{shown_table()}\n" in DOCUMENTATION.read_text(encoding="utf-8")


def test_a_key_stands_in_one_row_and_only_refused_rows_have_values() -> None:
    counts = Counter(name for row in HF_KEYS for name in row.names)
    assert [name for name, count in counts.items() if count > 1] == []
    assert [row.names for row in HF_KEYS if bool(row.neutral) != (row.treatment == "refused")] == []


class Read(dict[str, Any]):
    """A config that records which of its keys are asked for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.keys_read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)


def test_the_used_and_refused_keys_are_those_that_are_read() -> None:
    read = set()
    for scaling in (LLAMA3, None):
        config = Read({**TINY, "rope_scaling": scaling})
        ModelShape.from_hf_config(config, "config.json")
        read |= config.keys_read
    elsewhere = {"bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"}  # by tokenizer and export
    decide = {name for row in HF_KEYS if row.treatment != "harmless" for name in row.names}
    assert read == decide - elsewhere


@pytest.mark.parametrize(("row", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_a_refused_key_is_accepted_with_its_values_and_refused_with_any_other(row: HfKey, name: str) -> None:
    plain = ModelShape.from_hf_config(TINY, "config.json")
    for value in row.neutral:
        assert ModelShape.from_hf_config({**TINY, name: value}, "config.json") == plain
    for value in (7, "other", [3], {"a": 1}, *{True, False} - set(row.neutral) - {bool(v) for v in row.neutral if v}):
        said = rf"{name} = .* is not supported \({re.escape(row.meaning)}\); only {name} = "
        if name in QUANTIZED:
            said = rf"a quantized model is not supported \({name}\); use a copy whose weights are not quantized\."
        with pytest.raises(UserError, match=rf"^config\.json: {said}"):
            ModelShape.from_hf_config({**TINY, name: value}, "config.json")


def test_a_harmless_key_changes_nothing_and_is_not_named() -> None:
    assert len(HARMLESS) > 50
    config = {**TINY, **dict.fromkeys(HARMLESS, 2)}
    assert ModelShape.from_hf_config(config, "config.json") == ModelShape.from_hf_config(TINY, "config.json")
    assert note_unknown_keys(config, "config.json") == []


def test_unknown_keys_are_one_line_and_null_ones_are_absent() -> None:
    [line] = note_unknown_keys({**TINY, "z_scale": 2, "a_switch": False, "nothing": None}, "DIR/config.json")
    assert line.startswith("DIR/config.json: unknown keys are ignored: a_switch, z_scale (")


def test_all_keys_that_transformers_itself_writes_are_known() -> None:
    from transformers import LlamaConfig, MistralConfig

    for config in (LlamaConfig(), MistralConfig()):
        written = json.loads(config.to_json_string(use_diff=False))
        assert unknown_keys(written) == []
        assert "pad_token_id" in written, "all keys are written, not only those that differ from the default"


if __name__ == "__main__":
    print(shown_table())
