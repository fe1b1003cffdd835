"""The tables of the first result say what the sequences' matrices say. Run: pytest tests/tools"""

import json
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

import pytest
import sequences
from make_tasks import TASKS
from sequences import SEEDS, SETTINGS, STUDENT_T, Outcome, of_matrix, planned, render

from hft_megatron.cli.continual import ContinualOptions
from hft_megatron.config.loading import load_options
from hft_megatron.evaluation.matrix import Cell, Column, ScoreMatrix

BARS = dict.fromkeys(TASKS, 30.0)


def outcome(setting: str, weights: str, seed: int, own: float, kept: float) -> Outcome:
    """Every task has the score ``own`` right behind its training and, where it isn't the last, ``kept`` at the end."""
    matrix = ScoreMatrix(
        [Column(name=name, digest="", measure="exact_match") for name in TASKS],
        [Column(name="general", digest="", measure="bits_per_byte")],
    )
    last = len(TASKS)
    for number, name in enumerate(TASKS, start=1):
        matrix.put(0, name, Cell(value=5.0, examples=10))
        matrix.put(number, name, Cell(value=own, examples=10))
        matrix.put(number, "general", Cell(value=1.0 + number / 8, examples=10))
        if number < last and setting != "single":
            matrix.put(last, name, Cell(value=kept, examples=10))
    matrix.put(0, "general", Cell(value=1.0, examples=10))
    return of_matrix(matrix.contents(), setting, weights, seed, 1.0)


def results(own: float = 80.0) -> dict[str, Any]:
    outcomes = []
    for setting, weights, seed in planned():
        kept = 40.0 if weights == "full" else 40.0 + 10 * seed
        outcomes.append(outcome(setting, weights, seed, own, kept))
    return {"best constant answer": BARS, "sequences": [asdict(one) for one in outcomes]}


def cells(table: str) -> dict[tuple[str, str], list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_every_method_runs_with_every_seed_and_one_seed_ends_before_the_next_begins() -> None:
    found = list(planned())
    assert [seed for *_, seed in found] == sorted(seed for *_, seed in found)
    assert len(set(found)) == len(found) == len(SEEDS) * 6 + 2
    assert {setting for setting, *_ in found} == set(SETTINGS)


def test_scores_are_means_with_students_interval_and_differences_are_of_one_seed() -> None:
    scores, differences, _ = render(results()).split("\n\n")
    full, half = cells(scores)["sequential", "full"], cells(scores)["sequential", "half, independent"]
    at_the_end = (7 * 40 + 80) / 8
    assert full[:3] == ["80.0 ± 0.0", f"{at_the_end:.1f} ± 0.0", f"{at_the_end - 80:.1f} ± 0.0"]
    ops = [(7 * (40 + 10 * seed) + 80) / 8 for seed in SEEDS]
    width = STUDENT_T * stdev(ops) / 3**0.5
    assert half[1] == f"{fmean(ops):.1f} ± {width:.1f}"
    assert full[4] == "1.000 ± 0.000"
    assert full[5:] == ["45.7", "-10.2"]
    assert cells(scores)["replay", "full"][5:] == ["54.3", "1.4"]
    less = cells(differences)["sequential", "half, independent"]
    assert less[1] == f"{fmean(ops) - at_the_end:+.1f} ± {width:.1f}"
    assert less[4] == "+0.000 ± 0.000"
    assert ("sequential", "full") not in cells(differences)


def test_a_model_for_each_task_has_a_score_in_its_own_alone() -> None:
    scores, _, tasks = render(results()).split("\n\n")
    assert cells(scores)["single", "full"] == ["80.0", *[""] * 6]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tasks.splitlines()]
    assert rows[2] == ["attitude", "5.0", "30.0", "80.0", "80.0"]
    assert rows[-1][-2:] == ["8 of 8", "8 of 8"]
    *_, tasks = render(results(own=39.9)).split("\n\n")
    assert tasks.splitlines()[-1].count("0 of 8") == 2


def test_a_seed_that_is_missing_is_no_result() -> None:
    found = results()
    with pytest.raises(AssertionError):
        render({**found, "sequences": found["sequences"][:-1]})


def test_the_options_are_those_of_the_command() -> None:
    for setting, weights, seed in planned():
        words = [*sequences.TRAINING_OPTIONS, *sequences.SETTINGS[setting], *sequences.WEIGHTS[weights]]
        options = load_options(ContinualOptions, [*words, "--seed", str(seed)])
        assert options.as_run.hft.hft_ratio == (1 if weights == "full" else 0.5)


def test_the_documentation_has_the_tables_of_the_committed_result() -> None:
    text = sequences.DOCUMENT.read_text(encoding="utf-8")
    between = text.partition(sequences.BEGIN)[2].partition(sequences.END)[0]
    assert between.strip() == render(json.loads(sequences.RESULTS.read_text(encoding="utf-8")))
