"""Data files made on the spot, and the data set that a run would make of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft_megatron.config.data import DataKeys
from hft_megatron.data.chat import LossRule
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.examples import ExampleRules
from hft_megatron.data.files.sources import TRAIN_SPLIT, find_sources
from hft_megatron.data.loading import load_sft_dataset
from hft_megatron.data.records import RecordRules
from hft_megatron.data.tokenizer import Tokenizer


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Writes one row per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(
    words: Path | Sequence[object],
    tokenizer: Tokenizer,
    seq_length: int = 4096,
    long_examples: Any = "error",
    data_format: Any = None,
    ignore_keys: tuple[str, ...] = (),
    keys: DataKeys = (),
    joined: str = "",
    **loss: Any,
) -> SftDataset:
    """The data set of --train-data-path ``words``, or of one path; ``loss`` are fields of LossRule."""
    listed = [words] if isinstance(words, Path) else words
    return load_sft_dataset(
        find_sources("--train-data-path", [str(word) for word in listed], TRAIN_SPLIT),
        tokenizer,
        ExampleRules(
            seq_length=seq_length,
            long_examples=long_examples,
            loss=LossRule(**loss),
            records=RecordRules(
                data_format=data_format, data_keys=keys, prompt_separator=joined, ignore_keys=ignore_keys
            ),
        ),
    )


def trained_text(dataset: SftDataset, tokenizer: Tokenizer, index: int) -> str:
    """The text that the trained tokens add to the tokens before them; the last one must be the end token."""
    ids, mask = dataset.example(index)
    first = int(mask.argmax())
    assert mask[first:].all()
    assert ids[-1] == tokenizer.eos_id
    prompt = tokenizer.decode(ids[:first].tolist())
    whole = tokenizer.decode(ids[:-1].tolist())
    assert whole.startswith(prompt)
    return whole[len(prompt) :]


def trained_texts(dataset: SftDataset, tokenizer: Tokenizer, index: int, template: str) -> list[str]:
    """The texts that the tokens of each trained turn add to the text before them, without Llama 2's two spaces.

    Asserts that only whole turns are trained, each with the template's end token.
    """
    special = {token.id: token.content for token in tokenizer.facts.special_tokens}
    ends = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
    end = ends.get(template, special[tokenizer.eos_id])
    ids, mask = (array.tolist() for array in dataset.example(index))
    texts, start = [], None
    for position, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if not trained:
            assert start is None
            continue
        start = position if start is None else start
        if token in special:
            assert special[token] == end
            before, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:position])
            assert whole.startswith(before)
            text = whole[len(before) :]
            if template == "llama2":
                assert (text[:1], text[-1:]) == (" ", " ")
                text = text[1:-1]
            texts.append(text)
            start = None
    assert start is None
    return texts
