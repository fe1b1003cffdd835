"""Two result files compared. Run: pytest tests/evaluation/test_comparison.py"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hft_megatron.errors import UserError
from hft_megatron.evaluation.comparison import Difference, compare
from hft_megatron.evaluation.measures import MEASURES

Rows = Sequence[Mapping[str, Sequence[float]]]
"""Statistics of a task's examples, by measure."""


def write(
    path: Path,
    models: Mapping[str, Mapping[str, Rows]],
    *,
    tokenizer: str = "t",
    questions: str = "q",
    digests: Mapping[str, str] | None = None,
) -> str:
    """A results file as `evaluate` writes it, of models with tasks, and its lines of predictions."""
    lines = path.with_suffix(".predictions.jsonl")
    entries = []
    with lines.open("w", encoding="utf-8") as file:
        for model, tasks in models.items():
            of_model: list[dict[str, Any]] = []
            for task, rows in tasks.items():
                for number, statistics in enumerate(rows, 1):
                    record = {"model": model, "task": task, "example": f"test.jsonl:{number}", "prediction": "ü"}
                    file.write(json.dumps({**record, "statistics": statistics}, ensure_ascii=False) + "\n")
                sums = {name: np.sum([row[name] for row in rows], axis=0).tolist() for name in rows[0]}
                values = {name: MEASURES[name].total(of) if name in MEASURES else 0 for name, of in sums.items()}
                of_model.append(
                    {
                        "name": task,
                        "digest": (digests or {}).get(task, "d" * 64),
                        "questions": f"{tokenizer} {questions}",
                        "kind": "choose",
                        "examples": len(rows),
                        "values": values,
                        "counts": {},
                    }
                )
            entries.append({"name": model, "digest": "m", "tokenizer_digest": tokenizer, "tasks": of_model})
    content = {"format": 1, "models": entries, "settings": {}, "predictions": lines.name}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return str(path)


def test_models_that_read_other_windows_are_not_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "a.json", {"m": {"t": texts(1.0, 2.0), "u": hits(1, 0)}})
    other = write(tmp_path / "b.json", {"m": {"t": texts(1.0, 2.0), "u": hits(1, 0)}}, questions="longer")
    with pytest.raises(UserError, match="contexts differ"):
        compare(one, other)


def hits(*values: int) -> Rows:
    return [{"accuracy": [value, 1]} for value in values]


def texts(*nats: float) -> Rows:
    return [{"cross_entropy": [value, 10], "perplexity": [value, 10], "bits_per_byte": [value, 40]} for value in nats]


def refused(first: str, second: str) -> str:
    with pytest.raises(UserError) as error:
        compare(first, second)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_difference_has_both_values_its_interval_and_the_better_model(tmp_path: Path) -> None:
    bad, good = [0] * 30 + [1] * 30, [1] * 50 + [0] * 10
    first = write(tmp_path / "a.json", {"base": {"mmlu": hits(*bad)}})
    second = write(tmp_path / "b.json", {"tuned": {"mmlu": hits(*good)}})
    (found,) = compare(first, second).differences
    assert (found.task, found.measure, found.first, found.second) == ("mmlu", "accuracy", 50, pytest.approx(83.333333))
    assert found.interval.value == pytest.approx(33.333333)
    assert 0 < found.interval.low < found.interval.value < found.interval.high
    assert found.better == "second"
    (back,) = compare(second, first).differences
    assert back.better == "first"


def test_of_a_loss_the_lower_value_is_better(tmp_path: Path) -> None:
    nats = np.random.default_rng(0).normal(20, 1, size=50)
    first = write(tmp_path / "a.json", {"base": {"wiki": texts(*nats)}})
    second = write(tmp_path / "b.json", {"tuned": {"wiki": texts(*(nats + 1))}})
    assert {found.measure: found.better for found in compare(first, second).differences} == dict.fromkeys(
        ("cross_entropy", "perplexity", "bits_per_byte"), "first"
    )


