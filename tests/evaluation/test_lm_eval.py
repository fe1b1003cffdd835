"""Tasks of lm-evaluation-harness give what its own hf model gives, at every layout. Run: pytest tests/evaluation"""

import json
import os
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import RankFailed, UserError
from hft_megatron.evaluation import lm_eval as ours
from hft_megatron.evaluation.forward import ModelInPlace, free_memory
from hft_megatron.evaluation.saved_models import SavedModel
from hft_megatron.evaluation.service import Service
from tests.support.evaluations import run_evaluate
from tests.support.models import LAYOUTS, build_from_folder, make_llama
from tests.support.ranks import RankPools
from tests.support.tokenizers import CORPUS, make_byte_level

pytestmark = pytest.mark.slow(reason="the harness and its tasks are imported on every rank")

VOCAB_SIZE = 335
WORDS = sorted({word for text in CORPUS for word in text.split()})
STOPS = ["t", "<|im_start|>"]
"""A letter that comes inside of tokens, and a special token."""
BEGIN, START_OF_TURN, END = 330, 331, 332
"""Ids of special tokens."""
OFTEN = "^"
"""What the model says often."""
TASKS = ["own_choice", "own_rolling", "own_texts", "own_drawn_out"]


def write_tasks(folder: Path) -> Path:
    """Tasks of every kind of request, of files beside them."""
    folder.mkdir()
    draws = random.Random(5)

    def words(count: int) -> str:
        return " ".join(draws.choices(WORDS, k=count))

    rows = {
        "choice": [
            {"query": f"{words(draws.randint(0, 12))} ", "choices": [words(n) for n in (1, 3, 1)], "gold": n % 3}
            for n in range(12)
        ],
        # Longer than the model's 128 tokens, so that there are several windows, and shorter.
        "rolling": [{"text": words(count)} for count in (90, 3, 40, 1, 120)],
        "texts": [{"question": words(draws.randint(1, 20)), "answer": words(1)} for _ in range(9)],
    }
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))

    def task(name: str, data: str, **settings: Any) -> None:
        files = {"test": str(folder / f"{data}.jsonl")}
        common = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **settings}))

    task(
        "own_choice",
        "choice",
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        fewshot_split="test",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    task(
        "own_rolling",
        "rolling",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )
    generated = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "fewshot_split": "test",
        "metric_list": [{"metric": "exact_match"}],
    }
    task("own_texts", "texts", generation_kwargs={"until": STOPS, "max_gen_toks": 24}, **generated)
    # The prompts of two shots leave no room for it without being cut.
    task("own_drawn_out", "texts", generation_kwargs={"until": "\n\n", "max_new_tokens": 90}, **generated)
    task("own_beams", "texts", generation_kwargs={"until": STOPS, "num_beams": 4}, **generated)
    task("own_long", "texts", generation_kwargs={"until": STOPS, "max_gen_toks": 128}, **generated)
    task("own_code", "texts", unsafe_code=True, **generated)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and tasks."""
    folder = tmp_path_factory.mktemp("lm_eval")
    make_llama(folder / "model", vocab_size=VOCAB_SIZE, bos_token_id=BEGIN, eos_token_id=END)
    make_byte_level(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    head = weights["lm_head.weight"]
    head[END] *= 4  # so that it comes now and then
    [often] = load_tokenizer(None, folder / "model").encode(OFTEN)
    head[START_OF_TURN] = head[often] * 1.1
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    write_tasks(folder / "tasks")
    make_llama(folder / "other", vocab_size=VOCAB_SIZE, bos_token_id=BEGIN, eos_token_id=END)
    make_byte_level(folder / "other")
    return folder


@contextmanager
def offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1 in the environment, which the libraries read when they are imported."""
    import datasets
    import huggingface_hub

    with (
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


def open_model(folder: str, layout: dict[str, Any]) -> ModelInPlace:
    chunks, _, placement = build_from_folder(folder, layout)
    return ModelInPlace(chunks=[chunk.eval() for chunk in chunks], placement=placement)


def found(results: dict[str, Any]) -> dict[str, Any]:
    """The values of tasks, and what the model answered to every example."""
    values = {
        task: {name: value for name, value in of_task.items() if isinstance(value, float)}
        for task, of_task in results["results"].items()
    }
    answers = {
        task: [
            [response[0] for response in example["resps"]] for example in sorted(examples, key=lambda e: e["doc_id"])
        ]
        for task, examples in results["samples"].items()
    }
    return {"values": values, "answers": answers}


def run_tasks(folder: str, layout: dict[str, Any], tasks: list[str], **options: Any) -> dict[str, Any]:
    """What ``found`` says on rank 0, with the lines that were said; the error of a task where it has one."""
    said: list[str] = []
    tokenizer = load_tokenizer(None, f"{folder}/model")
    model = open_model(f"{folder}/model", layout)
    with offline():
        try:
            asked = ours.find_tasks(tasks, f"{folder}/tasks")
            results = ours.run_lm_eval(model, tokenizer, asked, batch_size=4, say=said.append, **options)
        except UserError as error:
            return {"error": str(error)}
    return {**(found(results) if results else {}), "said": said}


def by_hf(folder: Path, **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with offline():
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder / "model"), "dtype": "float32"},
            device="cpu",
            # In a batch it continues until all texts have ended, and finds special tokens among their ends no more.
            batch_size=1,
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            **options,
        )
    assert results is not None
    return found(dict(results))


