"""Preprocessed data made on the spot: by the tool in this process, or without tokens, as large as a test wants."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hft_megatron.config.data import DataKeys
from hft_megatron.data.chat import LossRule
from hft_megatron.data.examples import NO_LIMIT, ExampleRules, SftCounts
from hft_megatron.data.files.sources import BOUNDARIES, LOSS_MASK, TRAIN_SPLIT, find_input
from hft_megatron.data.preprocessed.facts import Facts, Job
from hft_megatron.data.preprocessed.index_file import token_dtype, write_index
from hft_megatron.data.preprocessed.making import Preprocessing, preprocess
from hft_megatron.data.records import RecordRules
from hft_megatron.data.tokenizer import Tokenizer

ENDS = (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx", "_boundaries.bin", "_boundaries.idx", "_preprocessed.json")


def make(
    prefix: Path,
    files: Path | list[Path],
    tokenizer: Tokenizer,
    *,
    seq_length: int = NO_LIMIT,
    long_examples: Any = "error",
    data_format: Any = None,
    separator: str | None = None,
    ignore_keys: tuple[str, ...] = (),
    keys: DataKeys = (),
    joined: str = "",
    **options: Any,
) -> Facts:
    """Preprocess ``files``; ``options`` are fields of Preprocessing or of LossRule."""
    words = [files] if isinstance(files, Path) else files
    loss = {name: options.pop(name) for name in ("loss_on", "train_on_eos") if name in options}
    rules = ExampleRules(
        seq_length=seq_length,
        long_examples=long_examples,
        loss=LossRule(**loss),
        records=RecordRules(data_format=data_format, data_keys=keys, prompt_separator=joined, ignore_keys=ignore_keys),
    )
    asked = Preprocessing(
        files=find_input("--input", [str(word) for word in words], TRAIN_SPLIT),
        prefix=str(prefix),
        rules=rules,
        append_eod=False,
        document_separator=separator,
        skips_bad_lines=False,
        workers=1,
        log_interval=10**9,
    )
    return preprocess(replace(asked, **options), tokenizer, lambda _: None)


def contents(prefix: Path) -> dict[str, bytes]:
    """All files of a prefix, by the part of their names after it."""
    found = {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}*")}
    assert set(ENDS) <= found.keys()
    return found


def make_without_tokens(prefix: Path, lengths: np.ndarray[Any, Any], tokenizer: Tokenizer) -> None:
    """Data with documents of these ``lengths`` (int32), none of them trained: their .bin are holes in the disk."""
    count, total = len(lengths), int(lengths.sum(dtype=np.int64))
    tokens = token_dtype(tokenizer.vocab_size)
    bounds = np.zeros((count, 2), dtype=np.int32)
    bounds[:, 1] = lengths
    bounds.tofile(f"{prefix}{BOUNDARIES}.bin")
    for name, dtype, sizes in (
        ("", tokens, lengths),
        (LOSS_MASK, np.dtype(np.uint8), lengths),
        (BOUNDARIES, np.dtype(np.int32), np.full(count, 2, dtype=np.int32)),
    ):
        if name != BOUNDARIES:
            with Path(f"{prefix}{name}.bin").open("wb") as file:
                file.truncate(total * dtype.itemsize)
        sizes.tofile(f"{prefix}.lengths")
        write_index(Path(f"{prefix}{name}.idx"), dtype, Path(f"{prefix}.lengths"))
    rules = ExampleRules(seq_length=NO_LIMIT)
    Facts(
        job=Job.of(("0" * 64,), tokenizer.facts, rules, append_eod=False, document_separator=None),
        documents=count,
        examples=count,
        longest=int(lengths.max()) - 1,
        bad_lines=0,
        formats=("messages",),
        counts=SftCounts(read=count, tokens=total),
    ).write(str(prefix))


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, some with two answers."""
    rows = []
    for number in range(count):
        answer = f"{3 * number} {'bridge ' * (number % 40)}"
        turns = [("user", f"Say {number}{'!' * (number % 7)}"), ("assistant", answer)]
        turns += turns if number % 5 == 0 else []
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def dumped(rows: list[Any]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
