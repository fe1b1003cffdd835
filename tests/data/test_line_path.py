"""How many modules a line of a file passes on its way to a micro-batch. Run: pytest tests/data/test_line_path.py"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from hft_megatron.config.loading import options_of
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.data.batches import BatchShare
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.methods.registry import METHODS
from tests.support.data_files import write_rows
from tests.support.tokenizers import make_byte_level

MOST_MODULES = 12
SHAPE = ModelShape(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, kv_channels=8,
    vocab_size=512, max_position_embeddings=64,
)  # fmt: skip
ONE_BY_ONE = BatchShare(
    micro_batch_size=1, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1, length_multiple=1
)


def row_of(layout: str, number: int) -> dict[str, Any]:
    prompt, answer = f"Add one to {number}.", f"It is {number + 1}."
    if layout == "messages":
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    return {"prompt": prompt, "completion": answer}


def calls(folder: Path, layout: str, records: int) -> Counter[str]:
    """Of every module of ours, while a file of so many records becomes the steps of an epoch."""
    file = write_rows(folder / f"{records}.jsonl", [row_of(layout, number) for number in range(records)])
    config = options_of(
        RunConfig, {"train_data_path": [str(file)], "seq_length": 64, "data_cache_path": str(folder / "cache")}
    )
    tokenizer, method = load_tokenizer(None, folder / "tokenizer"), METHODS["sft"]
    seen: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen[frame.f_globals.get("__name__", "")] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        steps = method.read_data(config, tokenizer, SHAPE, 1).training(ONE_BY_ONE)
        for consumed in range(records):
            steps.step(consumed)
    finally:
        sys.setprofile(before)
    return Counter({name: number for name, number in seen.items() if name.startswith("hft_megatron.")})


@pytest.mark.parametrize("layout", ["messages", "prompt and completion"])
def test_a_line_of_a_file_passes_at_most_twelve_modules_to_become_a_micro_batch(tmp_path: Path, layout: str) -> None:
    make_byte_level(tmp_path / "tokenizer")
    few, many = (calls(tmp_path, layout, records) for records in (8, 32))
    passed = sorted(name for name in many if many[name] > few[name])
    assert {"hft_megatron.data.files.rows", "hft_megatron.data.batches"} <= set(passed)
    assert len(passed) <= MOST_MODULES, "\n".join(passed)
