"""A tasks file is read as it is meant, or refused with one sentence that names file and line.

Run: pytest tests/evaluation/test_tasks.py
docs/evaluation.md shows the fields; ``python -m tests.evaluation.test_tasks`` prints what must stand there.
"""

import ast
import inspect
import re
import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_origin

import pytest

from hft_megatron.config.declared import declared
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation import tasks as module
from hft_megatron.evaluation.forgetting import statistics
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.evaluation.task_files import read_tasks
from hft_megatron.evaluation.task_rows import names_of_places
from hft_megatron.evaluation.tasks import FIELDS_OF, LOCATION, NEEDED_BY, Task
from tests.support.data_files import write_rows
from tests.support.tasks import asked, task_of, write_tasks

DOCUMENTATION = Path(__file__).parents[2] / "docs/evaluation.md"
ASKING = {"kind": "generate", "prompt": "question", "target": "answer"}
ROW = {"question": "1+1?", "answer": "2"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", [ROW])
    return tmp_path


def test_what_a_file_leaves_out_is_the_default_and_metrics_are_those_of_the_kind(folder: Path) -> None:
    task = task_of(folder, files="a.jsonl", **ASKING, stop=None)
    assert task == Task(
        name="made",
        kind="generate",
        files=("a.jsonl",),
        prompt="question",
        target="answer",
        metrics=("exact_match",),
        place=f"{folder}/tasks.yaml:1",
        folder=folder,
    )
    assert task.paths() == (folder / "a.jsonl",)
    metrics = {
        kind: task_of(folder, files="a.jsonl", kind=kind, **dict.fromkeys(NEEDED_BY[kind], "question")).metrics
        for kind in KINDS
    }
    assert metrics == {
        "generate": ("exact_match",),
        "choose": ("accuracy",),
        "text": ("perplexity", "bits_per_byte"),
        "preference": ("preference_accuracy",),
    }


def test_a_task_may_take_settings_of_another(folder: Path) -> None:
    (folder / "tasks.yaml").write_text(
        "- &first\n  name: a\n  kind: generate\n  files: a.jsonl\n  prompt: question\n  target: answer\n  limit: 3\n"
        "- <<: *first\n  name: b\n  limit: 4\n",
        encoding="utf-8",
    )
    first, second = read_tasks(folder / "tasks.yaml")
    assert (first.name, first.limit, second.name, second.limit) == ("a", 3, "b", 4)
    assert second.prompt == "question"
    assert second.place.endswith("tasks.yaml:8")


MISTAKES: dict[str, tuple[str, str]] = {
    "empty file": ("", r"tasks\.yaml: the file must hold a list of tasks"),
    "empty list": ("[]", r"must hold a list of tasks"),
    "no list": ("name: a", r"must hold a list of tasks"),
    "no mapping": ("- gsm8k", r":1: a task must be settings"),
    "broken": ("- name: [", r"tasks\.yaml:\d+ is not valid YAML"),
    "code": ("- name: !!python/name:os.system ''", r":1 is not valid YAML: plain texts, numbers and lists alone"),
    "no kind": ("- name: a\n  files: a.jsonl", r":1: the task has no `kind`"),
    "unknown key": ("- name: a\n  fewshots: 3", r":2: `fewshots` is not a setting of a task; the nearest is fewshot\."),
    "unknown kind": ("- name: a\n  kind: chose\n  files: a.jsonl", r":2: kind 'chose': the value must be one of gen"),
    "set twice": ("- name: a\n  name: b", r":2: `name` is set twice"),
    "a number for a text": ("- {name: 5, kind: text, files: a.jsonl}", r":1: name 5: the value must be text"),
    "a text for a number": ("- {name: a, kind: text, files: a.jsonl, limit: all}", r"'all'.* whole number of at leas"),
    "bounds": (
        "- {name: a, kind: text, files: a.jsonl,\n   limit: 0}",
        r":2: limit 0: .* a whole number of at least 1",
    ),
    "an empty text": (
        "- {name: a, kind: text, files: ''}",
        r"files '': .* a text or a list of texts, none of them empt",
    ),
    "no file": ("- {name: a, kind: text, files: b.jsonl}", r"tasks\.yaml:1: files .*b\.jsonl: there is no such file"),
    "other kind": (
        "- {name: a, kind: text, files: a.jsonl,\n   choices: x}",
        r":2: `choices` is of the kind choose, b",
    ),
    "no prompt": (
        "- {name: a, kind: generate, files: a.jsonl}",
        r":1: the task a has no `prompt`, which generate needs",
    ),
    "metric": (
        "- {name: a, kind: text, files: a.jsonl,\n   metrics: perplexty}",
        r":2: .*not known; the nearest is perpl",
    ),
    "metric of another kind": (
        "- {name: a, kind: text, files: a.jsonl, metrics: bleu}",
        r"bleu is of the kind generate; text has perplexity, cross_entropy, bits_per_byte\.",
    ),
    "metric twice": ("- {name: a, kind: text, files: a.jsonl, metrics: [perplexity, perplexity]}", r"given twice"),
    "template": (
        "- name: a\n  kind: generate\n  files: a.jsonl\n  target: answer\n  prompt: '{{ question'",
        r":5: the template of `prompt` is not valid jinja: line 1: ",
    ),
    "rule": (
        "- {name: a, kind: generate, files: a.jsonl, prompt: q, target: a,\n   extract: last_numbr}",
        r":2: extract: last_numbr is not a rule; .*last_number",
    ),
    "keys": (
        "- {name: a, kind: preference, files: a.jsonl, data_keys: question}",
        r":1: --data-keys question: .*is not KE",
    ),
    "system without chat": (
        "- {name: a, kind: generate, files: a.jsonl, prompt: q, target: a, system: s}",
        r"`system` has no effect without chat: true",
    ),
    "seed of greedy": (
        "- {name: a, kind: generate, files: a.jsonl, prompt: q, target: a, top_k: 5}",
        r"`top_k` has no effect without temperature above 0",
    ),
    "few-shot settings": (
        "- {name: a, kind: generate, files: a.jsonl, prompt: q, target: a, fewshot_seed: 5}",
        r"`fewshot_seed` has no effect without fewshot",
    ),
    "split of a file": (
        "- {name: a, kind: text, files: a.jsonl, split: eval}",
        r"`split` has no effect without the folder",
    ),
    "stride": ("- {name: a, kind: text, files: a.jsonl, window: 8, stride: 9}", r"stride 9 is more than window 8"),
    "one name": (
        "- {name: a, kind: text, files: a.jsonl}\n- {name: a, kind: text, files: a.jsonl}",
        r":2: the task a has the name of the one at .*:1; rename",
    ),
}


@pytest.mark.parametrize("written", MISTAKES)
def test_a_mistake_is_one_sentence_with_file_and_line(folder: Path, written: str) -> None:
    text, sentence = MISTAKES[written]
    path = folder / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence) as caught:
        read_tasks(path)
    told = str(caught.value)
    assert "tasks.yaml" in told
    assert "\n" not in told
    assert told.endswith(".")
    assert not re.search(r"\. [A-Z]", told)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tasks .*none\.yaml cannot be read"):
        read_tasks(tmp_path / "none.yaml")


