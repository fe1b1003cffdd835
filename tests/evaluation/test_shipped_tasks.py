"""The tasks of examples/tasks read the published files as they are.

Run: pytest tests/evaluation/test_shipped_tasks.py
"""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.evaluation.examples import Generated, TaskExamples
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.evaluation.task_files import read_tasks
from hft_megatron.evaluation.tasks import Task
from tests.support.data_files import write_rows
from tests.support.tasks import asked, prompt_text, scored_texts, task_of

SHIPPED = Path(__file__).parents[2] / "examples/tasks"
TRACE_TASKS = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]


def make_gsm8k(folder: Path) -> None:
    for name, rows in (("train", 6), ("test", 2)):
        solved = [{"question": f"{n}*500?", "answer": f"It is {n}*500.\n#### {500 * n:,}"} for n in range(1, rows + 1)]
        write_rows(folder / f"{name}.jsonl", solved)


def make_mmlu(folder: Path) -> None:
    for task in re.findall(r"name: mmlu_(\w+)", (SHIPPED / "mmlu.yaml").read_text()):
        for split, rows in (("test", 2), ("dev", 5)):
            text = io.StringIO()
            csv.writer(text).writerows(
                [f"{task} {split} {n}, a\nquestion?", "w", "x, y", '"z"', n, "ABCD"[n % 4]] for n in range(rows)
            )
            (folder / split).mkdir(exist_ok=True)
            (folder / split / f"{task}_{split}.csv").write_text(text.getvalue())


def make_bbh(folder: Path) -> None:
    rows = [{"input": f"not {word} is", "target": str(word != "True")} for word in ("True", "False", "( True )", "1")]
    for task in re.findall(r"name: bbh_(\w+)", (SHIPPED / "bbh.yaml").read_text()):
        (folder / f"{task}.json").write_text(json.dumps({"canary": "text", "examples": rows}, indent=2))


def make_truthfulqa(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: make install brings it")
    from pyarrow import parquet

    targets: dict[str, Any] = {"choices": ["Nothing happens", "You fly"], "labels": [1, 0]}
    several = {"choices": ["Nothing", "You fly", "Not much"], "labels": [1, 0, 1]}
    row = {"question": "What if I jump?", "mc1_targets": targets, "mc2_targets": several}
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3), folder / "multiple_choice.parquet")


def make_trace(folder: Path) -> None:
    for task in TRACE_TASKS:
        (folder / task).mkdir()
        answer = "A\nBecause." if task == "ScienceQA" else "A"
        rows = [{"prompt": f"{task}: 态度\nStance:", "answer": answer}, {"prompt": "x" * 9000, "answer": "17"}]
        (folder / task / "test.json").write_text(json.dumps(rows, ensure_ascii=False))


def make_text(folder: Path) -> None:
    write_rows(folder / "a.jsonl", [{"text": "One.", "id": 1}, {"text": "Two."}])
    (folder / "stories.txt").write_text("Once.\nUpon.\n<|endoftext|>\nA time.\n<|endoftext|>\n")


FILES: dict[str, Any] = {
    "gsm8k": ("gsm8k", make_gsm8k),
    "mmlu": ("mmlu", make_mmlu),
    "truthfulqa_mc": ("truthfulqa", make_truthfulqa),
    "bbh": ("bbh", make_bbh),
    "trace": ("trace", make_trace),
    "text": ("text", make_text),
}


def shipped(folder: Path, name: str) -> dict[str, Task]:
    """The tasks of a shipped file over files made in the published shape."""
    data, make = FILES[name]
    (folder / data).mkdir()
    make(folder / data)
    shutil.copyfile(SHIPPED / f"{name}.yaml", folder / f"{name}.yaml")
    return {task.name: task for task in read_tasks(folder / f"{name}.yaml")}


def answered(task: Task, found: TaskExamples, *texts: str) -> float:
    """The value of the task's first metric where a model generates these texts."""
    records = [
        KINDS["generate"].record(task, example, Generated(ids=(), text=text, ended_by="length"))
        for example, text in zip(found.examples, texts, strict=True)
    ]
    sums = [sum(column) for column in zip(*(record["statistics"][task.metrics[0]] for record in records), strict=True)]
    return MEASURES[task.metrics[0]].total(sums)


def test_every_shipped_file_is_tested_and_says_how_it_is_run() -> None:
    assert sorted(FILES) == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    for name in FILES:
        command = f"#   hft-megatron evaluate --model M --tasks examples/tasks/{name}.yaml --output results.json\n"
        assert command in (SHIPPED / f"{name}.yaml").read_text()


