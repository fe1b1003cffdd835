"""Makes the demo's model and data, once: generates the knowledge, trains a tokenizer, and has the trainer teach a small
LLaMA the old knowledge at ratio 1.

Run: ``python tools/demo/prepare.py [--output runs/demo]``. A complete folder is left as it is, an interrupted one is
completed, and of several processes that call at once one works while the others wait.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import settings
from knowledge import (
    Knowledge,
    NewTask,
    make_knowledge,
    make_new_task,
    pretraining_rows,
    tokenizer_corpus,
    write_questions,
    write_rows,
)
from launching import DemoError, cpu_environment, exit_code_of, run_logged


@dataclass(frozen=True, kw_only=True)
class DemoFolder:
    """Paths of a prepared folder."""

    path: Path

    @property
    def model(self) -> Path:
        """The Hugging Face folder that fine-tuning starts from."""
        return self.path / "model"

    @property
    def train_data(self) -> Path:
        """The new task's training rows."""
        return self.path / "train.jsonl"

    @property
    def pairs(self) -> Path:
        """The same rows as preferences."""
        return self.path / "pairs.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.model"

    @property
    def pretraining_data(self) -> Path:
        return self.path / "knowledge.jsonl"

    @property
    def mark(self) -> Path:
        """Written last: with it, everything else is there."""
        return self.path / "complete.json"


def old_knowledge() -> Knowledge:
    """The facts of the demo, the same in every process."""
    return make_knowledge(settings.KNOWLEDGE_SEED, settings.PEOPLE)


def new_task() -> NewTask:
    """The new task of the demo, the same in every process."""
    return make_new_task(settings.KNOWLEDGE_SEED, settings.NEW_TASK_QUESTIONS)


def prepare(path: Path) -> DemoFolder:
    """Return a complete folder at ``path``, made now if need be (minutes).

    Raises DemoError when the folder was made with other settings, or when the training fails or learns too little.
    """
    folder = DemoFolder(path=path)
    path.mkdir(parents=True, exist_ok=True)
    with _only_process_here(path) as lock:
        if folder.mark.exists():
            _refuse_other_settings(folder)
            if not folder.pairs.exists():  # made by an earlier version
                write_rows(folder.pairs, new_task().pairs)
            print(f"the demo's model and data are in {path}")
            return folder
        print(f"making the demo's model and data in {path} (some minutes)", flush=True)
        start = time.monotonic()
        _write_data(folder)
        _pretrain(folder, lock)
        recalled = _recalled_facts(folder)
        mark = {
            "settings": _settings(),
            "facts": old_knowledge().facts,
            "recalled facts": recalled,
            "seconds": round(time.monotonic() - start),
        }
        _write_whole(folder.mark, json.dumps(mark, indent=2) + "\n")
        print(f"the model recalls {recalled:.1%} of {mark['facts']} facts after {settings.PRETRAINING_STEPS} steps")
    return folder


@contextmanager
def _only_process_here(path: Path) -> Iterator[int]:
    """Hold the folder's lock; it is free again when this process and the training it started have both ended."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in {path}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _settings() -> dict[str, Any]:
    """Settings that decide the folder's contents: a folder made with other values is not this demo's."""
    return {
        "knowledge seed": settings.KNOWLEDGE_SEED,
        "people": settings.PEOPLE,
        "sentences per row": settings.SENTENCES_PER_ROW,
        "new task questions": settings.NEW_TASK_QUESTIONS,
        "vocabulary": settings.VOCABULARY,
        "options": [*settings.MODEL_OPTIONS, *settings.PRETRAINING_OPTIONS],
    }


def _refuse_other_settings(folder: DemoFolder) -> None:
    made_with = json.loads(folder.mark.read_text(encoding="utf-8"))["settings"]
    differing = [name for name, value in _settings().items() if made_with.get(name) != value]
    if differing:
        raise DemoError(
            f"{folder.path} was made with other settings ({', '.join(differing)}); remove it or name another --output"
        )


def _write_data(folder: DemoFolder) -> None:
    knowledge, task = old_knowledge(), new_task()
    sentences_trained = settings.PRETRAINING_STEPS * settings.PRETRAINING_BATCH * settings.SENTENCES_PER_ROW
    repeats = -(-sentences_trained // len(knowledge.sentences))
    rows = pretraining_rows(knowledge, settings.KNOWLEDGE_SEED, settings.SENTENCES_PER_ROW, repeats)
    write_rows(folder.pretraining_data, rows)
    write_questions(folder.path / "knowledge_questions.jsonl", knowledge.questions)
    write_rows(folder.train_data, task.rows)
    write_rows(folder.pairs, task.pairs)
    write_questions(folder.path / "train_questions.jsonl", task.questions)
    _write_tokenizer(folder.tokenizer, tokenizer_corpus(knowledge))


def _write_tokenizer(path: Path, corpus: list[str]) -> None:
    import sentencepiece

    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            vocab_size=settings.VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    unfinished.replace(path)


def _pretrain(folder: DemoFolder, lock: int) -> None:
    """Teach the old knowledge, resuming an earlier, interrupted call's training."""
    if folder.model.exists():
        shutil.rmtree(folder.model)  # without the mark it may be half an export
    run = str(folder.path / "pretraining")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.RANKS)),
        *("-m", "hft_megatron", "sft"),
        *settings.MODEL_OPTIONS,
        *settings.PRETRAINING_OPTIONS,
        *("--tokenizer-model", str(folder.tokenizer)),
        *("--train-data-path", str(folder.pretraining_data)),
        *("--save", run, "--load", run, "--save-hf", str(folder.model)),
    ]
    environment = cpu_environment({})
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.RANKS)))
    log = folder.path / "pretraining.log"
    run_logged(command, environment=environment, folder=settings.REPOSITORY, log=log, inherit=[lock])


def _recalled_facts(folder: DemoFolder) -> float:
    # Imported here because a complete folder is answered for without waiting for torch.
    from scoring import ExportedModel, score_statements

    recalled = score_statements(ExportedModel.load(folder.model), old_knowledge().questions).share
    if recalled < settings.ENOUGH:
        raise DemoError(
            f"the model recalls {recalled:.1%} of its facts, and the demo needs {settings.ENOUGH:.0%}; "
            f"raise PRETRAINING_STEPS in tools/demo/settings.py and remove {folder.path}"
        )
    return recalled


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main() -> int:
    """Prepare the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make the demo's model and data, unless they are there.")
    parser.add_argument("--output", type=Path, default=settings.DEFAULT_FOLDER, help="folder (default: runs/demo)")
    output = parser.parse_args().output.resolve()
    return exit_code_of(lambda: prepare(output))


if __name__ == "__main__":
    sys.exit(main())