FEW = {"tasks": TASKS, "num_fewshot": 2, "limit": 7}


@pytest.fixture(scope="module")
def expected(inputs: Path) -> dict[int | None, dict[str, Any]]:
    """Of the harness's own model: all examples without others before them, and some behind two."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    return {None: by_hf(inputs, tasks=TASKS), 2: by_hf(inputs, **FEW)}


@pytest.mark.parametrize("layout", ["tp1", "tp2_sp", "pp2", "dp2", "tp2_pp2"])
def test_every_value_and_answer_is_that_of_the_harness_own_model(
    layout: str, expected: dict[int | None, dict[str, Any]], inputs: Path, ranks: RankPools
) -> None:
    size = {"tp1": 1, "tp2_pp2": 4}.get(layout, 2)
    for shots, of_hf in expected.items():
        if shots and layout not in ("tp1", "dp2"):
            continue
        options = FEW if shots else {"tasks": TASKS, "num_fewshot": None, "limit": None}
        first, *others = ranks(size).run(run_tasks, folder=str(inputs), layout=LAYOUTS[layout], **options)
        assert all("values" not in other for other in others)
        assert first["values"].keys() == set(TASKS)
        for task in TASKS:
            assert first["values"][task] == pytest.approx(of_hf["values"][task], rel=1e-4), task
            for mine, theirs in zip(first["answers"][task], of_hf["answers"][task], strict=True):
                for one, other in zip(mine, theirs, strict=True):
                    if isinstance(other, str):
                        assert one == other
                    elif isinstance(other, float):
                        assert one == pytest.approx(other, abs=1e-3)
                    else:
                        assert one == [pytest.approx(other[0], abs=1e-3), other[1]]


def test_the_tasks_of_the_comparison_reach_what_could_differ(expected: dict[int | None, dict[str, Any]]) -> None:
    texts, drawn_out = ([text for [text] in expected[None]["answers"][task]] for task in ("own_texts", "own_drawn_out"))
    assert not any(stop in text for text in texts for stop in STOPS)
    for of_task in (texts, drawn_out):
        assert len({len(text) for text in of_task}) >= 3, "texts end in different places"
    assert 0 < expected[None]["values"]["own_choice"]["acc,none"] < 1


def test_what_is_cut_is_counted(inputs: Path, ranks: RankPools) -> None:
    [answer] = ranks(1).run(run_tasks, folder=str(inputs), layout={}, tasks=["own_drawn_out"], num_fewshot=2, limit=4)
    assert any("4 of 4 texts are longer than the model's context of 128 tokens allows" in s for s in answer["said"])


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "own_choise",
            "--lm-eval-tasks own_choise: lm-evaluation-harness has no such task; the nearest is own_choice",
        ),
        (
            "arc_easy",
            "--lm-eval-tasks: lm-evaluation-harness cannot read the data of arc_easy (Couldn't reach 'allenai/ai2_arc'",
        ),
        ("own_beams", "sets num_beams to 4 in generation_kwargs, which is not supported"),
        ("own_long", "generates up to 128 tokens (max_gen_toks), but the model's context of 128"),
        ("own_code", "--lm-eval-tasks: the task own_code runs code that a model wrote"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_sentence_on_every_rank(
    task: str, said: str, inputs: Path, ranks: RankPools
) -> None:
    answers = ranks(2).run(
        run_tasks, folder=str(inputs), layout=LAYOUTS["pp2"], tasks=[task], num_fewshot=None, limit=None
    )
    assert len({answer["error"] for answer in answers}) == 1
    assert said in answers[0]["error"]
    assert "\n" not in answers[0]["error"]


def run_watched(words: list[list[str]]) -> dict[str, Any]:
    """The command with this rank's words, and what was done with models: ``digests`` are taken of them, and ``opened``
    says of each how many earlier ones were still in memory."""
    digests: list[str] = []
    opened: list[int] = []
    models: list[Any] = []
    digest, open_one = SavedModel.digest, SavedModel.open

    def noted_digest(saved: SavedModel, *args: Any) -> str:
        assert not opened, "all digests come first"
        digests.append(Path(saved.name).name)
        return digest(saved, *args)

    def noted_open(saved: SavedModel, *args: Any, **options: Any) -> ModelInPlace:
        opened.append(sum(model() is not None for model in models))
        model = open_one(saved, *args, **options)
        models.append(weakref.ref(model.chunks[0]))
        return model

    with patch.object(SavedModel, "digest", noted_digest), patch.object(SavedModel, "open", noted_open), offline():
        answer = run_evaluate(words[int(os.environ["RANK"]) % len(words)])
    return {**answer, "digests": digests, "opened": opened}


def words_of_command(inputs: Path, *models: str, task: str = "own_rolling", include: str = "tasks") -> list[str]:
    words = ["--model", *(str(inputs / model) for model in models), "--no-bf16", "--limit", "1"]
    return [*words, "--lm-eval-tasks", task, "--lm-eval-include", str(inputs / include)]


def test_two_models_come_one_after_the_other(inputs: Path, ranks: RankPools, tmp_path: Path) -> None:
    output = tmp_path / "harness.json"
    words = [*words_of_command(inputs, "model", "other"), "--output", str(output)]
    for answer in ranks(2).run(run_watched, words=[words]):
        assert answer["mistake"] is None
        assert answer["digests"] == ["model", "other"]
        assert answer["opened"] == [0, 0]
    first, second = json.loads(output.read_text()).values()
    assert first["digest"] != second["digest"]
    assert first["results"]["own_rolling"] != second["results"]["own_rolling"]


def test_ranks_that_have_other_models_say_so_before_one_is_built(inputs: Path, ranks: RankPools) -> None:
    words = [words_of_command(inputs, "model"), words_of_command(inputs, "other")]
    for answer in ranks(2).run(run_watched, words=words):
        assert answer["opened"] == []
        assert answer["mistake"].startswith(
            "rank 1 found other config.json, iterations, models, tokenizers than rank 0"
        )


@pytest.mark.parametrize(
    ("mistaken", "said"),
    [
        ({"task": "own_choise"}, "--lm-eval-tasks own_choise: lm-evaluation-harness has no such task"),
        ({"include": "nowhere"}, "--lm-eval-include "),
    ],
)
def test_a_mistake_is_said_before_a_model_is_read(
    mistaken: dict[str, str], said: str, inputs: Path, ranks: RankPools
) -> None:
    for answer in ranks(2).run(run_watched, words=[words_of_command(inputs, "model", **mistaken)]):
        assert answer["mistake"].startswith(said)
        assert (answer["digests"], answer["opened"]) == ([], [])


def test_memory_that_torch_keeps_of_a_gpu_is_given_back() -> None:
    with patch.object(torch.cuda, "empty_cache") as given_back:
        free_memory(torch.device("cpu"))
        assert not given_back.called
        free_memory(torch.device("cuda"))
        assert given_back.called


def run_failing(folder: str) -> str:
    """What this rank ends with where rank 0 fails in the middle of its work."""
    service = Service(open_model(folder, LAYOUTS["tp2"]), load_tokenizer(None, folder), batch_size=2, say=print)

    def work() -> None:
        raise ZeroDivisionError

    try:
        service.run(work, name="its sums")
    except (RankFailed, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_failure_of_rank_0_ends_the_service_of_the_others(inputs: Path, ranks: RankPools) -> None:
    first, second = ranks(2).run(run_failing, folder=str(inputs / "model"))
    assert first == "ZeroDivisionError: "
    assert second == "RankFailed: rank 0 cannot continue with its sums; its traceback says why."


def test_without_the_harness_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], object] = lambda name: None  # noqa: E731
    monkeypatch.setattr(ours.importlib.util, "find_spec", find)
    with pytest.raises(UserError, match=r"pip install 'hft-megatron\[lm-eval\]'"):
        ours.check_lm_eval()
