"""A corpus as samples: their order, and what is too short. Run: pytest tests/methods/pretrain/test_datasets.py"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from hft_megatron.config.data import data_sources
from hft_megatron.errors import UserError
from hft_megatron.methods.pretrain.datasets import (
    Corpus,
    CorpusSources,
    SampleCounts,
    SampleRules,
    Samples,
    mock_corpus,
    read_corpus,
)
from tests.support.corpora import VOCAB_SIZE, random_documents, write_corpus

TOKENIZER: Any = SimpleNamespace(vocab_size=VOCAB_SIZE - 1, eos_id=330)
LENGTH = 16
RULES = SampleRules(seed=7)


def read(
    *words: object,
    split: str = "90,10",
    train: int = 24,
    valid: int = 0,
    length: int = LENGTH,
    rules: SampleRules = RULES,
) -> Corpus:
    counts = SampleCounts(seq_length=length, train=train, valid=valid)
    sources = CorpusSources(train=data_sources("--data-path", [str(word) for word in words]), split=split)
    return read_corpus(sources, TOKENIZER, counts, rules, vocab_size=VOCAB_SIZE)


def read_apart(train: Sequence[object], valid: Sequence[object] = (), *, validated: int = 0) -> Corpus:
    """Of --train-data-path and --valid-data-path."""
    counts = SampleCounts(seq_length=LENGTH, train=24, valid=validated)
    first, second = (data_sources("", [str(word) for word in words]) for words in (train, valid))
    return read_corpus(CorpusSources(train=first, valid=second), TOKENIZER, counts, RULES, vocab_size=VOCAB_SIZE)


def tokens_of(samples: Samples, count: int) -> list[list[int]]:
    return [samples[index]["tokens"].tolist() for index in range(count)]


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    return write_corpus(tmp_path / "a", random_documents(100)), write_corpus(tmp_path / "b", random_documents(40, 1))


def test_one_pass_trains_every_position_once_but_for_the_rest_of_a_sample(corpora: tuple[str, str]) -> None:
    documents = random_documents(100)[:90]
    total = sum(map(len, documents))
    corpus = read(corpora[0], train=(total - 1) // LENGTH)
    assert len(corpus.train) == (total - 1) // LENGTH
    seen: Counter[int] = Counter()
    for sample in (corpus.train[index] for index in range(len(corpus.train))):
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH
        seen.update(sample["labels"].tolist())
    whole = Counter(token for document in documents for token in document)
    assert not seen - whole
    assert (whole - seen).total() == total - LENGTH * len(corpus.train) <= LENGTH


def test_what_follows_an_end_token_is_left_out_of_the_loss_where_that_is_asked_for(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[number] * 6 + [330] for number in range(40)])
    rules = SampleRules(seed=7, eod_mask_loss=True, needs_ends="--eod-mask-loss")
    corpus = read(prefix, split="1", rules=rules)
    masks = [(sample["tokens"] == 330, sample["loss_mask"]) for sample in (corpus.train[i] for i in range(17))]
    assert sum(int(is_end.sum()) for is_end, _ in masks) > 30
    for is_end, mask in masks:
        assert mask.tolist() == (~is_end).float().tolist()
    assert read(prefix, split="1").order_digest == corpus.order_digest


def test_the_parts_of_a_split_share_no_document(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "a", [[number] * 20 for number in range(100)])
    corpus = read(prefix, split="80,15,5", train=100, valid=40)
    assert corpus.valid is not None
    assert set(np.unique(tokens_of(corpus.train, 100))) == set(range(80))
    assert set(np.unique(tokens_of(corpus.valid, 40))) <= set(range(80, 95))


def test_sources_of_their_own_for_each_part_are_those_of_the_part_alone(corpora: tuple[str, str]) -> None:
    first, second = corpora
    for words in ([first], [0.3, first, 0.7, second], [first, second]):
        apart, whole = read_apart(words), read(*words, split="1")
        assert tokens_of(apart.train, 24) == tokens_of(whole.train, 24)
        assert (apart.digest, apart.order_digest) == (whole.digest, whole.order_digest)
        assert apart.valid is None
    both = read_apart([first], [0.5, first, 0.5, second], validated=9)
    assert both.valid is not None
    assert (both.digest, both.order_digest) == (read(first, split="1").digest, read(first, split="1").order_digest)
    assert len(tokens_of(both.valid, 9)) == 9
    assert both.lines[0] == f"{first}: {sum(map(len, random_documents(100))):,} tokens in 100 documents for training"
    assert both.lines[1].startswith(f"{first} (weight 0.5): ")
    assert both.lines[1].endswith("100 documents for validation")


def test_a_mistake_in_sources_of_their_own_names_their_option(corpora: tuple[str, str], tmp_path: Path) -> None:
    short = write_corpus(tmp_path / "short", [[5] * 8, [6] * 8])
    first, second = corpora
    for train, valid, sentence in (
        ([short], [], "--train-data-path .*short: it has 16 tokens in 2 documents for training, but one sample needs"),
        ([first], [short], "--valid-data-path .*short: it has 16 tokens in 2 documents for validation"),
        ([first], ["absent"], "--valid-data-path absent: there are no files absent.idx"),
        ([first], [second, second], "--valid-data-path: one pass over all .* --eval-iters asks for 1000"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_apart(train, valid, validated=1000 if valid else 0)


def entries_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_indices_are_kept_by_what_they_are_of_and_made_anew_where_they_were_damaged(
    corpora: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    keeping = SampleRules(seed=7, kept_in=folder)
    words = (0.3, corpora[0], 0.7, corpora[1])
    in_memory = read(*words, valid=9)
    first, again = (read(*words, valid=9, rules=keeping) for _ in range(2))
    for found in (first, again):
        assert found.valid is not None
        assert in_memory.valid is not None
        assert tokens_of(found.train, 24) == tokens_of(in_memory.train, 24)
        assert tokens_of(found.valid, 9) == tokens_of(in_memory.valid, 9)
        assert (found.digest, found.order_digest) == (in_memory.digest, in_memory.order_digest)
        datasets: Any = found.train
        assert all(isinstance(one.sample_index, np.memmap) for one in datasets.datasets)
    assert first.lines[-1] == f"indices of samples are kept in {folder}"
    made = entries_of(folder)
    assert len(made) == 4, "of two sources and two parts"
    built, build = list[str](), GPTDataset._build_document_sample_shuffle_indices

    def counted(self: Any) -> Any:
        built.append(self.dataset_path)
        return build(self)

    monkeypatch.setattr(GPTDataset, "_build_document_sample_shuffle_indices", counted)
    read(*words, valid=9, rules=keeping)
    assert built == []
    (made[0] / "shuffle_index.npy").write_bytes((made[0] / "shuffle_index.npy").read_bytes()[:-4])
    read(*words, valid=9, rules=keeping)
    assert len(built) == 1
    write_corpus(Path(corpora[0]), random_documents(100, seed=5))
    other = read(*words, valid=9, rules=keeping)
    assert len(built) == 3, "the same path, and other documents"
    assert tokens_of(other.train, 24) == tokens_of(read(*words, valid=9).train, 24)
    assert len(entries_of(folder)) == 6
    read(*words, valid=9, rules=SampleRules(seed=8, kept_in=folder))
    assert len(entries_of(folder)) == 10


def test_shares_of_a_blend_are_its_weights(tmp_path: Path) -> None:
    for name, token in (("a", 5), ("b", 6)):
        write_corpus(tmp_path / name, [[token] * 33] * 30)
    corpus = read(0.25, tmp_path / "a", 0.75, tmp_path / "b", split="1", train=400)
    counts = Counter(sample[0] for sample in tokens_of(corpus.train, 400))
    assert counts == {5: 100, 6: 300}


def test_without_weights_sources_are_gone_through_once(corpora: tuple[str, str]) -> None:
    one_pass = sum(len(read(path).train) for path in corpora)
    assert len(read(*corpora, train=one_pass).train) == one_pass
    with pytest.raises(UserError, match=f"one pass over all sources is {one_pass} samples of 16 tokens, and --train-i"):
        read(*corpora, train=one_pass + 1)
    with pytest.raises(UserError, match="and --eval-iters asks for 1000; write a weight before each source"):
        read(*corpora, train=10, valid=1000)


def test_a_weight_for_one_source_changes_nothing(corpora: tuple[str, str]) -> None:
    weighted, plain = read(0.4, corpora[0]), read(corpora[0])
    assert (weighted.digest, weighted.order_digest) == (plain.digest, plain.order_digest)


def test_the_order_is_a_function_of_seed_and_data_and_longer_within_a_pass(corpora: tuple[str, str]) -> None:
    first, again, longer = (read(corpora[0], train=train) for train in (24, 24, 100))
    assert tokens_of(first.train, 24) == tokens_of(again.train, 24) == tokens_of(longer.train, 24)
    assert first.order_digest == again.order_digest == longer.order_digest
    assert read(corpora[0], train=1000).order_digest != first.order_digest
    assert read(corpora[1]).order_digest != first.order_digest
    other = read(corpora[0], rules=SampleRules(seed=8))
    assert other.order_digest != first.order_digest
    assert other.digest == first.digest


def test_corpora_of_any_size_give_samples_or_one_sentence(tmp_path: Path) -> None:
    """megatron-core's assertions and its endless count of passes over nothing are never reached."""
    rng = np.random.default_rng(0)
    orders: dict[str, list[list[int]]] = {}
    outcomes: Counter[str] = Counter()
    for case in range(150):
        prefixes = []
        for name in "abc"[: rng.integers(1, 4)]:
            documents = random_documents(int(rng.integers(1, 12)), seed=int(rng.integers(4)))
            prefixes.append(write_corpus(tmp_path / f"{case}{name}", documents))
        weighted = [word for prefix in prefixes for word in (float(rng.choice([0.1, 1.0, 5.0])), prefix)]
        words = weighted if rng.random() < 0.6 else prefixes
        train, length = int(rng.choice([1, 7, 60, 400])), int(rng.choice([1, 8, 64]))
        try:
            corpus = read(*words, split="70,30", train=train, valid=int(rng.choice([0, 9])), length=length)
        except UserError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        order = tokens_of(corpus.train, train)
        known = orders.setdefault(corpus.digest + corpus.order_digest + str(length), order)
        shorter = min(len(known), len(order))
        assert known[:shorter] == order[:shorter]
    assert outcomes["read"] > 40
    assert outcomes["refused"] > 20


