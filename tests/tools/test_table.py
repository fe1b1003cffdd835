"""The demo's table says what the outcomes say, also where a score was not reached."""

from collections.abc import Sequence

import settings
from comparison import Evaluation, Outcome
from table import README_END, README_START, render, replace_table


def outcome(method: str, seed: int, scores: Sequence[tuple[int, float, float]]) -> Outcome:
    return Outcome(
        method=method,
        seed=seed,
        evaluations=tuple(
            Evaluation(step=step, new_task=new, old_knowledge=old, model=f"model_{step}") for step, new, old in scores
        ),
        step_ms=100.0 + seed,
        optimizer_bytes=8_000_000,
        gradient_bytes=4_000_000,
        wire_bytes=6_100_000,
    )


BEFORE = Evaluation(step=0, new_task=0.01, old_knowledge=0.97, model="model")
LAST = settings.FINE_TUNING_STEPS
HALF = outcome("HFT", 1, [(50, 0.1, 0.9), (LAST, 0.75, 0.8), (LAST + 50, 0.95, 0.7)])
FULL = outcome("full", 1, [(50, 0.92, 0.4), (LAST, 1.0, 0.2)])


def test_equal_steps_and_equal_skill_are_different_evaluations() -> None:
    assert HALF.at_equal_steps.new_task == 0.75
    assert HALF.at_equal_skill is not None
    assert HALF.at_equal_skill.step == LAST + 50
    assert FULL.at_equal_skill is not None
    assert FULL.at_equal_skill.step == 50


def test_one_seed_shows_plain_values() -> None:
    rows = _rows(render(BEFORE, [HALF, FULL]))
    assert rows[f"new task after {LAST} steps"] == ["1.0 %", "75.0 %", "100.0 %"]
    assert rows[f"old knowledge after {LAST} steps"] == ["97.0 %", "80.0 %", "20.0 %"]
    assert rows["steps until the new task is at 90 %"] == ["", str(LAST + 50), "50"]
    assert rows["old knowledge then"] == ["97.0 %", "70.0 %", "40.0 %"]
    assert rows["sent per rank and step, TP 2 x DP 2 (MB)"] == ["", "6.1", "6.1"]


def test_several_seeds_show_the_mean_and_the_range() -> None:
    other = outcome("HFT", 2, [(LAST, 0.85, 0.6)])
    rows = _rows(render(BEFORE, [HALF, other, FULL]))
    assert rows[f"new task after {LAST} steps"][1] == "80.0 % (75.0 % to 85.0 %)"
    assert rows["old knowledge then"][1] == "70.0 %, 1 not reached"


def test_a_skill_that_no_seed_reached_is_said() -> None:
    rows = _rows(render(BEFORE, [outcome("HFT", 1, [(LAST, 0.2, 0.9)]), FULL]))
    assert rows["old knowledge then"][1] == "not reached"


def test_outcomes_survive_being_written() -> None:
    assert Outcome.from_dict(HALF.to_dict()) == HALF


def test_only_the_table_of_the_readme_is_replaced() -> None:
    readme = f"before\n{README_START}\nold\n{README_END}\nafter\n"
    assert replace_table(readme, "| new |") == f"before\n{README_START}\n| new |\n{README_END}\nafter\n"


def _rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in cells}
