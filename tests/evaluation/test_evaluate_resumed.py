"""Commands that evaluate, killed and given again. Run: pytest tests/evaluation/test_evaluate_resumed.py"""

import json
import time
from pathlib import Path

import pytest

from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from hft_megatron.evaluation.journal import journal_of
from hft_megatron.evaluation.results import predictions_of
from tests.support.evaluations import run_evaluate, words_of, write_all_kinds
from tests.support.forked import Started, kill_all, run, start, torchrun
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs
from tests.support.tasks import write_tasks

ROWS = 48
BATCHES = 16
"""Of the long generation, in which the command is killed; the short texts before it are two more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and ``tasks.yaml``, of which one takes some seconds."""
    folder = make_inputs(tmp_path_factory.mktemp("resumed"))
    rows = [{"question": f"Say {number}", "answer": str(number), "text": f"{number} bridges"} for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"name": "short", "kind": "text", "files": "rows.jsonl", "limit": 6}
    long = {"name": "long", "kind": "generate", "files": "rows.jsonl", "prompt": "question", "target": "answer"}
    # Drawn, because what a resumed command draws must not depend on what was drawn before it.
    drawn = {"max_new_tokens": 100, "temperature": 1.0}
    write_tasks(folder, short, {**long, **drawn})
    return folder


def command(folder: Path, output: Path, batch_size: int = 3) -> list[str]:
    words = words_of(folder / "tasks.yaml", output, folder / "model", batch_size=batch_size)
    return ["-m", "hft_megatron", "evaluate", *words]


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for(journal: Path, lines: int, process: Started, log: Path) -> None:
    deadline = time.monotonic() + 120
    while lines_of(journal) < lines:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.005)


@pytest.mark.slow(reason="processes of their own, four times, of which one is killed in the middle of its work")
def test_a_killed_command_resumes_to_the_same_files(folder: Path, tmp_path: Path) -> None:
    whole, output, log = tmp_path / "whole" / "results.json", tmp_path / "killed" / "results.json", tmp_path / "log"
    assert run(command(folder, whole), tmp_path).returncode == EXIT_OK
    process = start([*torchrun(2), *command(folder, output)], output=log)
    try:
        wait_for(journal_of(output), 1 + 2 + 3, process, log)
    finally:
        kill_all(process)
        process.wait()
    answered = lines_of(journal_of(output))
    assert 1 + 2 + 3 <= answered < 1 + 2 + BATCHES, "killed in the middle of the generation"
    assert sorted(path.name for path in output.parent.iterdir()) == ["results.json.unfinished.jsonl"]

    other = run(command(folder, output, batch_size=4), tmp_path)
    assert other.returncode == EXIT_USAGE
    assert "results.json.unfinished.jsonl is of an evaluation with other batch size; run that command" in other.stderr
    assert other.stderr.count("hft-megatron: error:") == 1

    with journal_of(output).open("a") as journal:
        journal.write('{"model": "')
    again = run([*torchrun(2), *command(folder, output)], tmp_path)
    assert again.returncode == EXIT_OK, again.stderr
    assert f"resuming an evaluation that was stopped, with {answered - 1} batches answered" in again.stdout
    assert_same_files(output, whole)


@pytest.mark.slow
def test_every_cut_of_the_journal_leads_to_the_same_files(ranks: RankPools, tmp_path: Path) -> None:
    """As if the command had been killed at other moments: after no batch, some, and all; and between its two files."""
    folder = make_inputs(tmp_path / "inputs")
    tasks = write_all_kinds(folder)
    whole, output = tmp_path / "whole" / "results.json", tmp_path / "cut" / "results.json"
    kept = tmp_path / "kept.jsonl"
    words = words_of(tasks, whole, folder / "model", batch_size=3)
    assert ranks(1).run(run_keeping_the_journal, words=words, kept=str(kept))[0]["mistake"] is None
    content = kept.read_bytes()
    words = words_of(tasks, output, folder / "model", batch_size=3)
    for size in (0, 40, len(content) // 2, len(content)):
        output.parent.mkdir(exist_ok=True)
        journal_of(output).write_bytes(content[:size])
        predictions_of(output).write_text("of the command that was killed\n")
        [answer] = ranks(1).run(run_evaluate, words=words)
        batches = max(content[:size].count(b"\n") - 1, 0)
        assert any(f", with {batches} batches answered" in line for line in answer["said"]) == (batches > 0)
        assert_same_files(output, whole)
        for path in output.parent.iterdir():
            path.unlink()
    # What the digests of weights and data don't have: another end of a text, and other angles.
    for name, old, new, differs in (
        ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"', "questions, tokenizers"),
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0', "config.json"),
    ):
        file = folder / "model" / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        journal_of(output).write_bytes(content)
        [answer] = ranks(1).run(run_evaluate, words=words)
        assert f"is of an evaluation with other {differs}; run that command again" in answer["mistake"]
        file.write_text(text)


def run_keeping_the_journal(words: list[str], kept: str) -> dict[str, object]:
    """``run_evaluate``, and a copy of its journal as it was at the end."""
    from unittest.mock import patch

    from hft_megatron.evaluation.journal import Journal

    close = Journal.close

    def close_and_keep(journal: Journal, *, finished: bool) -> None:
        Path(kept).write_bytes(journal.path.read_bytes())
        close(journal, finished=finished)

    with patch.object(Journal, "close", close_and_keep):
        return run_evaluate(words)


def assert_same_files(output: Path, expected: Path) -> None:
    found, wanted = ({path.name: path.read_bytes() for path in one.parent.iterdir()} for one in (output, expected))
    assert found == wanted
    assert len(found) == 2
