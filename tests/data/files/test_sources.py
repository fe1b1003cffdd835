"""Which files a data path means. Run: pytest tests/data/files"""

import os
from pathlib import Path

import pytest

from hft_megatron.data.files.sources import TRAIN_SPLIT, VALID_SPLIT, find_sources
from hft_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.jsonl",
        "a.jsonl",
        "x[1].jsonl",
        "tasks/FOMC/train.json",
        "tasks/FOMC/eval.json",
        "tasks/Q/train.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "empty.jsonl").mkdir()
    return tmp_path


def files(*words: str, split: str = TRAIN_SPLIT) -> list[list[str]]:
    return [[str(file) for file in source.files] for source in find_sources("--train-data-path", words, split)]


@pytest.mark.usefixtures("folder")
def test_a_path_is_a_file_a_glob_in_order_of_names_or_a_trace_folder() -> None:
    assert files("b.jsonl", "a.jsonl") == [["b.jsonl"], ["a.jsonl"]]
    assert files("*.jsonl") == [["a.jsonl", "b.jsonl", "x[1].jsonl"]]
    assert files("x[1].jsonl") == [["x[1].jsonl"]]  # the name of a file before what it means as a glob
    assert files("tasks/FOMC") == [["tasks/FOMC/train.json"]]
    assert files("tasks/FOMC/", split=VALID_SPLIT) == [["tasks/FOMC/eval.json"]]
    assert files("**/train.json") == [["tasks/FOMC/train.json", "tasks/Q/train.json"]]
    assert files("2", "a.jsonl", "1", "tasks/Q") == [["a.jsonl"], ["tasks/Q/train.json"]]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("absent.jsonl", "--train-data-path absent.jsonl: there is no such file."),
        ("c*.jsonl", "--train-data-path c*.jsonl matches no file."),
        ("empty.jsonl", "--train-data-path empty.jsonl is a folder without train.json, so it is not a TRACE task; "
         "name a file, or files with a glob such as 'empty.jsonl/*.jsonl'."),
        ("tasks", "--train-data-path tasks is a folder of the TRACE tasks FOMC, Q; name one of them, or all with "
         "'tasks/*/train.json'."),
    ],
)  # fmt: skip
def test_a_path_without_files_is_named(path: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        files(path)
    assert str(caught.value) == sentence


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("word", ["pipe.jsonl", "p*.jsonl"])
def test_a_pipe_is_refused_because_data_are_read_more_than_once(word: str) -> None:
    os.mkfifo("pipe.jsonl")
    with pytest.raises(UserError, match=r"^--train-data-path pipe.jsonl is a pipe or a device, which cannot be read "):
        files(word)