def test_ten_thousand_files_are_named_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / str(number % 100) / f"a{number}.json" for number in range(10_000)]
    name_of, start = names_of_places([*paths, tmp_path / "0/a:1"]), time.monotonic()
    for number, path in enumerate(paths):
        assert name_of(f"{path}: record 1") == f"{number % 100}/a{number}.json: record 1"
    assert time.monotonic() - start < 1, "not every row looks at every file"
    assert name_of(f"{tmp_path}/0/a:1:12") == "0/a:1:12"


CHANGED: dict[str, Any] = {
    "split": "eval",
    "limit": 7,
    "metrics": "bleu",
    "prompt": "answer",
    "chat": True,
    "description": "d",
    "target_delimiter": " ",
    "fewshot": 1,
    "fewshot_separator": "\n",
    "cut_long_prompts": True,
    "target": "question",
    "extract": "stripped",
    "extract_target": "stripped",
    "max_new_tokens": 3,
    "stop": "x",
    "temperature": 0.5,
}


@pytest.mark.parametrize("name", CHANGED)
def test_the_digest_is_another_one_when_a_setting_is(tmp_path: Path, name: str) -> None:
    for split in ("test", "eval"):
        write_rows(tmp_path / f"{split}.json", [ROW])
    settings = {"files": ".", "description": "Add.", **ASKING}
    before = task_of(tmp_path, **settings).digest
    assert task_of(tmp_path, **{**settings, name: CHANGED[name]}).digest != before


