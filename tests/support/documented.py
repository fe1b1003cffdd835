"""The commands of README.md and docs/, and a folder to run them in with tiny models and data of the pages' names."""

import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.support.corpora import random_documents, write_corpus
from tests.support.forked import REPOSITORY
from tests.support.models import make_llama
from tests.support.preferences import write_pairs
from tests.support.runs import write_data
from tests.support.tokenizers import make_byte_level

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
Manner = Literal["as it is", "check", "stub", "no"]
_BLOCK = re.compile(
    r"(?:^<!-- run: (?P<manner>[^\n]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*|\{eval-rst\})\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_ROOTS = re.compile(r"(?<![\w.$])/(models|data|runs)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    """Where its text begins, from 1."""
    language: str
    manner: Manner
    """How a test runs it: as it is; with --check, on one process; against stubs of a cluster's commands; or not."""
    why: str
    """For those that are not run."""
    text: str


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page in their order; ValueError for a comment that names no manner."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _BLOCK.finditer(text):
        manner, _, why = (match["manner"] or "as it is").partition(", ")
        if manner not in ("as it is", "check", "stub", "no"):
            raise ValueError(f"{page.name}: {match['manner']!r} is no manner to run a block")
        lines = match["text"].splitlines(keepends=True)
        found.append(
            Block(
                page=page.name,
                line=text.count("\n", 0, match.start("text")) + 1,
                language=match["language"],
                manner=manner,  # type: ignore[arg-type]
                why=why,
                text="".join(line.removeprefix(match["indent"]) for line in lines),
            )
        )
    return found


LAUNCHER = """#!/bin/bash
# In place of torchrun, and of bash for the scripts that start ranks: one process for all of them, which only checks.
nodes=${NNODES:-1} ranks=${GPUS_PER_NODE:-8}
while (($#)); do
    case $1 in
        --nproc[-_]per[-_]node=*) ranks=${1#*=}; shift ;;
        --nproc[-_]per[-_]node) ranks=$2; shift 2 ;;
        --nnodes=*) nodes=${1#*=}; shift ;;
        --nnodes) nodes=$2; shift 2 ;;
        --no-python | --standalone) shift ;;
        --*=*) shift ;;
        --*) shift 2 ;;
        *) break ;;
    esac
done
export WORLD_SIZE=$((nodes * ranks)) LOCAL_WORLD_SIZE=$ranks GROUP_WORLD_SIZE=$nodes RANK=0 LOCAL_RANK=0
export TORCHELASTIC_RUN_ID=docs TORCHELASTIC_ERROR_FILE=$(mktemp -d)/attempt_0/0/error.json
if [[ $1 == -m ]]; then exec python -m hft_megatron "${@:3}" --check; fi
exec /bin/bash "$@" --check
"""
CHECKING = """#!/bin/bash
# hft-megatron whose commands that train only check their options.
case $1 in sft | dpo | pretrain | continual) exec python -m hft_megatron "$@" --check ;; esac
exec python -m hft_megatron "$@"
"""
PLAIN = """#!/bin/bash
exec python -m hft_megatron "$@"
"""
STUB = """#!/bin/bash
# In place of a cluster's command: it takes anything.
echo "${0##*/} $*"
"""
MAKE_DEMO = """
import sys
from pathlib import Path
import prepare
prepare._pretrain = lambda folder, lock: folder.model.mkdir()
prepare._recalled_facts = lambda folder: 1.0
prepare.prepare(Path(sys.argv[1]))
"""
"""The folder of tools/demo/prepare.py, without its training."""
STUBS = (
    "apptainer",
    "docker",
    "enroot",
    "kubectl",
    "nvidia-smi",
    "rsync",
    "sbatch",
    "scancel",
    "scontrol",
    "squeue",
    "srun",
)


class Sandbox:
    """A copy of the repository's folders for users, beside ``models``, ``data`` and ``runs``."""

    def __init__(self, root: Path, tiny: Path) -> None:
        """``tiny`` has what ``make_tiny`` makes."""
        self.root, self._tiny = root, tiny
        for name in ("models", "data", "runs", "here"):
            (root / name).mkdir(parents=True)
        for name in ("examples", "hft_megatron", "tools", "docker", "constraints", "setup.py"):
            (self.here / name).symlink_to(REPOSITORY / name)
        (self.here / "runs").mkdir()
        (self.here / "runs" / "demo").symlink_to(tiny / "demo")
        for file in (tiny / "data").iterdir():
            (root / "data" / file.name).symlink_to(file)
        self._bin("plain", {"hft-megatron": PLAIN})
        self._bin("check", {"hft-megatron": CHECKING, "torchrun": LAUNCHER, "bash": LAUNCHER})
        self._bin("stub", dict.fromkeys(STUBS, STUB))

    @property
    def here(self) -> Path:
        """The working folder: the repository's root to its commands."""
        return self.root / "here"

    def run(self, block: Block) -> None:
        """Raises AssertionError with what a block wrote where it fails."""
        text = self._placed(block.text)
        if block.language == "python":
            words = [sys.executable, "-c", text]
            if block.manner == "no":
                compile(text, f"{block.page}:{block.line}", "exec")
                return
        else:
            words = ["/bin/bash", "-euo", "pipefail", *(["-n"] if block.manner == "no" else []), "-c", text]
        done = subprocess.run(
            words,
            cwd=self.here,
            env=self._environment(block.manner),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block.page}:{block.line}\n{text}\n{done.stdout[-4000:]}"

    def _placed(self, text: str) -> str:
        """The text with folders of its own, and the models that it names there."""
        for name in re.findall(r"/models/([\w.-]+)", text):
            if not (self.root / "models" / name).exists():
                make = self._stand_in_adapter if name.endswith("-lora") else self._stand_in
                make(self.root / "models" / name)
        return _ROOTS.sub(lambda match: f"{self.root}/{match[1]}", text)

    def _stand_in(self, folder: Path) -> None:
        """A model in ``folder``, whose weights are near those of the page's other models."""
        others = sum(1 for _ in folder.parent.iterdir())
        shutil.copytree(self._tiny / "model", folder)
        noise = torch.Generator().manual_seed(others)
        weights = load_file(folder / "model.safetensors")
        moved = {
            name: each + others * 1e-3 * torch.randn(each.shape, generator=noise) for name, each in weights.items()
        }
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})

    def _stand_in_adapter(self, folder: Path) -> None:
        """An adapter of PEFT's in ``folder``."""
        from peft import LoraConfig, get_peft_model

        model = LlamaForCausalLM.from_pretrained(self._tiny / "model")
        options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, options).save_pretrained(folder)

    def _environment(self, manner: Manner) -> dict[str, str]:
        bins = [self.root / "bin" / name for name in (["check"] if manner == "check" else []) + ["stub", "plain"]]
        removed = ("RANK", "WORLD_SIZE", "PYTHON", "HFT_TEST_DATA")
        kept = {name: value for name, value in os.environ.items() if name not in removed}
        return kept | {
            "PATH": ":".join([*map(str, bins), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
        }

    def _bin(self, name: str, scripts: dict[str, str]) -> None:
        folder = self.root / "bin" / name
        folder.mkdir(parents=True)
        for command, text in scripts.items():
            (folder / command).write_text(text)
            (folder / command).chmod(stat.S_IRWXU)


def make_tiny(folder: Path) -> Path:
    """``model``, which TP 8 and PP 8 can cut, ``data`` with the files of the pages, ``demo`` with random weights."""
    make_llama(
        folder / "model",
        vocab_size=335,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    make_byte_level(folder / "model")
    demo = folder / "demo"
    subprocess.run([sys.executable, "-c", MAKE_DEMO, demo], cwd=REPOSITORY / "tools" / "demo", check=True)
    make_llama(demo / "model", vocab_size=1024, max_position_embeddings=128)
    shutil.copy(demo / "tokenizer.model", demo / "model")
    data = folder / "data"
    data.mkdir()
    write_data(data / "train.jsonl", 300)
    write_data(data / "chat.jsonl", 100)
    write_data(data / "valid.jsonl", 24)
    write_pairs(data / "pairs.jsonl", 300)
    (data / "corpus.txt").write_text("Once upon a time there was a bridge.\n" * 2000)
    write_corpus(data / "corpus", random_documents(80, vocab_size=40))
    return folder