def test_a_part_that_holds_no_sample_is_named(tmp_path: Path) -> None:
    short = write_corpus(tmp_path / "short", [[5] * 8, [6] * 8, [7] * 8])
    for words, split, valid, sentence in (
        ([short], "1,0", 0, "--split 1,0 leaves 24 tokens in 3 documents for training, but one sample needs 33"),
        ([short], "1,99", 0, "leaves 0 tokens in 0 documents for training"),
        ([short, short], "1,0", 0, "short: --split 1,0 leaves 24 tokens"),
        ([write_corpus(tmp_path / "a", [[5] * 50] * 4)], "99,1", 1, "leaves 0 tokens in 0 documents for validation"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(*words, split=split, train=1, valid=valid, length=32)


def test_more_sources_than_samples_are_refused(tmp_path: Path) -> None:
    """Each source gets a sample at least, and the largest would have to keep up with all of them."""
    large = write_corpus(tmp_path / "large", [[5] * 40])
    small = [write_corpus(tmp_path / str(number), [[6] * 40]) for number in range(60)]
    with pytest.raises(UserError, match="--data-path: 61 sources are too many for 4 samples"):
        read(100, large, *(word for path in small for word in (1, path)), split="1", train=4)


def test_a_part_of_exactly_one_sample_is_enough(tmp_path: Path) -> None:
    corpus = read(write_corpus(tmp_path / "a", [list(range(33))]), split="1", train=1, length=32)
    assert tokens_of(corpus.train, 1) == [list(range(32))]


def test_nothing_is_written_next_to_the_data(corpora: tuple[str, str], tmp_path: Path) -> None:
    read(0.5, corpora[0], 0.5, corpora[1], valid=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_mock_data_counts_and_is_always_the_same() -> None:
    counts = SampleCounts(seq_length=LENGTH, train=24, valid=8)
    first, again = (mock_corpus(TOKENIZER, counts, RULES) for _ in range(2))
    steps = {tuple(np.diff(sample).tolist()) for sample in tokens_of(first.train, 24)}
    assert (1,) * (LENGTH - 1) in steps
    assert (first.order_digest, first.digest) == (again.order_digest, again.digest)
    assert first.valid is not None
    assert tokens_of(first.valid, 8) == tokens_of(again.valid or first.train, 8)
    assert np.max(tokens_of(first.train, 24)) < VOCAB_SIZE


def test_an_engine_without_its_compiled_part_is_named(
    corpora: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(UserError, match=r"cannot build samples .*; install its wheel"):
        read(corpora[0])