def test_gsm8k(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = shipped(tmp_path, "gsm8k")["gsm8k"]
    found = asked(task, tokenizer)
    text = prompt_text(found.examples[0], tokenizer)
    assert text.startswith("Question: 2*500?\nAnswer: It is 2*500.\n#### 1,000\n\nQuestion: 3*500?")
    assert text.endswith("#### 3,000\n\nQuestion: 1*500?\nAnswer:")
    assert [example.facts["references"] for example in found.examples] == [["500"], ["1000"]]
    assert answered(task, found, " So 500.00.\n", "It is\n#### 1,001") == 50


def test_mmlu(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tasks = shipped(tmp_path, "mmlu")
    assert len(tasks) == 57
    examples = asked(tasks["mmlu_world_religions"], tokenizer).examples
    assert scored_texts(examples[1], tokenizer) == [" A", " B", " C", " D"]
    assert examples[1].facts["right"] == [1]
    text = tokenizer.decode(examples[1].sequences[0][0].tolist())
    assert text.startswith(
        "Multiple choice questions about world religions, with answers.\n\n"
        'world_religions dev 0, a\nquestion?\nA. w\nB. x, y\nC. "z"\nD. 0\nAnswer: A\n\nworld_religions dev 1'
    )
    assert text.endswith('Answer: A\n\nworld_religions test 1, a\nquestion?\nA. w\nB. x, y\nC. "z"\nD. 1\nAnswer: A')


def test_truthfulqa(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tasks = shipped(tmp_path, "truthfulqa_mc")
    first, second = (asked(task, tokenizer).examples[0] for task in tasks.values())
    assert (first.facts["right"], second.facts["right"]) == ([0], [0, 2])
    assert scored_texts(second, tokenizer) == [" Nothing", " You fly", " Not much"]


def test_bbh(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tasks = shipped(tmp_path, "bbh")
    assert len(tasks) == 27
    task = tasks["bbh_web_of_lies"]
    found = asked(task, tokenizer)
    assert prompt_text(found.examples[3], tokenizer).startswith("Q: not True is\nA: False\n\nQ: not False is")
    assert answered(task, found, " False", "True ", "False", "  True") == 75


def test_trace(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tasks = shipped(tmp_path, "trace")
    assert list(tasks) == TRACE_TASKS
    for name, task in tasks.items():
        found = asked(task, tokenizer, 2048)
        assert prompt_text(found.examples[0], tokenizer) == f"{name}: 态度\nStance:"
        assert found.counts["prompts_cut"] == 1
    found = asked(tasks["ScienceQA"], tokenizer, 2048)
    assert answered(tasks["ScienceQA"], found, "A\nOther reasons.", "1") == 100
    assert answered(tasks["FOMC"], asked(tasks["FOMC"], tokenizer, 2048), "A ", "17") == 50
    metrics = {name: task.metrics for name, task in tasks.items() if task.metrics != ("exact_match",)}
    assert metrics == {"MeetingBank": ("rouge_l",), "Py150": ("code_similarity",), "20Minuten": ("sari",)}


def test_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = {name: asked(task, tokenizer).examples for name, task in shipped(tmp_path, "text").items()}
    sizes = {name: [example.facts["bytes"] for example in examples] for name, examples in found.items()}
    assert sizes == {"articles": [4, 4], "stories": [11, 7]}


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Tokenizer:
    return load_tokenizer(None, shared_data / "stories260K")


def real(folder: Path, name: str, data: Path) -> dict[str, Task]:
    """The tasks of a shipped file over real data."""
    (folder / FILES[name][0]).symlink_to(data)
    shutil.copyfile(SHIPPED / f"{name}.yaml", folder / f"{name}.yaml")
    return {task.name: task for task in read_tasks(folder / f"{name}.yaml")}


@pytest.mark.slow
def test_gsm8k_itself(tmp_path: Path, shared_data: Path, stories: Tokenizer) -> None:
    task = real(tmp_path, "gsm8k", shared_data / "gsm8k")["gsm8k"]
    found = asked(task, stories)
    assert len(found.examples) == 1319
    assert found.examples[0].facts["references"] == ["18"]
    rows = [json.loads(line) for line in (shared_data / "gsm8k/test.jsonl").open()]
    # The reference answers solve their own questions, with thousands' commas, dollars and signs as they have them.
    assert answered(task, found, *(row["answer"] for row in rows)) == 100


@pytest.mark.slow
def test_trace_itself(tmp_path: Path, shared_data: Path, stories: Tokenizer) -> None:
    for name, task in real(tmp_path, "trace", shared_data / "trace/mini").items():
        found = asked(task, stories, 2048)
        rows = json.loads((shared_data / f"trace/mini/{name}/test.json").read_text())
        assert len(found.examples) == len(rows) == 32
        if not found.counts["prompts_cut"]:
            assert [prompt_text(each, stories) for each in found.examples] == [row["prompt"] for row in rows]
        if name != "20Minuten":  # SARI's highest value isn't that of the reference
            assert answered(task, found, *(row["answer"] for row in rows)) == pytest.approx(100)


@pytest.mark.slow
def test_stories_themselves(tmp_path: Path, shared_data: Path, stories: Tokenizer) -> None:
    file = shared_data / "text/tinystories_2mb.txt"
    whole = file.read_text(encoding="utf-8")
    task = task_of(tmp_path, kind="text", files=str(file), separator="<|endoftext|>", stride=256)
    examples = asked(task, stories, 512).examples
    texts = [text.strip("\n") for text in re.split(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$", whole)]
    texts = [text for text in texts if text.strip()]
    assert [example.facts["bytes"] for example in examples] == [len(text.encode()) for text in texts]
    tokens = [sum(int(scored.sum()) for _, scored in example.sequences) for example in examples]
    assert tokens == [len(ids) for ids in stories.encode_batch(texts, continues=False)]


@pytest.mark.slow
def test_ultrafeedback_itself(tmp_path: Path, shared_data: Path, stories: Tokenizer) -> None:
    file = shared_data / "preference/ultrafeedback_eval.jsonl"
    task = task_of(tmp_path, kind="preference", files=str(file))
    found = asked(task, stories, 8192)
    assert len(found.examples) + found.counts["bad_pairs"] == 200
    assert found.counts["bad_pairs"] == 1
    for example in found.examples:
        for ids, scored in example.sequences:
            assert ids[-1] == stories.eos_id
            assert scored[-1]
            assert not scored[: int(scored.argmax())].any()