def test_the_digest_is_of_the_files_contents_and_not_of_where_they_are(folder: Path, tmp_path: Path) -> None:
    before = task_of(folder, files="a.jsonl", **ASKING).digest
    moved = tmp_path / "moved"
    moved.mkdir()
    write_rows(moved / "b.jsonl", [ROW])
    assert task_of(moved, files=str(moved / "b.jsonl"), **ASKING).digest == before
    write_rows(moved / "b.jsonl", [ROW, ROW])
    assert task_of(moved, files="b.jsonl", **ASKING).digest != before
    few = {**ASKING, "fewshot": 1, "fewshot_files": "b.jsonl"}
    write_rows(moved / "a.jsonl", [ROW])
    with_two = task_of(moved, files="a.jsonl", **few).digest
    write_rows(moved / "b.jsonl", [ROW])
    assert task_of(moved, files="a.jsonl", **few).digest != with_two


def test_every_field_is_read_by_some_kind_and_every_measure_too() -> None:
    names = {field.name for field in fields(Task)} - set(LOCATION)
    assert {name for read in FIELDS_OF.values() for name in read} == names
    of_kinds = {metric for kind in KINDS.values() for metric in kind.metrics()}
    assert of_kinds | statistics([]).keys() == set(MEASURES), "of a kind, or of a model beside its base"
    for kind in KINDS.values():
        assert set(kind.default_metrics) <= set(kind.metrics())


def test_several_tasks_keep_their_order(folder: Path) -> None:
    path = write_tasks(folder, *({"name": name, "kind": "text", "files": "a.jsonl"} for name in "cab"))
    assert [task.name for task in read_tasks(path)] == ["c", "a", "b"]


def shown_table() -> str:
    """The fields as Markdown: kinds that read them, value and default, and what their docstrings say."""
    body = next(node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)).body
    words = {
        node.target.id: inspect.cleandoc(following.value.value).replace("\n", " ")
        for node, following in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
    }
    lines = ["| field | kinds | value | default | what it is |", "|---|---|---|---|---|"]
    for name, option in declared(Task).items():
        if name in LOCATION:
            continue
        kinds = [kind for kind, read in FIELDS_OF.items() if name in read]
        needed = "files" if name in ("name", "kind", "files") else ""
        needed = needed or ", ".join(kind for kind, names in NEEDED_BY.items() if name in names)
        expected = "one text or a list" if get_origin(option.type) is tuple else option.expected
        default = "needed" if needed else "unset" if option.default in (None, ()) else _shown(option.default)
        of = "all" if len(kinds) == len(FIELDS_OF) else ", ".join(kinds)
        lines.append(f"| `{name}` | {of} | {expected} | {default} | {words[name]} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    text = str(default).lower() if isinstance(default, bool) else str(default).replace("\n", "\\n")
    return f"`{text}`" if text else "empty"


def test_the_documentation_shows_every_field() -> None:
    assert shown_table() in DOCUMENTATION.read_text(encoding="utf-8")


def test_the_tasks_of_the_documentation_are_tasks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "tasks.yaml").write_text(shown, encoding="utf-8")
    (tmp_path / "articles").mkdir()
    write_rows(tmp_path / "capitals.jsonl", [{"country": "France", "capital": ["Paris"]}])
    (tmp_path / "capitals_mc.csv").write_text("country,A,B,C,answer\nFrance,Nice,Paris,Brest,B\n")
    write_rows(tmp_path / "articles/a.jsonl", [{"text": "Paris is a city."}])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Paris?", "chosen": "Yes.", "rejected": "No."}])
    tasks = read_tasks(tmp_path / "tasks.yaml")
    assert sorted(task.kind for task in tasks) == sorted(KINDS)
    assert all(len(asked(task, tokenizer).examples) == 1 for task in tasks)


if __name__ == "__main__":
    print(shown_table())
