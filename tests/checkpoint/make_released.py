"""Makes the checkpoint that this version leaves to later ones: tests/checkpoint/released/VERSION.tar.gz.

Run when a version is released, and before that when the format changes: python -m tests.checkpoint.make_released
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from hft_megatron import __version__
from tests.support.models import make_llama
from tests.support.ranks import REPOSITORY
from tests.support.runs import read_metrics, write_data

RELEASED = Path(__file__).parent / "released"
"""Of archives, because most of a checkpoint of a tiny model is what torch.save puts around each of its tensors."""
EXPECTED_FILE = "expected.json"
"""In the archive, beside the folders ``model`` and ``run``: the options to resume with, and the losses that follow."""
SAVED, LAST = 2, 4
"""The iteration of the checkpoint, and the one that ``expected.json`` goes to."""

WORDS = [
    *("--load-hf", "model", "--train-data-path", "data.jsonl", "--seq-length", "96", "--global-batch-size", "4"),
    *("--lr", "1e-2", "--lr-decay-style", "constant", "--no-bf16"),
    # Everything that a checkpoint can hold: the second round's plan, moments, and those of units that are frozen in it.
    *("--hft-round-interval", "1", "--hft-moments", "carry", "--hft-resting-moments", "host"),
]
"""Folders are named relative to the one that all is in."""


def make_model(folder: Path) -> None:
    """A LLaMA of two layers with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|bos|>", "<|eos|>", "<|pad|>")])
    bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    make_llama(
        folder,
        "tied",
        vocab_size=tokenizer.get_vocab_size(),
        num_key_value_heads=1,
        bos_token_id=256,
        eos_token_id=257,
        **sizes,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def train(folder: Path, *words: object) -> None:
    """``hft-megatron sft`` on one rank inside ``folder``."""
    command = [sys.executable, "-m", "hft_megatron", "sft", *WORDS, *(str(word) for word in words)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=folder, env=environment, check=True)


def make(folder: Path) -> None:
    """Everything that the archive holds."""
    make_model(folder / "model")
    write_data(folder / "data.jsonl", 6)
    train(folder, "--save", "whole", "--train-iters", LAST)
    losses = {line["iteration"]: line["lm loss"] for line in read_metrics(folder / "whole")}
    shutil.rmtree(folder / "whole")
    expected = {
        "words": [*WORDS, "--train-iters", str(LAST)],
        "losses": {str(iteration): losses[iteration] for iteration in range(SAVED + 1, LAST + 1)},
    }
    (folder / EXPECTED_FILE).write_text(json.dumps(expected, indent=1) + "\n")
    train(folder, "--save", "run", "--train-iters", SAVED)


def main() -> None:
    RELEASED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        shutil.make_archive(str(RELEASED / __version__), "gztar", folder)


if __name__ == "__main__":
    main()
