"""Preprocessed data are the examples of the files they were made of; what is damaged or of other rules is named.

Run: pytest tests/data/preprocessed/test_opening.py
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.data.batches import BatchShare, ExampleBatches, ShuffledBatches
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.order import PackedOrder, sample_stream
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, write_rows
from tests.support.peak_memory import PeakMemory
from tests.support.preprocessing import contents, conversations, make, make_without_tokens
from tests.support.tokenizers import make_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", conversations(60))


def batches_of(dataset: SftDataset, *, packed: bool) -> list[Any]:
    """The first steps of a run, as lists."""
    options = DataConfig(packing=packed, packing_window=16)
    order = sample_stream(dataset.order(5), dataset.lengths - 1, dataset.seq_length, options)
    share = BatchShare(
        micro_batch_size=2, global_batch_size=4, data_parallel_rank=1, data_parallel_size=2, length_multiple=1
    )
    batches = ShuffledBatches(
        batches=ExampleBatches(dataset=dataset, pad_id=0, share=share), order=order, packed=packed
    )
    steps = [batches.step(4 * number) for number in range(30)]
    return [
        {name: tensor.tolist() for name, tensor in micro_batch.items()}
        for step in steps
        for micro_batch in step.micro_batches
    ]


def test_keys_and_separator_make_the_examples_of_the_files_and_must_be_the_runs(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": f"{n}?", "answer": str(n)} for n in range(20)])
    rules: dict[str, Any] = {"keys": (("answer", "completion"), ("question", "prompt")), "joined": "\n"}
    facts = make(tmp_path / "made", rows, tokenizer, workers=2, **rules)
    plain, made = load(rows, tokenizer, **rules), load(tmp_path / "made", tokenizer, **rules)
    assert made.digest == plain.digest
    assert made.describe()[0].partition(" (")[2] == plain.describe()[0].partition(" (")[2]
    assert "`question` as `prompt`, '\\n' between prompt and answer" in facts.summary("made")
    for index in range(20):
        assert made.example(index)[0].tolist() == plain.example(index)[0].tolist()
    with pytest.raises(UserError, match=r"with --prompt-separator '\\n', but the run has ''; use the same value"):
        load(tmp_path / "made", tokenizer, **rules | {"joined": ""})
    with pytest.raises(UserError, match="with --data-keys answer=completion,question=prompt, but the run has unset"):
        load(tmp_path / "made", tokenizer, joined="\n")


def test_data_that_rules_of_records_change_nothing_of_are_mixed_with_files_that_need_them(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer
) -> None:
    make(tmp_path / "made", rows, tokenizer)
    raw = write_rows(tmp_path / "raw.jsonl", [{"question": f"{n}?", "answer": str(n)} for n in range(20)])
    rules: dict[str, Any] = {"keys": (("answer", "completion"), ("question", "prompt")), "joined": "\n"}
    mixed = load([tmp_path / "made", raw], tokenizer, **rules)
    assert mixed.digest == load([rows, raw], tokenizer, **rules).digest
    # More keys than those that the data have.
    make(tmp_path / "asked", raw, tokenizer, **rules)
    more = {**rules, "keys": (*rules["keys"], ("reply", "output"))}
    assert len(load(tmp_path / "asked", tokenizer, **more)) == 20


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "a", "completion": "b", "topic": "c"}, (("topic", "text"),)),
        ({"instruction": "a", "output": "b", "input": "c"}, (("input", "system"),)),
        ({"instruction": "a", "output": "b"}, (("output", "input"), ("answer", "output"))),
    ],
)
def test_keys_that_the_records_of_the_data_have_must_be_mapped_alike(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, str], keys: Any
) -> None:
    make(tmp_path / "made", write_rows(tmp_path / "rows.jsonl", [row] * 3), tokenizer)
    with pytest.raises(UserError, match="made was preprocessed with --data-keys unset, but the run has "):
        load(tmp_path / "made", tokenizer, keys=keys)


@pytest.mark.parametrize("long_examples", ["drop", "truncate", "split"])
def test_examples_batches_and_digest_are_those_of_the_files(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, long_examples: str
) -> None:
    facts = make(tmp_path / "made", rows, tokenizer, seq_length=100, long_examples=long_examples)
    assert facts.longest > 100
    plain = load(rows, tokenizer, 100, long_examples)
    made = load(tmp_path / "made", tokenizer, 100, long_examples)
    assert len(made) == len(plain) == facts.examples
    assert made.digest == plain.digest
    assert made.lengths.tolist() == plain.lengths.tolist()
    [(made_part, plain_part)] = zip(made.parts, plain.parts, strict=True)
    assert (made_part.counts, made_part.formats) == (plain_part.counts, plain_part.formats)
    for index in range(len(plain)):
        for one, other in zip(made.example(index), plain.example(index), strict=True):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist()
    for packed in (False, True):
        assert batches_of(made, packed=packed) == batches_of(plain, packed=packed)


def test_a_prefix_is_mixed_with_files_and_prefixes_like_the_file_it_was_made_of(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer
) -> None:
    others = write_rows(tmp_path / "others.jsonl", [{"prompt": "n", "completion": str(n)} for n in range(25)])
    for name, file in (("a", rows), ("b", others)):
        make(tmp_path / name, file, tokenizer)
    plain = load(["2", rows, "1", others], tokenizer)
    for words in (["2", tmp_path / "a", "1", others], ["2", tmp_path / "a", "1", tmp_path / "b"]):
        made = load(words, tokenizer)
        assert made.digest == plain.digest
        assert batches_of(made, packed=False) == batches_of(plain, packed=False)


def test_limits_that_no_document_reaches_make_no_difference(tmp_path: Path, rows: Path, tokenizer: Tokenizer) -> None:
    facts = make(tmp_path / "made", rows, tokenizer)
    for length in (facts.longest, 5000):
        for long_examples in ("error", "split"):
            assert len(load(tmp_path / "made", tokenizer, length, long_examples)) == 60


def test_bad_lines_that_were_passed_over_make_other_data(tmp_path: Path, rows: Path, tokenizer: Tokenizer) -> None:
    whole = load(rows, tokenizer).digest
    with rows.open("a") as file:
        file.write("{\n")
    make(tmp_path / "made", rows, tokenizer, skips_bad_lines=True)
    assert load(tmp_path / "made", tokenizer).digest != whole


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = Path(f"{prefix}{name}")
        path.write_bytes(path.read_bytes()[:size])

    return change


def flip(name: str, position: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = Path(f"{prefix}{name}")
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda prefix: Path(f"{prefix}{name}").unlink()


def from_other(*names: str) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        for name in names:
            Path(f"{prefix}{name}").write_bytes(Path(f"{prefix.parent}/other{name}").read_bytes())

    return change


DAMAGED = [
    (remove(".bin"), "made.bin is missing; copy it beside made.idx, or preprocess the data again."),
    (remove(".idx"), "made.idx is missing; copy it beside made.bin, or preprocess the data again."),
    (remove("_loss_mask.bin"), "made_loss_mask.bin is missing; copy it beside made_loss_mask.idx, or"),
    (remove("_boundaries.idx"), "made_boundaries.idx is missing; copy it beside made_boundaries.bin, or"),
    (remove("_preprocessed.json"), "made_preprocessed.json is missing, which records how .*made.bin was made; copy it"),
    (cut("_preprocessed.json", 50), "made_preprocessed.json cannot be read .*; copy it again, or preprocess the data"),
    (cut(".bin", -1), r"made.bin has \d+ bytes, but by made.idx it has \d+; copy both again, or preprocess the data"),
    (cut("_loss_mask.bin", 9), r"made_loss_mask.bin has 9 bytes, but by made_loss_mask.idx it has \d+; copy both"),
    (cut(".idx", 30), "made.idx is damaged or of another kind: it does not begin like an index of megatron-core;"),
    (cut(".idx", -8), r"made.idx is damaged .* it has \d+ bytes, but \d+ by the 60 documents in its header; copy"),
    (flip(".idx", 0), "made.idx is damaged or of another kind: it does not begin like an index"),
    (flip(".idx", 9), "made.idx is damaged or of another kind: it has version 0 and data type 8;"),
    (flip(".idx", 17), "made.idx is damaged or of another kind: it has version 1 and data type 9;"),
    (flip(".idx", 26), "made.idx is damaged .*: it has 60 sequences in 59 documents, not one in each;"),
    (flip(".idx", 34 + 4 * 20), "made.idx is damaged .*: lengths and positions contradict each other after document 0"),
    (flip(".idx", 34 + 240 + 8 * 20), "made.idx is damaged .*: lengths and positions contradict each other after"),
    (from_other("_loss_mask.bin", "_loss_mask.idx"), "made_loss_mask.idx does not belong to the files beside it: it "
     "has 59 documents instead of 60; copy all files of the prefix again, or"),
    (from_other(".bin", ".idx"), "made.idx does not belong to the files beside it: it has 59 documents instead of 60"),
    (flip("_boundaries.bin", 0), "made_boundaries.bin does not belong .* examples lie outside|has 60 examples"),
    (flip("_boundaries.bin", 7), "made_boundaries.bin does not belong to the files beside it: examples lie outside"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), DAMAGED[:-2] + DAMAGED[-1:])
def test_files_that_are_missing_damaged_or_mixed_up_are_named(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, change: Callable[[Path], None], sentence: str
) -> None:
    make(tmp_path / "made", rows, tokenizer)
    make(tmp_path / "other", write_rows(tmp_path / "other.jsonl", conversations(59)), tokenizer)
    change(tmp_path / "made")
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "made", tokenizer)


def test_an_id_that_the_tokenizer_lacks_is_named_when_it_is_read(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer
) -> None:
    make(tmp_path / "made", rows, tokenizer)
    tokens = np.fromfile(tmp_path / "made.bin", dtype=np.uint16)
    tokens[-1] = tokenizer.vocab_size
    tokens.tofile(tmp_path / "made.bin")
    dataset = load(tmp_path / "made", tokenizer)
    dataset.example(0)
    with pytest.raises(UserError, match=rf"made.bin is damaged: .* beyond the tokenizer's {tokenizer.vocab_size}; co"):
        dataset.example(len(dataset) - 1)


def test_every_flipped_bit_of_lengths_and_positions_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make(tmp_path / "made", write_rows(tmp_path / "rows.jsonl", conversations(3)), tokenizer)
    whole = contents(tmp_path / "made")[".idx"]
    for position in range(34 + 3 * 12):
        (tmp_path / "made.idx").write_bytes(whole)
        flip(".idx", position)(tmp_path / "made")
        with pytest.raises(UserError):
            load(tmp_path / "made", tokenizer)


OTHER_RULES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"loss_on": "all"}, "with --loss-on assistant, but the run has all; use the same value, or preprocess"),
    ({"train_on_eos": False}, {}, "with --train-on-eos false, but the run has true"),
    ({}, {"data_format": "alpaca"}, "with records of the format messages, but the run has --data-format alpaca"),
    ({"seq_length": 100, "long_examples": "split"}, {"seq_length": 80, "long_examples": "split"},
     "with --seq-length 100, but the run has 80"),
    ({"seq_length": 100, "long_examples": "split"}, {"seq_length": 100, "long_examples": "drop"},
     "with --long-examples split, but the run has drop"),
    ({}, {"seq_length": 80}, "with --seq-length unset, but the run has 80, and .* again with --seq-length 80"),
]  # fmt: skip


@pytest.mark.parametrize(("made_with", "run_with", "sentence"), OTHER_RULES)
def test_data_made_by_other_rules_than_the_runs_are_refused(
    tmp_path: Path,
    rows: Path,
    tokenizer: Tokenizer,
    made_with: dict[str, Any],
    run_with: dict[str, Any],
    sentence: str,
) -> None:
    make(tmp_path / "made", rows, tokenizer, **made_with)
    with pytest.raises(UserError, match=f"made was preprocessed {sentence}"):
        load(tmp_path / "made", tokenizer, **run_with)


def test_data_of_another_tokenizer_or_template_or_without_ends_are_refused(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer
) -> None:
    make(tmp_path / "made", rows, tokenizer)
    folder = make_byte_level(tmp_path / "tokenizer", special=["<|more|>"])
    with pytest.raises(UserError, match=r"made was preprocessed with a --tokenizer-model of digest \w{12}, but the"):
        load(tmp_path / "made", load_tokenizer(None, folder))
    same = make_byte_level(tmp_path / "same")
    with pytest.raises(
        UserError, match=r"made was preprocessed with a --chat-template with .*, but the run has one with"
    ):
        load(tmp_path / "made", load_tokenizer(None, same, "plain"))
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "a b"}])
    make(tmp_path / "texts", texts, tokenizer)
    with pytest.raises(UserError, match="texts was preprocessed without --append-eod, but fine-tuning ends every text"):
        load(tmp_path / "texts", tokenizer)
    make(tmp_path / "ended", texts, tokenizer, append_eod=True)
    assert load(tmp_path / "ended", tokenizer).digest == load(texts, tokenizer).digest


def test_unfinished_data_and_parts_of_data_are_no_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "made_unfinished").mkdir()
    with pytest.raises(UserError, match=r"made is not completely preprocessed; run `hft-megatron preprocess` again"):
        load(tmp_path / "made", tokenizer)
    (tmp_path / "made.idx").write_bytes(b"")
    with pytest.raises(UserError, match=r"made.idx is a part of preprocessed data; leave out .idx."):
        load(tmp_path / "made.idx", tokenizer)
    (tmp_path / "done_preprocessed.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(
        UserError, match=r"done_preprocessed.json has format 9, but this version .* preprocess the data again."
    ):
        load(tmp_path / "done", tokenizer)


SLOW = pytest.mark.slow(reason="ten million documents are written first")


@pytest.mark.parametrize(("documents", "seconds"), [(200_000, 10), pytest.param(10_000_000, 60, marks=SLOW)])
def test_ten_million_records_open_in_seconds_and_hold_an_index_only(
    tmp_path: Path, tokenizer: Tokenizer, documents: int, seconds: float
) -> None:
    """120 tokens on average: 2.4 GB of tokens and 1.2 GB of mask (holes on the disk) at ten million."""
    lengths = np.random.default_rng(0).integers(20, 220, documents).astype(np.int32)
    make_without_tokens(tmp_path / "made", lengths, tokenizer)
    tokens = int(lengths.sum(dtype=np.int64)) * 3
    begin = time.monotonic()
    with PeakMemory() as opening:
        dataset = load(tmp_path / "made", tokenizer, 2048)
    opened = time.monotonic() - begin
    assert len(dataset) == documents
    begin = time.monotonic()
    with PeakMemory() as first:
        batches_of_unpacked = dataset.order(1).sample(0)
        dataset.example(batches_of_unpacked[0])
    ordered = time.monotonic() - begin
    begin = time.monotonic()
    with PeakMemory() as packing:
        samples = sample_stream(dataset.order(1), dataset.lengths - 1, dataset.seq_length, DataConfig(packing=True))
        assert isinstance(samples, PackedOrder)
        packs = len(samples.packs(0))
    packed = time.monotonic() - begin
    told = (("opened", opened, opening), ("ordered", ordered, first), ("packed", packed, packing))
    phases = ", ".join(f"{name} in {took:.2f} s with {memory.bytes / 1e6:.0f} MB" for name, took, memory in told)
    print(f"{documents} documents: {phases}, of {tokens / 1e6:.0f} MB of tokens and mask")
    assert samples.fill(0) > 0.98
    assert packs == pytest.approx((lengths.sum(dtype=np.int64) - documents) / 2048, rel=0.02)
    assert opened + ordered + packed < seconds
    # 12 bytes an example, 16 while it is put together; 8 for an epoch's order and as many to draw it; as many again
    # for its packs; and what blocks of the work take, whatever the size.
    slack = 120e6
    assert opening.bytes < 24 * documents + slack
    assert first.bytes < 24 * documents + slack
    assert packing.bytes < 32 * documents + slack
    del dataset, samples
