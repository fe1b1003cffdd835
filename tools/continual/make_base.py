"""Makes the base model of the tasks of make_tasks.py: a LLaMA of a million parameters that knows their language.

Run: ``python tools/continual/make_base.py [--output runs/continual/base] [--seed 1] [--steps 400]`` (some minutes on
two cores). It learns texts of the language, and to answer in formats like those of the tasks: repeat a text, find a
sentence, say what a thing is and what a word means, and compute with numbers. No row has a rule of one of the tasks.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from make_tasks import CLASS_OF, NOUNS, PLAIN, TASKS, Row, general_text, make_task, sentence

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "tools" / "demo"))

from launching import cpu_environment, exit_code_of, run_logged  # noqa: E402

VOCABULARY = 768
RANKS = 2
BATCH = 32
"""Packs of LENGTH tokens per step."""
LENGTH = 128
ROWS = 20_000
MODEL_OPTIONS = (
    *("--num-layers", "4"),
    *("--hidden-size", "128"),
    *("--ffn-hidden-size", "336"),
    *("--num-attention-heads", "4"),
    *("--max-position-embeddings", str(LENGTH)),
    "--untie-embeddings-and-output-weights",
)


def training_row(rng: random.Random) -> Row:
    """A text of the language, as a row with an empty prompt, or a question with its answer."""
    make = rng.choice((_text, _text, _repeat, _find, _know, _compute))
    return make(rng)


def _text(rng: random.Random) -> Row:
    return {"prompt": "", "answer": general_text(rng, 6)}


def _repeat(rng: random.Random) -> Row:
    text = sentence(rng)
    return {"prompt": f"Repeat the text.\nText:\n{text}\nAnswer:", "answer": text}


def _find(rng: random.Random) -> Row:
    sentences = [sentence(rng), sentence(rng)]
    asked = rng.choice(sentences)
    prompt = f"Repeat what {asked.split()[0]} does.\nText:\n{' '.join(sentences)}\nAnswer:"
    return {"prompt": prompt, "answer": asked}


def _know(rng: random.Random) -> Row:
    if rng.random() < 0.5:
        noun = rng.choice(NOUNS)
        return {"prompt": f"Say what the {noun} is.\nAnswer:", "answer": CLASS_OF[noun]}
    hard = rng.choice(tuple(PLAIN))
    return {"prompt": f"Say {hard} in another way.\nAnswer:", "answer": PLAIN[hard]}


def _compute(rng: random.Random) -> Row:
    one, other = rng.randint(1, 9), rng.randint(1, 9)
    if rng.random() < 0.5:
        return {"prompt": f"Question:\n{one} plus {other}\nAnswer:", "answer": str(one + other)}
    one, other = max(one, other), min(one, other)
    return {"prompt": f"Question:\n{one} minus {other}\nAnswer:", "answer": str(one - other)}


def _write_tokenizer(path: Path, rows: list[Row], seed: int) -> None:
    import sentencepiece

    of_tasks = [row for name in TASKS for row in make_task(name, seed, (500, 0, 0))["train"]]
    corpus = [row["prompt"] + row["answer"] for row in [*rows, *of_tasks]]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            vocab_size=VOCABULARY,
            model_type="bpe",
            character_coverage=1.0,
            normalization_rule_name="identity",
            split_digits=True,  # so that no piece has the end of a prompt and the number after it
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )


def make_base(folder: Path, seed: int, steps: int) -> None:
    """Writes the tokenizer, the training rows and, in ``model``, the Hugging Face folder of the base."""
    folder.mkdir(parents=True)
    rng = random.Random(f"base {seed}")
    rows = [training_row(rng) for _ in range(ROWS)]
    data, tokenizer = folder / "train.json", folder / "tokenizer.model"
    data.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    _write_tokenizer(tokenizer, rows, seed)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)),
        *("-m", "hft_megatron", "sft", *MODEL_OPTIONS, "--tokenizer-model", str(tokenizer)),
        *("--train-data-path", str(data), "--packing", "--seq-length", str(LENGTH), "--hft-ratio", "1"),
        *("--train-iters", str(steps), "--global-batch-size", str(BATCH), "--micro-batch-size", str(BATCH // RANKS)),
        *("--lr", "3e-3", "--min-lr", "1e-4", "--lr-warmup-iters", "30", "--adam-beta2", "0.98", "--seed", str(seed)),
        *("--save-hf", str(folder / "model"), "--log-interval", "20", "--no-bf16"),
    ]
    environment = cpu_environment({"OMP_NUM_THREADS": "1"})
    run_logged(command, environment=environment, folder=REPOSITORY, log=folder / "base.log")


def main() -> int:
    """Makes the base that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make the base model of the continual tasks.")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "continual" / "base", help="new folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} already exists; remove it, or name another folder")
    return exit_code_of(lambda: make_base(arguments.output.resolve(), arguments.seed, arguments.steps))


if __name__ == "__main__":
    sys.exit(main())
