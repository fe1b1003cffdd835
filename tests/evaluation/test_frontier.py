"""Forgetting at equal learning. Run: pytest tests/evaluation/test_frontier.py"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import hft_megatron.methods.registry  # says of each method's measures whether more is better
from hft_megatron.errors import UserError
from hft_megatron.evaluation.frontier import Curve, curve_of_run, frontier, shared_levels
from hft_megatron.tracking.tracker import FILE_NAME, ITERATION, Metrics

assert hft_megatron.methods.registry.DECLARED

LEARNING, FORGETTING = "lm loss validation/new", "lm loss validation/old"


def curve(*points: tuple[float, float], source: str = "run", **rest: bool) -> Curve:
    """Of a loss that falls, unless ``rest`` says otherwise."""
    return Curve(source=source, points=points, **{"higher_is_better": False, "is_change": True, **rest})


def steps(learning: Callable[[int], float], forgetting: Callable[[int], float]) -> Curve:
    return curve(*((learning(step), forgetting(step)) for step in range(0, 101, 10)))


def test_most_of_a_difference_at_equal_steps_may_be_gone_at_equal_learning() -> None:
    """0.20 nats less forgetting than full after 100 steps, but only 0.04 where both have learned the same."""
    full = steps(lambda step: 3 - 0.010 * step, lambda step: 0.0040 * step)
    half = steps(lambda step: 3 - 0.006 * step, lambda step: 0.0020 * step)
    assert full.points[-1][1] - half.points[-1][1] == pytest.approx(0.20)
    found = frontier({"full": [full], "half": [half]}, [2.4])
    (of_full,), (of_half,) = found.forgetting.values()
    assert of_full is not None
    assert of_half is not None
    assert of_full - of_half == pytest.approx(0.04)
    assert found.notes == ()


def test_between_two_validations_both_values_are_interpolated() -> None:
    """The real curve of a small model of stories that was fine-tuned on plays: 0, 50, 200 and 300 steps."""
    tuned = curve((4.78, 0), (2.70, 2.54 - 1.42), (2.36, 2.91 - 1.42), (2.30, 3.09 - 1.42))
    found = frontier({"full": [tuned]}, [4.78, 2.70, 2.53, 2.30])
    assert found.forgetting["full"] == pytest.approx((0, 1.12, 1.305, 1.67))


def test_the_envelope_takes_the_run_that_forgets_least_and_never_falls_with_learning() -> None:
    fast, slow = curve((3, 0), (2, 1.0)), curve((3, 0), (2.5, 0.1), (2.2, 0.3))
    late_luck = curve((3, 0), (2.6, 0.9), (2.4, 0.05))
    found = frontier({"all": [fast, slow]}, [2.9, 2.5, 2.2, 2.1])
    assert found.forgetting["all"] == pytest.approx((0.02, 0.1, 0.3, 0.9))
    # Who learned more and forgot less has also learned as much.
    assert frontier({"all": [late_luck]}, [2.9, 2.5]).forgetting["all"] == pytest.approx((0.05, 0.05))


def test_of_an_accuracy_more_is_learning() -> None:
    found = frontier({"a": [curve((20, 0), (40, 1), (60, 5), higher_is_better=True)]}, [30, 50, 70])
    assert found.forgetting["a"] == (0.5, 3, None)
    assert found.notes == ("a: learned no further than 60; left empty: 70",)


def test_a_level_that_a_method_does_not_reach_is_left_empty_and_told() -> None:
    found = frontier({"full": [curve((3, 0), (2, 1))], "half": [curve((3, 0), (2.5, 0.2))]}, [2.5, 2.4, 1])
    assert found.forgetting == {"full": pytest.approx((0.5, 0.6, None)), "half": (0.2, None, None)}
    assert found.notes == (
        "full: learned no further than 2; left empty: 1",
        "half: learned no further than 2.5; left empty: 2.4, 1",
    )


def test_shared_levels_end_where_the_last_method_ends() -> None:
    curves = {"full": [curve((3, 0), (2, 1))], "half": [curve((3.1, 0), (2.7, 0.1)), curve((3, 0), (2.5, 0.2))]}
    levels = shared_levels(curves, 5)
    assert levels == pytest.approx((2.9, 2.8, 2.7, 2.6, 2.5))
    assert not any(value is None for values in frontier(curves, levels).forgetting.values() for value in values)
    with pytest.raises(
        UserError, match=r"^none: learned no further than 3.2, but a run begins at 3: there is no level"
    ):
        shared_levels({**curves, "none": [curve((3.2, 0), (3.3, 1))]}, 5)


def test_changes_and_values_are_not_compared() -> None:
    with pytest.raises(UserError) as refused:
        frontier({"a": [curve((3, 0))], "b": [curve((3, 1.4), source="other", is_change=False)]}, [3])
    assert str(refused.value) == (
        "other has no record of iteration 0, which run has: their forgetting cannot be compared; run both with a "
        "validation before the first step."
    )
    found = frontier({"b": [curve((3, 1.4), is_change=False)]}, [3])
    assert found.notes == ("forgetting is the value itself, because no run has a record of iteration 0",)
    assert not found.is_change


def saved(folder: Path, records: Mapping[int, Metrics]) -> str:
    """A run's folder with the metrics of iterations."""
    folder.mkdir(exist_ok=True)
    with (folder / FILE_NAME).open("w", encoding="utf-8") as file:
        for iteration, metrics in records.items():
            file.write(json.dumps({ITERATION: iteration, "lm loss": 1.0, "plan digest": "ab"}) + "\n")
            # What is measured after one iteration may stand in several records.
            for name, value in metrics.items():
                file.write(json.dumps({ITERATION: iteration, name: value}) + "\n")
    return str(folder)