def test_where_0_lies_in_the_interval_neither_is_better(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"base": {"mmlu": hits(0, 1, 1, 0)}})
    second = write(tmp_path / "b.json", {"tuned": {"mmlu": hits(1, 1, 0, 1)}})
    (found,) = compare(first, second).differences
    assert found.interval.value == 25
    assert found.better is None


def test_a_file_beside_itself_differs_by_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"base": {"wiki": texts(20.5, 30.1, 7.7)}})
    for found in compare(path, path).differences:
        assert isinstance(found, Difference)
        assert (found.interval.value, found.interval.low, found.interval.high, found.better) == (0, 0, 0, None)


def test_examples_are_paired_by_their_places_whatever_the_order_of_lines(tmp_path: Path) -> None:
    values = list(np.random.default_rng(1).normal(20, 5, size=40))
    first = write(tmp_path / "a.json", {"base": {"wiki": texts(*values)}})
    second = write(tmp_path / "b.json", {"base": {"wiki": texts(*values)}})
    lines = (tmp_path / "b.predictions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "b.predictions.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    for found in compare(first, second).differences:
        assert found.interval.high - found.interval.low < 1e-9


def test_a_model_of_several_is_chosen_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a:b.json", {"org/base:1": {"mmlu": hits(0, 0)}, "tuned": {"mmlu": hits(1, 1)}})
    (found,) = compare(f"{path}:org/base:1", f"{path}:tuned").differences
    assert (found.first, found.second) == (0, 100)
    assert (
        refused(path, path)
        == f"{path} holds 2 models (org/base:1, tuned); choose one of them, as in {path}:org/base:1."
    )
    assert refused(f"{path}:tune", path) == f"{path}:tune: {path} holds no model tune; the nearest is tuned."


def test_with_other_tokenizers_what_counts_tokens_is_left_out_and_told(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"base": {"wiki": texts(20, 30)}})
    second = write(tmp_path / "b.json", {"other": {"wiki": texts(20, 30)}}, tokenizer="u")
    found = compare(first, second)
    assert [one.measure for one in found.differences] == ["bits_per_byte"]
    assert found.notes == (
        "wiki: cross_entropy, perplexity: left out, because tokens are counted and the tokenizers differ",
    )


def test_with_other_tokenizers_and_nothing_else_measured_there_is_nothing_to_compare(tmp_path: Path) -> None:
    rows = [{"perplexity": [20, 10]}]
    first = write(tmp_path / "a.json", {"base": {"wiki": rows}})
    second = write(tmp_path / "b.json", {"other": {"wiki": rows}}, tokenizer="u")
    assert refused(first, second) == (
        f"{first} and {second} have no measure that can be compared (wiki: perplexity: left out, because tokens are "
        f"counted and the tokenizers differ); evaluate both with one that doesn't count tokens, such as bits_per_byte."
    )


def test_tasks_and_measures_of_one_file_alone_are_told(tmp_path: Path) -> None:
    unknown = [{"accuracy": [1, 1], "of_tomorrow": [1, 1]}]
    first = write(tmp_path / "a.json", {"base": {"mmlu": unknown, "bbh": hits(1), "arc": hits(1)}})
    second = write(tmp_path / "b.json", {"tuned": {"gsm8k": hits(1), "mmlu": unknown}})
    found = compare(first, second)
    assert [(one.task, one.measure) for one in found.differences] == [("mmlu", "accuracy")]
    assert found.notes == (
        f"{first}: tasks that {second} doesn't have, left out: bbh, arc",
        f"{second}: tasks that {first} doesn't have, left out: gsm8k",
        "mmlu: of_tomorrow: left out, because this version doesn't know it",
    )
    assert math.isinf(found.differences[0].interval.high)


def test_no_task_in_common_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"base": {"mmlu": hits(1), "bbh": hits(1)}})
    second = write(tmp_path / "b.json", {"base": {"gsm8k": hits(1)}})
    assert refused(first, second) == (
        f"{first} and {second} have no task in common: the first has mmlu, bbh, the second gsm8k; evaluate both with "
        f"the same --tasks."
    )


