"""The bytes depend on input and options alone: not on workers, and not on how often the work was killed.

Run: pytest tests/data/preprocessed/test_making.py
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hft_megatron.data.preprocessed import index_file, making, worker
from hft_megatron.data.preprocessed.output import Output
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import RunFailed, Stopped, UserError
from tests.support.data_files import load, write_rows
from tests.support.peak_memory import PeakMemory
from tests.support.preprocessing import contents, conversations, dumped, make
from tests.support.tokenizers import make_byte_level, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "CHUNK_ROWS", 7)
    monkeypatch.setattr(making, "RECORD_SECONDS", 0.0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", conversations(60))


def test_megatron_core_reads_the_documents_and_writes_the_same_files(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    make(tmp_path / "out", rows, tokenizer)
    plain = load(rows, tokenizer)
    for companion, dtype in (("", DType.optimal_dtype(tokenizer.vocab_size)), ("_loss_mask", np.uint8)):
        prefix = f"{tmp_path}/out{companion}"
        read = IndexedDataset(prefix)
        assert read.index.dtype is dtype
        assert read.document_indices.tolist() == list(range(61))
        builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=dtype)
        for number in range(60):
            expected = plain.example(number)[bool(companion)]
            assert read[number].tolist() == expected.tolist()
            builder.add_document(expected.astype(np.int32), [len(expected)])
        builder.finalize(str(tmp_path / "other.idx"))
        for end in (".bin", ".idx"):
            assert (tmp_path / f"other{end}").read_bytes() == Path(prefix + end).read_bytes()
    boundaries = IndexedDataset(f"{tmp_path}/out_boundaries")
    assert [boundaries[number].tolist() for number in range(60)] == [
        [0, len(plain.example(number)[0])] for number in range(60)
    ]


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, workers: int
) -> None:
    for name, number in (("one", 1), ("many", workers)):
        make(tmp_path / name, [rows, rows], tokenizer, workers=number, seq_length=40, long_examples="split")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("chunk_rows", [1, 23, 1000])
def test_a_document_does_not_depend_on_its_chunk(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    make(tmp_path / "one", rows, tokenizer)
    monkeypatch.setattr(index_file, "CHUNK_ROWS", chunk_rows)
    make(tmp_path / "other", rows, tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, rows: Path, tokenizer: Tokenizer, kind: str) -> None:
    make(tmp_path / "plain", rows, tokenizer)
    other = tmp_path / f"other.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(conversations(60)), other)
    elif kind == "json":
        other.write_text(json.dumps(conversations(60)))
    else:
        text = dumped(conversations(60)).encode()
        other.write_bytes(gzip.compress(text) if kind.endswith("gz") else b"\xef\xbb\xbf\n" + text)
    make(tmp_path / "made", other, tokenizer)
    plain, made = contents(tmp_path / "plain"), contents(tmp_path / "made")
    assert {name: made[name] for name in made if "json" not in name} == {
        name: plain[name] for name in plain if "json" not in name
    }


def kill_after(monkeypatch: pytest.MonkeyPatch, chunks_done: int, part: int) -> None:
    """Dies in the middle of writing a chunk: ``part`` of its arrays are on the disk, and the journal knows of none."""
    add = Output.add

    def dying(self: Output, made: Any) -> None:
        if self.progress.chunks == chunks_done:
            for name in list(self._files)[1 : 1 + part]:
                self._files[name].write(b"\1" * 50)
                self._files[name].flush()
            os._exit(9)
        add(self, made)

    monkeypatch.setattr(Output, "add", dying)


@pytest.mark.parametrize("skips", [False, True])
def test_work_that_was_killed_again_and_again_resumes_to_the_same_bytes(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, skips: bool
) -> None:
    if skips:
        with rows.open("a") as file:
            file.write("{}\n" * 30)
    options: dict[str, Any] = {"skips_bad_lines": skips, "workers": 2}
    make(tmp_path / "whole", rows, tokenizer, **options)
    for kills, (done, part) in enumerate([(0, 0), (1, 2), (1, 6), (4, 3), (8, 1)]):
        child = os.fork()
        if child == 0:
            kill_after(monkeypatch, done, part)
            make(tmp_path / "killed", rows, tokenizer, **options)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, kills
    make(tmp_path / "killed", rows, tokenizer, **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_kill_among_the_last_renames_leaves_work_that_is_finished_by_the_same_command(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", rows, tokenizer)
    rename = Path.replace
    for renames in range(1, 12):
        count = iter(range(renames))

        def dying(self: Path, target: Any, count: Any = count) -> Path:
            if self.parent.name == "killed_unfinished" and next(count, None) is None:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            try:
                make(tmp_path / "killed", rows, tokenizer)
            except KeyboardInterrupt:
                continue
        break
    assert renames > 5
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_signal_stops_between_chunks_and_the_work_resumes(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", rows, tokenizer)
    add = Output.add

    def signalled(self: Output, made: Any) -> None:
        add(self, made)
        if self.progress.chunks == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", signalled)
        with pytest.raises(Stopped, match=r"^stopped by SIGTERM after 21 documents; run the same command to resume"):
            make(tmp_path / "stopped", rows, tokenizer, workers=2)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(UserError, match=r"this one has --loss-on all instead of assistant; choose another prefix, or"):
        make(tmp_path / "stopped", rows, tokenizer, loss_on="all")
    make(tmp_path / "stopped", rows, tokenizer)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_ends_the_work_with_a_sentence_and_it_resumes(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", rows, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(worker.DocumentMaker, "documents", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RunFailed, match="a worker was killed after 0 documents, perhaps for lack of memory"):
            make(tmp_path / "killed", rows, tokenizer)
    make(tmp_path / "killed", rows, tokenizer)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("part", [0, 3])
def test_a_full_disk_is_one_sentence_and_the_work_resumes_when_there_is_room(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    make(tmp_path / "whole", rows, tokenizer)
    add = Output.add

    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    def filling(self: Output, made: Any) -> None:
        if self.progress.chunks == 4:
            name = list(self.progress.sizes)[part]
            self._files[name], kept = Full(), self._files[name]  # type: ignore[assignment]
            try:
                add(self, made)
            finally:
                self._files[name] = kept
        add(self, made)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", filling)
        with pytest.raises(
            UserError, match=r"full cannot be written to \(No space left on device\); free some space, and run the"
        ):
            make(tmp_path / "full", rows, tokenizer)
    make(tmp_path / "full", rows, tokenizer)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_data(tmp_path: Path, rows: Path, tokenizer: Tokenizer) -> None:
    code = (
        "import fcntl, pathlib, sys, time; file = open(sys.argv[1], 'wb'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    (tmp_path / "out_unfinished").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out_unfinished/lock")], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"out is being written by another process; wait for it, or end it"):
            make(tmp_path / "out", rows, tokenizer)
    finally:
        other.kill()
        other.communicate()
    make(tmp_path / "out", rows, tokenizer)


def test_what_is_there_is_kept_and_what_is_complete_is_not_made_again(
    tmp_path: Path, rows: Path, tokenizer: Tokenizer
) -> None:
    first = make(tmp_path / "out", rows, tokenizer)
    stamp = (tmp_path / "out.bin").stat().st_mtime_ns
    assert make(tmp_path / "out", rows, tokenizer) == first
    assert (tmp_path / "out.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"out: .*/out.bin already exists; choose another prefix, or remove it"):
        make(tmp_path / "out", rows, tokenizer, loss_on="last")


BAD = [
    ("{", "not valid JSON"),
    ("[]", "the record is an empty list, but it must be an object"),
    (
        '{"text": "x"}',
        "the record has the keys `text`, but the format messages needs `messages`, the format of the file",
    ),
    ('{"messages": []}', "`messages` is an empty list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "the conversation has no assistant turn"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "half of a surrogate pair"),
    ('{"messages": [{"role": "assistant", "content": "\ufdd0"}]}', "contains a Unicode noncharacter"),
    ("\0", "the line has a NUL byte"),
]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_line_stops_with_its_place_or_is_written_to_a_file_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    good, lines = [json.dumps(row) for row in conversations(50)], []
    for number, row in enumerate(good):
        lines += [row] + ([BAD[number % len(BAD)][0]] if number % 5 == 4 else [])
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    with pytest.raises(UserError, match=r"rows.jsonl:6: the conversation has no assistant turn"):
        make(tmp_path / "out", path, tokenizer, workers=workers)
    facts = make(tmp_path / "out", path, tokenizer, workers=workers, skips_bad_lines=True)
    assert (facts.documents, facts.bad_lines) == (50, 11)
    write_rows(tmp_path / "good.jsonl", conversations(50))
    make(tmp_path / "good", tmp_path / "good.jsonl", tokenizer)
    made, expected = contents(tmp_path / "out"), contents(tmp_path / "good")
    assert {name: made[name] for name in expected if "json" not in name} == {
        name: expected[name] for name in expected if "json" not in name
    }
    told = [json.loads(line) for line in made["_bad_lines.jsonl"].decode().splitlines()]
    places = [6 * number + 6 for number in range(10)] + [61]
    for place, (number, entry) in zip(places, enumerate(told), strict=True):
        assert entry["error"].startswith(f"{path}:{place}: ")
        if number < 10:
            record, sentence = BAD[(5 * number + 4) % len(BAD)]
            assert entry["record"] == record + "\n"
            assert sentence in entry["error"]


def test_all_that_is_wrong_in_a_chunk_is_said_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good, long = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b " * 99}
    path = write_rows(tmp_path / "rows.jsonl", [good, long, {"prompt": 1, "completion": "b"}, long, {"text": "x"}])
    with pytest.raises(UserError) as caught:
        make(tmp_path / "out", path, tokenizer, seq_length=20)
    for part in (
        f"{path}:3: `prompt` is a number",
        f"{path}:5: the record has the keys `text`",
        "; or skip it with --on-bad-line skip.",
        f"2 records ({path}:2, {path}:4): the example has ",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"^2 records .* the example has "):
        make(tmp_path / "out", path, tokenizer, seq_length=20, skips_bad_lines=True)


def test_a_mapped_key_that_no_record_has_is_named_at_the_end(tmp_path: Path, rows: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="--data-keys qustion=prompt: no record of --input has the key `qustion`"):
        make(tmp_path / "out", rows, tokenizer, keys=(("qustion", "prompt"),), workers=2)
    assert not (tmp_path / "out.bin").exists()


def test_a_file_that_breaks_off_is_an_error_behind_all_that_is_wrong_before_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    whole = json.dumps(conversations(30))
    (tmp_path / "rows.json").write_text(whole[:-30])
    for skips in (False, True):
        with pytest.raises(UserError, match=r"rows.json:1, record 30: not valid JSON"):
            make(tmp_path / "out", tmp_path / "rows.json", tokenizer, skips_bad_lines=skips)
    (tmp_path / "rows.json").write_text(whole.replace('"assistant"', '"robot"', 1)[:-30])
    with pytest.raises(UserError, match=r"rows.json:1, record 1: message 2 has the role 'robot'"):
        make(tmp_path / "other", tmp_path / "rows.json", tokenizer)


def test_a_separator_must_be_a_line_of_some_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one, inside, blank, other = (tmp_path / name for name in ("one.txt.gz", "inside.txt", "blank.txt", "other.jsonl"))
    one.write_bytes(gzip.compress(b"\xef\xbb\xbf<eod>\nThe end."))
    inside.write_text("The park. <eod> Once upon a time\n")
    blank.write_text("\n\n")
    other.write_text('{"text": "<eod>"}\n')
    said = "--document-separator <eod> is no line of any .txt in --input, so each would be one document; correct"
    for files in ([inside], [blank], [other], [other, blank, inside]):
        with pytest.raises(UserError, match=re.escape(said)):
            make(tmp_path / "out", files, tokenizer, separator="<eod>")
    facts = make(tmp_path / "out", [blank, inside, other, one], tokenizer, separator="<eod>")
    assert facts.documents == 3


def test_text_is_one_document_per_line_or_up_to_the_separator(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = tmp_path / "stories.txt"
    path.write_text("\nOnce upon\r\na time\n\n<|endoftext|>\n<|endoftext|>\n The park. <|endoftext|>\nEnd", newline="")
    expected = {
        None: ["Once upon", "a time", "<|endoftext|>", "<|endoftext|>", " The park. <|endoftext|>", "End"],
        "<|endoftext|>": ["Once upon\r\na time", " The park. <|endoftext|>\nEnd"],
    }
    for number, (separator, texts) in enumerate(expected.items()):
        for append_eod in (False, True):
            prefix = tmp_path / f"{number}{append_eod}"
            make(prefix, path, tokenizer, separator=separator, append_eod=append_eod)
            documents = IndexedDataset(str(prefix))
            end = [tokenizer.eos_id] if append_eod else []
            assert [documents[index].tolist() for index in range(len(documents))] == [
                [tokenizer.bos_id, *tokenizer.encode(text), *end] for text in texts
            ]
    (tmp_path / "rows.txt").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"rows.txt:1: the line is a JSON object, but a .txt file is plain text; name"):
        make(tmp_path / "out", tmp_path / "rows.txt", tokenizer)


def test_a_sentencepiece_tokenizer_gives_the_tokens_that_a_run_reads(tmp_path: Path, rows: Path) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "tokenizer"))
    make(tmp_path / "out", rows, tokenizer)
    plain, made = load(rows, tokenizer), load(tmp_path / "out", tokenizer)
    assert all(np.array_equal(a, b) for i in range(60) for a, b in zip(plain.example(i), made.example(i), strict=True))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "CHUNK_ROWS", 1000)
    monkeypatch.setattr(index_file, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(making, "RECORD_SECONDS", 2.0)
    text, peaks = "Once upon a time there was a little bridge. " * 50, []
    for documents in (500, 10_000, 30_000):  # the first has what is made once, the second fills the queues
        source = write_rows(tmp_path / f"{documents}.jsonl", [{"text": text}] * documents)
        for old in tmp_path.glob("out*"):
            old.unlink()
        with PeakMemory() as peak:
            make(tmp_path / "out", source, tokenizer, workers=2)
        peaks.append(peak.bytes)
    assert (tmp_path / "out.bin").stat().st_size > 10_000_000
    assert peaks[2] < peaks[1] + 4_000_000, peaks


def test_an_empty_input_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl holds no document: it is empty"):
        make(tmp_path / "out", tmp_path / "empty.jsonl", tokenizer)
    (tmp_path / "empty.jsonl").write_text(dumped(conversations(1)))
    assert make(tmp_path / "out", tmp_path / "empty.jsonl", tokenizer).documents == 1
