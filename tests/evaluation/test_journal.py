"""The journal of an unfinished evaluation. Run: pytest tests/evaluation/test_journal.py"""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.errors import RankFailed, UserError
from hft_megatron.evaluation.examples import Answer, Generated, SequenceScore, TextDifference
from hft_megatron.evaluation.journal import Journal, journal_of
from hft_megatron.evaluation.results import check_output, predictions_of, write_results

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"models": {"Ärger": "abc"}, "settings": {"batch_size": 3, "device": "cpu"}}
ANSWERS: dict[int, list[Answer]] = {
    0: [SequenceScore(log_prob=-0.1 - 1e-17, tokens=3, is_greedy=True)],
    1: [Generated(ids=(5, 6), text="zwei\n\u2028 Sätze\ud800", ended_by="stop string")],
    2: [TextDifference(tokens=2, base_nats=1 / 3, tuned_nats=0.5, kl_base_tuned=1e-9, kl_tuned_base=0.0)],
}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A result file to come, whose journal has three batches."""
    output = tmp_path / "new" / "results.json"
    journal = Journal(output, SETTINGS)
    for batch, answers in ANSWERS.items():
        journal.add("Ärger", "task", batch, answers)
    journal.close(finished=False)
    return output


def test_answers_come_back_to_the_last_bit_and_the_file_goes_at_the_end(output: Path) -> None:
    journal = Journal(output, SETTINGS)
    assert journal.answers == {("Ärger", "task"): ANSWERS}
    journal.close(finished=True)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("tail", [b'{"model": "m", "task', b"\x00" * 40, b"\xff\xfe"])
def test_a_torn_line_is_dropped_and_what_follows_it_is_whole(tail: bytes, output: Path) -> None:
    whole = journal_of(output).read_bytes()
    journal_of(output).write_bytes(whole + tail)
    journal = Journal(output, SETTINGS)
    assert journal.answers == {("Ärger", "task"): ANSWERS}
    journal.add("Ärger", "other", 0, ANSWERS[0])
    journal.close(finished=False)
    assert journal_of(output).read_bytes().startswith(whole + b'{"model"')
    again = Journal(output, SETTINGS)
    assert again.answers == {("Ärger", "task"): ANSWERS, ("Ärger", "other"): {0: ANSWERS[0]}}
    again.close(finished=False)


def test_a_torn_first_line_begins_anew(output: Path) -> None:
    journal_of(output).write_bytes(journal_of(output).read_bytes()[:20])
    journal = Journal(output, SETTINGS)
    assert journal.answers == {}
    journal.close(finished=False)
    Journal(output, SETTINGS).close(finished=True)


def damage(line: int, text: str) -> Callable[[list[str]], None]:
    return lambda lines: lines.__setitem__(line, text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damage(0, "{"), "results.json.unfinished.jsonl:1 is damaged; delete"),
        (damage(0, "[]"), "results.json.unfinished.jsonl:1 is damaged; delete"),
        (damage(2, '{"model": '), "results.json.unfinished.jsonl:3 is damaged; delete"),
        (damage(2, '{"model": "m", "task": "t", "batch": 0, "answers": [{"text": "x"}]}'), ":3 is damaged; delete"),
        (damage(3, "\xff"), "results.json.unfinished.jsonl:4 is damaged; delete"),
    ],
)
def test_a_damaged_line_is_named_and_the_file_is_left_as_it_is(
    change: Callable[[list[str]], None], said: str, output: Path
) -> None:
    lines = journal_of(output).read_text().split("\n")
    change(lines)
    journal_of(output).write_text("\n".join(lines), encoding="latin-1")
    before = journal_of(output).read_bytes()
    with pytest.raises(UserError, match=said):
        Journal(output, SETTINGS)
    assert journal_of(output).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"batch_size": 4, "device": "cpu"}}, "with other batch size; run that command again"),
        ({"models": {"Ärger": "abd"}}, "with other models; run that command again"),
        ({"settings": {}, "models": {}}, "with other models, settings; run that command again"),
    ],
)
def test_another_evaluation_is_refused_by_what_differs(changes: dict[str, Any], said: str, output: Path) -> None:
    before = journal_of(output).read_bytes()
    with pytest.raises(UserError, match=said):
        Journal(output, SETTINGS | changes)
    assert journal_of(output).read_bytes() == before


WRITER = """
import json, sys
from pathlib import Path
from hft_megatron.evaluation.journal import Journal
journal = Journal(Path(sys.argv[1]), json.loads(sys.argv[2]))
print("has begun", flush=True)
input()
"""


def test_a_second_command_is_refused_while_the_first_one_writes(output: Path) -> None:
    before = journal_of(output).read_bytes()
    words = [sys.executable, "-c", WRITER, str(output), json.dumps(SETTINGS)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"has begun\n"
        with pytest.raises(UserError, match=r"--output .*results\.json is being written by another command; wait"):
            Journal(output, SETTINGS)
        first.kill()
    assert journal_of(output).read_bytes() == before
    journal = Journal(output, SETTINGS)
    assert journal.answers == {("Ärger", "task"): ANSWERS}
    journal.close(finished=False)


def test_results_that_came_meanwhile_are_not_written_over(output: Path) -> None:
    output.write_text("{}")
    for refused in (lambda: Journal(output, SETTINGS), lambda: write_results(output, {"models": []}, {})):
        with pytest.raises(UserError, match=r"--output .*results\.json already exists; remove it"):
            refused()
    assert output.read_text() == "{}"
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, journal_of(output).name]
    journal_of(output).unlink()
    with pytest.raises(UserError, match="already exists"):
        Journal(output, SETTINGS)
    assert list(output.parent.iterdir()) == [output]


def test_a_full_disk_is_a_sentence_and_what_was_written_resumes(output: Path) -> None:
    journal = Journal(output, SETTINGS)
    size = journal_of(output).stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))
        with pytest.raises(RankFailed, match=r"rank 0 cannot write .*unfinished\.jsonl.*; free some space, and run"):
            journal.add("Ärger", "other", 0, ANSWERS[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert journal_of(output).stat().st_size == size + 30
    assert Journal(output, SETTINGS).answers == {("Ärger", "task"): ANSWERS}


def test_predictions_of_a_command_that_was_killed_before_its_results_are_written_again(output: Path) -> None:
    predictions_of(output).write_text("{}\n")
    check_output(output)
    journal_of(output).unlink()
    with pytest.raises(UserError, match=r"results\.predictions\.jsonl already exists"):
        check_output(output)


def test_any_text_can_be_written(tmp_path: Path) -> None:
    output = tmp_path / "Ergebnis.json"
    texts = ["Ärger 橋", "half of a pair \ud800", "line\u2028 and \x85 next\r\n"]
    records = {("m\udce9", "t"): [{"example": str(number), "prediction": text} for number, text in enumerate(texts)]}
    write_results(output, {"models": ["m\udce9"]}, records)
    lines = predictions_of(output).read_bytes().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == texts
    assert json.loads(output.read_bytes())["models"] == ["m\udce9"]
