"""Mistakes of ``hft-megatron evaluate``: one sentence and exit code 2, before a model is built."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.checkpoint.folders import DIGESTS_FILE
from hft_megatron.checkpoint.position import FILE_NAME as POSITION_FILE
from hft_megatron.cli import evaluate, main
from hft_megatron.errors import EXIT_USAGE
from tests.support.evaluations import run_evaluate, words_of, write_all_kinds
from tests.support.models import make_llama
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.tasks import write_tasks
from tests.support.tokenizers import make_byte_level

TEXT = {"name": "t", "kind": "text", "files": "texts.jsonl"}
GENERATE = {"name": "g", "kind": "generate", "files": "rows.jsonl", "prompt": "question", "target": "answer"}
CHOOSE = {"name": "c", "kind": "choose", "files": "rows.jsonl", "prompt": "question", "choices": "options"}
SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, tasks and data, and models and files that are of no use."""
    folder = make_inputs(tmp_path_factory.mktemp("mistaken"))
    write_all_kinds(folder)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "model", folder / "untold")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "untold" / name).unlink()
    make_byte_level(make_llama(folder / "small", vocab_size=300))
    (folder / "weightless").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "weightless")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "there.json").write_text("{}")
    (folder / "nothing.jsonl").write_text("")
    rows = [{"question": "Say", "answer": "A", "options": ["one", " "]}]
    (folder / "empty_choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mistake_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of the command in this process."""
    capsys.readouterr()
    # This process lives on, and is no run of one rank.
    with patch.object(evaluate.launch, "place_this_process", lambda: None):
        code = main(["evaluate", *words])
    out, err = capsys.readouterr()
    assert code == EXIT_USAGE, err
    assert out == ""
    assert err.startswith("hft-megatron: error: ")
    assert err.count("\n") == 1
    return err


EARLY = [
    ("--tasks tasks.yaml", "--model is missing: name a Hugging Face folder or the --save folder of a run."),
    ("--model model", "--tasks is missing: name a YAML file of tasks, such as examples/tasks/text.yaml."),
    ("--model model --tasks absent.yaml", "--tasks absent.yaml"),
    ("--model model model --tasks tasks.yaml", "--model model is given twice; name every model once."),
    ("--model absent --tasks tasks.yaml", "--model absent has neither config.json"),
    ("--model empty --tasks tasks.yaml", "--model empty has neither config.json (a Hugging Face folder) nor run_id"),
    ("--model weightless --tasks tasks.yaml", "--model weightless"),
    ("--model model --base model --task-names texts", "--task-names texts needs --tasks, the file of the tasks"),
    ("--model model --tasks tasks.yaml --task-names textes", "--task-names textes: --tasks tasks.yaml has no such tas"),
    ("--model model --tasks tasks.yaml --limit 0", "--limit 0"),
    ("--model model --tasks tasks.yaml --batch-size 0", "--batch-size 0"),
    (
        "--model model --tasks tasks.yaml --output there.json",
        "there.json already exists; remove it, or choose another",
    ),
    (
        "--model model --tasks tasks.yaml --output results.txt",
        "--output results.txt: the result file is JSON; give it a",
    ),
    (
        "--model model --tasks tasks.yaml --tensor-model-parallel-size 3",
        "--tensor-model-parallel-size 3 does not divide",
    ),
    ("--model model --tasks tasks.yaml --tensor-model-parallel-size 2", "--tensor-model-parallel-size 2"),
    ("--compare there.json", "--compare there.json: give two result files."),
    (
        "--compare there.json absent.json",
        "there.json is not a result file of `hft-megatron evaluate --ta",
    ),
    ("--compare there.json there.json --limit 3", "--limit 3 cannot be used with --compare"),
    (
        "--model model --tasks tasks.yaml --frontier-learning loss",
        "--frontier-learning loss needs --frontier; add it, or leave --frontier-learning out.",
    ),
    ("--model adapter --tasks tasks.yaml", "--model adapter is an adapter without its model; merge the two first"),
    ("--model model --base absent --tasks tasks.yaml", "--base absent has neither config.json"),
    ("--model model --base small --tasks tasks.yaml", "cannot be compared weight by weight"),
    ("--compare there.json there.json --model model", "--model model cannot be used with --compare"),
]


@pytest.mark.parametrize(("command", "said"), EARLY, ids=[command for command, _ in EARLY])
def test_a_mistake_in_the_options_is_one_sentence(
    command: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert said in mistake_of(command.split(), capsys)
    assert sorted(folder.rglob("*")) == before


IN_TASKS: list[tuple[dict[str, Any], str]] = [
    ({**TEXT, "metrics": "perplexit"}, "the metric perplexit is not known; the nearest is perplexity."),
    ({**TEXT, "metrics": "accuracy"}, "the metric accuracy is of the kind choose; text has perplexity"),
    ({**TEXT, "files": "absent.jsonl"}, "there is no such file"),
    ({**TEXT, "kind": "texts"}, "kind 'texts': the value must be"),
    ({**GENERATE, "stopp": "x"}, "tasks.yaml:6: `stopp` is not a setting of a task; the nearest is stop."),
]
WHEN_READ: list[tuple[str, dict[str, Any], str]] = [
    ("model", {**TEXT, "text": "txt"}, "texts.jsonl:1: "),
    ("model", {**TEXT, "files": "nothing.jsonl"}, "the task t is empty"),
    ("model", {**GENERATE, **SHORT}, "the prompt has "),
    ("model", GENERATE, "max_new_tokens 256 of the task g leaves no token of the model's 128 for the prompt"),
    ("model", {**CHOOSE, "files": "empty_choice.jsonl", "answer": "answer"}, "choice 2 of 2 is empty; correct the row"),
    ("untold", TEXT, "untold has no tokenizer; name one with --tokenizer-model."),
    ("small", TEXT, "has ids up to 333, but the model's vocabulary has 300 rows; use the tokenizer that belongs to"),
]


@pytest.mark.parametrize(("task", "said"), IN_TASKS, ids=[said for _, said in IN_TASKS])
def test_a_mistake_in_the_tasks_file_is_one_sentence(
    task: dict[str, Any], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rows.jsonl", "texts.jsonl"):
        shutil.copy(folder / name, tmp_path)
    words = words_of(write_tasks(tmp_path, task), tmp_path / "results.json", folder / "model")
    assert said in mistake_of(words, capsys)
    assert not (tmp_path / "results.json").exists()


def test_what_is_found_in_data_and_tokenizers_is_one_sentence_on_every_rank(
    ranks: RankPools, folder: Path, tmp_path: Path
) -> None:
    for name in ("rows.jsonl", "texts.jsonl", "nothing.jsonl", "empty_choice.jsonl"):
        shutil.copy(folder / name, tmp_path)
    for model, task, said in WHEN_READ:
        words = words_of(write_tasks(tmp_path, task), tmp_path / "out" / "results.json", folder / model)
        for answer in ranks(2).run(run_evaluate, words=words):
            assert said in answer["mistake"]
            assert "\n" not in answer["mistake"]
            assert answer["said"] == []
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_one_of_several_models_has_names_it(ranks: RankPools, folder: Path, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "texts.jsonl"):
        shutil.copy(folder / name, tmp_path)
    narrow = tmp_path / "narrow"
    make_byte_level(make_llama(narrow, vocab_size=335, max_position_embeddings=16))
    tasks = write_tasks(tmp_path, {**TEXT, "window": 24})
    [answer] = ranks(1).run(run_evaluate, words=words_of(tasks, tmp_path / "new.json", folder / "model", narrow))
    assert answer["mistake"].startswith(
        f"--model {narrow}: {tasks}:1: window 24 of the task t is more than the 16 tokens"
    )
    tasks = write_tasks(tmp_path, TEXT)
    [answer] = ranks(1).run(run_evaluate, words=words_of(tasks, tmp_path / "new.json", folder / "model", narrow))
    assert answer["mistake"] is None, "each reads its own windows of the same texts"
    assert sum(" 16 positions" in line or " 128 positions" in line for line in answer["said"]) == 2


def test_a_run_without_a_good_checkpoint_is_one_sentence(
    ranks: RankPools, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ranks(2).run(
        run_sft_words,
        words=words_for(folder, "--train-iters", 2, "--lr-warmup-iters", 0, "--save", run, "--save-interval", 1),
    )
    words = words_of(folder / "tasks.yaml", tmp_path / "out" / "results.json", run)
    weights = max((run / "iter_0000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for answer in ranks(2).run(run_evaluate, words=words):
        assert f"--model {run}: {weights} is not as it was saved (sha256 " in answer["mistake"]
        assert answer["mistake"].endswith("; evaluate another checkpoint, or copy this one again.")
    position = run / "iter_0000001" / POSITION_FILE
    position.write_text(position.read_text().replace("1", "2", 1))
    older = words_of(folder / "tasks.yaml", tmp_path / "out" / "results.json", run / "iter_0000001")
    for answer in ranks(2).run(run_evaluate, words=older):
        assert f"{position} is not as it was saved (sha256 " in answer["mistake"]
    position.write_text(position.read_text().replace("iteration", "lteration", 1))
    assert f"--model {run}: iter_0000001/{POSITION_FILE} cannot be read (" in mistake_of(older, capsys)
    (run / "iter_0000001" / DIGESTS_FILE).unlink()
    assert f"{run / 'iter_0000001'} is not a complete checkpoint; name another" in mistake_of(older, capsys)
    for name in ("iter_0000001", "iter_0000002"):
        shutil.rmtree(run / name)
    assert f"--model {run} holds no complete checkpoint" in mistake_of(words, capsys)