def test_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    records = {
        0: {LEARNING: 4.78, FORGETTING: 1.42},
        50: {LEARNING: 2.70, FORGETTING: 2.54},
        100: {LEARNING: 2.5},
        200: {LEARNING: 2.36, FORGETTING: 2.91},
        300: {LEARNING: math.nan, FORGETTING: 2.91},
    }
    found = curve_of_run(saved(tmp_path, records), LEARNING, FORGETTING)
    assert found.points == ((4.78, 0), (2.70, pytest.approx(1.12)), (2.36, pytest.approx(1.49)))
    assert (found.is_change, found.higher_is_better, found.left_out) == (True, False, 1)
    assert frontier({"full": [found]}, [4]).notes == (
        f"{tmp_path}: validations left out, because a value isn't finite: 1",
    )


def test_without_iteration_0_forgetting_is_the_value_itself(tmp_path: Path) -> None:
    found = curve_of_run(saved(tmp_path, {50: {LEARNING: 2.7, FORGETTING: 2.54}}), LEARNING, FORGETTING)
    assert found.points == ((2.7, 2.54),)
    assert not found.is_change


def test_a_measure_of_a_task_may_be_what_is_learned(tmp_path: Path) -> None:
    folder = saved(tmp_path, {10: {"gsm8k/exact_match": 30.0, FORGETTING: 1.5}})
    assert curve_of_run(folder, "gsm8k/exact_match", FORGETTING).higher_is_better


def test_a_falling_accuracy_is_forgetting(tmp_path: Path) -> None:
    old = "rewards/accuracies validation/old"
    folder = saved(tmp_path, {0: {LEARNING: 3.0, old: 0.8}, 10: {LEARNING: 2.0, old: 0.5}})
    assert curve_of_run(folder, LEARNING, old).points == ((3.0, 0), (2.0, pytest.approx(0.3)))


def test_a_task_may_have_the_name_of_a_measure(tmp_path: Path) -> None:
    for task in ("perplexity", "forgetting", "sari"):
        name = f"tasks/{task}/accuracy"
        records = {0: {LEARNING: 3.0, name: 80.0}, 5: {LEARNING: 2.0, name: 75.0}}
        (tmp_path / task).mkdir()
        assert curve_of_run(saved(tmp_path / task, records), LEARNING, name).points == ((3.0, 0.0), (2.0, 5.0))


def refused(folder: str, learning: str = LEARNING, forgetting: str = FORGETTING) -> str:
    with pytest.raises(UserError) as error:
        curve_of_run(folder, learning, forgetting)
    return str(error.value)


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = saved(tmp_path, {10: {LEARNING: 2.0}})
    assert refused(folder) == (
        f"{folder}: no record of metrics.jsonl has {FORGETTING}; near it are lm loss validation/new."
    )


def test_what_gives_no_curve_is_refused(tmp_path: Path) -> None:
    apart = saved(tmp_path / "apart", {10: {LEARNING: 2.0}, 20: {FORGETTING: 1.0}})
    assert refused(apart) == (
        f"{apart}: no iteration of metrics.jsonl has finite values of both {LEARNING} and {FORGETTING}."
    )
    old = "rewards/accuracies validation"
    late = saved(tmp_path / "late", {10: {LEARNING: 2.0, old: 0.5, "grad norm": 1.0}})
    assert refused(late, forgetting=old).endswith("run with a validation before the first step.")
    assert refused(late, forgetting="grad norm").startswith(
        f"{late}: it isn't known whether more of grad norm is better; choose a value of one of accuracy, "
    )
    assert refused(str(tmp_path / "none")).endswith("give the --save folder of a run.")


def test_a_line_that_is_no_record_is_named_and_one_that_is_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = json.dumps({"iteration": 10, LEARNING: 2.0, FORGETTING: 1.0})
    path.write_text(f"{record}\n{record[:20]}", encoding="utf-8")
    assert curve_of_run(str(tmp_path), LEARNING, FORGETTING).points == ((2.0, 1.0),)
    path.write_text(f"{record}\n{record[:20]}\n", encoding="utf-8")
    assert refused(str(tmp_path)).startswith(f"{path}:2 is not a record of a run (")
    path.write_text("[]\n", encoding="utf-8")
    assert refused(str(tmp_path)).startswith(f"{path}:1 is not a record of a run (")