def test_a_task_of_one_name_with_other_settings_or_examples_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"base": {"mmlu": hits(1, 1)}})
    second = write(tmp_path / "b.json", {"base": {"mmlu": hits(1, 1)}}, digests={"mmlu": "e" * 64})
    assert refused(first, second) == (
        f"Task mmlu of {first} differs from that of {second}: its settings or files have the digests dddddddddddd and "
        f"eeeeeeeeeeee; evaluate both with the same --tasks and files."
    )
    third = write(tmp_path / "c.json", {"base": {"mmlu": hits(1, 1, 1)}})
    assert refused(first, third) == (
        f"Task mmlu has 2 examples in {first} and 3 in {third}, 2 of them the same; evaluate both on the same examples."
    )


def damaged_lines(folder: Path, change: Mapping[str, str], *, keep: int | None = None) -> tuple[str, str]:
    """A results file of three examples whose lines were changed or cut, and the sentence that refuses it."""
    path = write(folder / "a.json", {"base": {"mmlu": hits(1, 0, 1)}})
    lines = Path(path).with_suffix(".predictions.jsonl")
    text = lines.read_text(encoding="utf-8")
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new, 1)
    lines.write_text(text[:keep], encoding="utf-8")
    return str(lines), refused(path, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"jsonl:2": "jsonl:1"}, ":2 has example test.jsonl:1 of task mmlu a second time; evaluate again."),
        ({"[0, 1]": "[0]"}, ":2 has other statistics of accuracy than the lines before; evaluate again."),
        ({"[0, 1]": '["0", 1]'}, ":2 has other statistics of accuracy than the lines before; evaluate again."),
        (
            {'"accuracy": [0, 1]': ""},
            ":2 has no `accuracy` that is a list: it is damaged or no results file; evaluate again.",
        ),
        (
            {'"task": "mmlu", "example": "test.jsonl:3"': '"example": "test.jsonl:3"'},
            ":3 has no `task` that is a str: it is damaged or no results file; evaluate again.",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, change: Mapping[str, str], sentence: str) -> None:
    lines, found = damaged_lines(tmp_path, change)
    assert found == lines + sentence


def test_a_file_that_is_cut_is_named_within_a_line_and_between_lines(tmp_path: Path) -> None:
    lines, found = damaged_lines(tmp_path, {}, keep=-5)
    assert found.startswith(f"{lines}:3 is not JSON (")
    assert found.endswith("): the file is truncated or damaged; evaluate again.")
    whole = Path(write(tmp_path / "a.json", {"base": {"mmlu": hits(1, 0, 1)}})).with_suffix(".predictions.jsonl")
    last = len(whole.read_text(encoding="utf-8").splitlines(keepends=True)[-1])
    lines, found = damaged_lines(tmp_path, {}, keep=-last)
    assert found == (
        f"{lines} has 2 examples of task mmlu by base, but {tmp_path / 'a.json'} says 3: it is truncated or of "
        f"another evaluation; evaluate again."
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '{\n "format": 1,\n "mod',
            ":3 is not JSON (Unterminated string starting at): the file is truncated or damaged; evaluate again.",
        ),
        ("[]", " is not a JSON object; give a file that hft-megatron evaluate wrote."),
        ('{"format": 2}', " has results format 2, this version reads 1; evaluate again."),
        ("{}", " is not a result file of `hft-megatron evaluate --tasks`; name one."),
        ('{"format": 1, "models": [{"name": "a"}, {"name": "a"}]}', " lists a twice; evaluate again."),
        ('{"format": 1, "models": []}', " holds 0 models (); choose one of them, as in {path}:MODEL."),
        (
            '{"format": 1, "models": [{"name": "a"}]}',
            " has no `tasks` that is a list: it is damaged or no results file; evaluate again.",
        ),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    assert refused(str(path), str(path)) == f"{path}{sentence.replace('{path}', str(path))}"


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.json")
    sentence = f"{missing} cannot be read (No such file or directory); give a file that hft-megatron evaluate wrote."
    assert refused(missing, missing) == sentence
    path = tmp_path / "a.json"
    path.write_bytes(b'{"format": "\xff"}')
    assert refused(str(path), str(path)) == (
        f"{path} is not JSON (invalid start byte): the file is damaged; evaluate again."
    )
