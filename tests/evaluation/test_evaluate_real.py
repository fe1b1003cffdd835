"""Published tasks put to a published model and to one that was tuned from it. Run: pytest tests/evaluation"""

import json
from pathlib import Path

import pytest
import torch

from tests.support.evaluations import records_of, results_of, run_evaluate, words_of
from tests.support.ranks import RankPools
from tests.support.runs import run_sft_words
from tests.support.tasks import write_tasks

TRACE = {"C-STANCE": "exact_match", "FOMC": "exact_match", "MeetingBank": "rouge_l", "Py150": "code_similarity",
         "ScienceQA": "exact_match", "NumGLUE-cm": "exact_match", "NumGLUE-ds": "exact_match",
         "20Minuten": "sari"}  # fmt: skip
MAX_PAIR = 900
"""Characters of a pair's answers, of which the model reads 512 tokens."""


def write_real_tasks(folder: Path, data: Path) -> Path:
    """Few rows of each, and short answers: the model is of 260,000 parameters."""
    made = {"prompt": "prompt", "target": "answer", "max_new_tokens": 12, "cut_long_prompts": True}
    trace = [
        {"name": name, "kind": "generate", "files": str(data / "trace/mini" / name), "metrics": metric, "limit": 2}
        for name, metric in TRACE.items()
    ]
    lines = (data / "preference/ultrafeedback_eval.jsonl").read_text().splitlines()
    short = [
        line
        for line in lines
        if max(len(json.dumps(json.loads(line)[key])) for key in ("chosen", "rejected")) < MAX_PAIR
    ]
    (folder / "pairs.jsonl").write_text("\n".join(short[:6]))
    gsm8k = {"name": "gsm8k", "kind": "generate", "files": str(data / "gsm8k/test.jsonl"), "limit": 3}
    gsm8k |= {"prompt": "Question: {{ question }}\nAnswer:", "extract": "last_number", "extract_target": "final_answer"}
    stories = {"name": "stories", "kind": "text", "files": str(data / "text/tinystories_2mb.txt"), "limit": 8}
    stories |= {"separator": "<|endoftext|>", "metrics": ["perplexity", "bits_per_byte", "cross_entropy"]}
    pairs = {"name": "pairs", "kind": "preference", "files": "pairs.jsonl", "cut_long_prompts": True}
    return write_tasks(folder, {**made, **gsm8k}, *({**made, **task} for task in trace), stories, pairs)


def nats_by_transformers(folder: Path, text: str) -> tuple[float, int]:
    """Of a text behind the begin token, in a window that holds it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids])
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    return -float(logits[0, :-1].gather(1, ids[0, 1:, None]).double().sum()), ids.size(1) - 1


@pytest.mark.slow(reason="a tuning, and eleven tasks twice")
def test_a_published_model_and_one_tuned_from_it_on_published_tasks(
    ranks: RankPools, shared_data: Path, tmp_path: Path
) -> None:
    base, run = shared_data / "stories260K", tmp_path / "run"
    words = ["--load-hf", base, "--train-data-path", shared_data / "trace/mini/NumGLUE-cm", "--long-examples", "drop"]
    words += ["--train-iters", 12, "--global-batch-size", 8, "--lr", 3e-3, "--lr-warmup-iters", 2, "--no-bf16"]
    words += ["--save", run, "--save-interval", 12]
    ranks(2).run(run_sft_words, words=[str(word) for word in words])
    output = tmp_path / "results.json"
    tasks = write_real_tasks(tmp_path, shared_data)
    words = words_of(tasks, output, base, run, batch_size=8, tensor_model_parallel_size=2)
    answers = ranks(2).run(run_evaluate, words=words)
    assert answers[0]["mistake"] is None
    print(answers[0]["said"][-1])
    models = results_of(output)["models"]
    assert [model["iteration"] for model in models] == [None, 12]
    assert [len(model["tasks"]) for model in models] == [11, 11]
    values = [{task["name"]: task["values"] for task in model["tasks"]} for model in models]
    for of_task in values[0].values():
        assert all(value is not None for value in of_task.values())
    assert values[0]["stories"]["perplexity"] < 5, "these are what the model was trained on"
    assert values[1]["stories"]["bits_per_byte"] > values[0]["stories"]["bits_per_byte"], "it has forgotten some"
    assert models[0]["tasks"][3]["counts"]["prompts_cut"] > 0

    texts = (shared_data / "text/tinystories_2mb.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    by_place = [record for record in records_of(output) if record["task"] == "stories"]
    short = min(range(8), key=lambda number: len(texts[number]))
    nats, tokens = nats_by_transformers(base, texts[short].strip("\n"))
    assert (by_place[short]["nats"], by_place[short]["tokens"]) == (pytest.approx(nats, abs=2e-3), tokens)
