"""Corpora that cannot be trained on: one sentence each. Run: pytest tests/methods/pretrain/test_files.py"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hft_megatron.errors import UserError
from hft_megatron.methods.pretrain import files
from hft_megatron.methods.pretrain.files import read_corpus_files
from tests.support.corpora import VOCAB_SIZE, random_documents, write_corpus

DOCUMENTS = random_documents(20)
TYPES = [np.uint16, np.int32, np.int64]


def patched(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_length_is_read_and_equal_files_have_equal_digests(dtype: type[np.number], tmp_path: Path) -> None:
    first, second = (read_corpus_files(write_corpus(tmp_path / name, DOCUMENTS, dtype), VOCAB_SIZE) for name in "ab")
    assert first.sequence_lengths.tolist() == [len(document) for document in DOCUMENTS]
    assert first.digest == second.digest


def test_one_token_more_or_less_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 64)  # several blocks
    digests = set()
    for place in (None, 0, 100, -1):
        documents = [list(document) for document in DOCUMENTS]
        if place is not None:
            flat = [(row, column) for row, document in enumerate(documents) for column in range(len(document))]
            row, column = flat[place]
            documents[row][column] ^= 1
        digests.add(read_corpus_files(write_corpus(tmp_path / "a", documents), VOCAB_SIZE).digest)
    moved = [[*DOCUMENTS[0], DOCUMENTS[1][0]], DOCUMENTS[1][1:], *DOCUMENTS[2:]]
    digests.add(read_corpus_files(write_corpus(tmp_path / "a", moved), VOCAB_SIZE).digest)
    assert len(digests) == 5


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda p: p.with_suffix(".idx").unlink(), "corpus.idx is missing, and corpus.bin is there; copy both"),
    "no tokens": (
        lambda p: p.with_suffix(".bin").unlink(),
        "corpus.bin is missing, and corpus.idx is there; copy both",
    ),
    "neither": (
        lambda p: [p.with_suffix(end).unlink() for end in (".idx", ".bin")],
        "corpus.bin; make them with tools/preprocess_data.py, and give their path without .idx and .bin",
    ),
    "tokens cut short": (lambda p: cut(p.with_suffix(".bin"), 2), "bytes, but corpus.idx describes .*: one of them"),
    "tokens of another corpus": (
        lambda p: p.with_suffix(".bin").write_bytes(p.with_suffix(".bin").read_bytes() + b"\1\0"),
        "bytes, but corpus.idx describes",
    ),
    "index cut short": (lambda p: cut(p.with_suffix(".idx"), 1), "corpus.idx is damaged"),
    "index cut within its header": (lambda p: cut(p.with_suffix(".idx"), 34 + 20 * 12 + 21 * 8 - 20), "is damaged"),
    "empty index": (lambda p: p.with_suffix(".idx").write_bytes(b""), "corpus.idx is damaged"),
    "another file": (lambda p: patched(p.with_suffix(".idx"), 0, b"PK"), "corpus.idx is damaged or not an index"),
    "another version": (lambda p: patched(p.with_suffix(".idx"), 9, b"\2"), "corpus.idx is damaged"),
    "no such type": (lambda p: patched(p.with_suffix(".idx"), 17, b"\x63"), "corpus.idx is damaged"),
    "fractions": (lambda p: patched(p.with_suffix(".idx"), 17, b"\7"), "corpus.idx is damaged"),
    "more sequences than lengths": (lambda p: patched(p.with_suffix(".idx"), 18, b"\x15"), "corpus.idx is damaged"),
    "a huge number of sequences": (lambda p: patched(p.with_suffix(".idx"), 18, b"\xff" * 8), "corpus.idx is damaged"),
    "a negative length": (lambda p: patched(p.with_suffix(".idx"), 34, b"\xff" * 4), "corpus.idx is damaged"),
    "a length that is off": (lambda p: patched(p.with_suffix(".idx"), 34, b"\x01\0\0\0"), "corpus.idx is damaged"),
    "an offset that is off": (lambda p: patched(p.with_suffix(".idx"), 34 + 20 * 4 + 8, b"\1"), "is damaged"),
    "documents that end elsewhere": (lambda p: patched(p.with_suffix(".idx"), 34 + 20 * 12 + 20 * 8, b"\1"), "damaged"),
    "documents that go back": (lambda p: patched(p.with_suffix(".idx"), 34 + 20 * 12 + 5 * 8, b"\x09"), "damaged"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_files_that_are_missing_cut_or_damaged_are_named(case: str, tmp_path: Path) -> None:
    break_it, sentence = MISTAKES[case]
    prefix = write_corpus(tmp_path / "corpus", DOCUMENTS)
    break_it(tmp_path / "corpus")
    with pytest.raises(UserError, match=sentence):
        read_corpus_files(prefix, VOCAB_SIZE)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_the_name_of_one_file_is_answered_with_the_prefix(suffix: str, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(UserError, match=f"corpus{suffix} names one of two files; give {prefix}, which names both"):
        read_corpus_files(prefix + suffix, VOCAB_SIZE)


def test_an_index_without_sequences_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is damaged"):
        read_corpus_files(write_corpus(tmp_path / "corpus", []), VOCAB_SIZE)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", [0, 77])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(
    dtype: type[np.number], place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 64)  # several blocks
    document = [5] * 100
    document[place] = VOCAB_SIZE
    prefix = write_corpus(tmp_path / "corpus", [document], dtype)
    with pytest.raises(UserError, match=rf"holds the id 335 \(token {place}\), but the model's vocabulary has 335"):
        read_corpus_files(prefix, VOCAB_SIZE)
    read_corpus_files(prefix, VOCAB_SIZE + 1)


def test_a_negative_id_is_named(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", [[5, 6, -1]], np.int32)
    with pytest.raises(UserError, match=r"holds the id -1 \(token 2\)"):
        read_corpus_files(prefix, VOCAB_SIZE)


def test_a_folder_that_cant_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus(tmp_path / "corpus", DOCUMENTS)

    def fail(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "fromfile", fail)
    with pytest.raises(UserError, match=r"corpus cannot be read: Permission denied\."):
        read_corpus_files(prefix, VOCAB_SIZE)
