"""Scores an exported Hugging Face folder by exact match: transformers decodes greedily, nothing of the trainer runs.

So a good score also proves the export: weights, tokenizer, end token and chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from knowledge import Question
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

MAX_NEW_TOKENS = 12
"""No answer is longer than half of this, so an answer that runs on is seen to."""
BATCH_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class Score:
    """Number of questions that were answered exactly."""

    correct: int
    asked: int

    @property
    def share(self) -> float:
        return self.correct / self.asked


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A model and its tokenizer, as transformers loads them."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> "ExportedModel":
        """Load the folder in fp32. Raises OSError when it is missing or is no model."""
        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model=model.eval(), tokenizer=tokenizer)


def score_statements(exported: ExportedModel, questions: Sequence[Question]) -> Score:
    """Old knowledge: the model continues each text; what it says up to the first full stop must be the answer."""
    continued = _continue(exported, [exported.tokenizer(question.text)["input_ids"] for question in questions])
    return _score([text.split(".")[0] for text in continued], questions)


def score_chat(exported: ExportedModel, questions: Sequence[Question]) -> Score:
    """New task: each text is a user's turn; the assistant's whole turn, up to the end token, must be the answer."""
    prompts = [
        exported.tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    return _score(_continue(exported, prompts), questions)


def _score(given: Sequence[str], questions: Sequence[Question]) -> Score:
    correct = sum(text.strip() == question.answer for text, question in zip(given, questions, strict=True))
    return Score(correct=correct, asked=len(questions))


@torch.inference_mode()
def _continue(exported: ExportedModel, prompts: Sequence[list[int]]) -> list[str]:
    """The continuation of each prompt by greedy decoding, without the end token; padding is on the left and masked."""
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = exported.tokenizer.pad({"input_ids": prompts[start : start + BATCH_SIZE]}, return_tensors="pt")
        output = exported.model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        added = output[:, batch["input_ids"].shape[1] :]
        texts += exported.tokenizer.batch_decode(added, skip_special_tokens=True)
    return texts
