"""Scoring by exact match: a model built to continue in a known way must get exactly the score that it deserves."""

from pathlib import Path

import pytest
import torch
from knowledge import Question
from scoring import MAX_NEW_TOKENS, ExportedModel, score_chat, score_statements
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", "<pad>", "red", "blue", "green", ".", "ask", "now"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}ask {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} now{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a word tokenizer, saved as an export is."""
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def successor_model(folder: Path, successors: dict[str, str]) -> ExportedModel:
    """The model of the folder, its weights set so that each word is followed by its successor, whatever came before."""
    exported = ExportedModel.load(folder)
    with torch.no_grad():
        for parameter in exported.model.parameters():
            parameter.zero_()
        exported.model.model.norm.weight.fill_(1.0)
        exported.model.model.embed_tokens.weight[:, : len(WORDS)] = torch.eye(len(WORDS))
        for word, successor in successors.items():
            exported.model.lm_head.weight[WORDS.index(successor), WORDS.index(word)] = 1.0
    return exported


def test_a_statement_counts_up_to_its_full_stop(folder: Path) -> None:
    exported = successor_model(folder, {"red": "blue", "blue": ".", ".": "green", "green": "red", "ask": "red"})
    questions = [
        Question(text="now red", answer="blue"),
        Question(text="red green ask", answer="red blue"),
        Question(text="red", answer="green"),
    ]
    score = score_statements(exported, questions)
    assert (score.correct, score.asked) == (2, 3)


def test_a_chat_answer_must_be_the_whole_turn_and_end(folder: Path) -> None:
    ends = {"now": "green", "green": "</s>"}
    assert score_chat(successor_model(folder, ends), [Question(text="red", answer="green")]).share == 1.0
    runs_on = {"now": "green", "green": "blue", "blue": "green"}
    assert score_chat(successor_model(folder, runs_on), [Question(text="red", answer="green")]).share == 0.0


def test_padding_in_a_batch_changes_no_continuation(folder: Path) -> None:
    exported = ExportedModel.load(folder)
    texts = ["red", "green blue red ask now red", "blue ask", "now now green"]
    alone = [_greedy(exported, text) for text in texts]
    questions = [Question(text=text, answer=answer) for text, answer in zip(texts, alone, strict=True)]
    assert score_statements(exported, questions).correct == len(texts)


def _greedy(exported: ExportedModel, text: str) -> str:
    """The continuation by argmax, token by token, without a batch, a cache or ``generate``."""
    ids = exported.tokenizer(text)["input_ids"]
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + MAX_NEW_TOKENS and (len(ids) == start or ids[-1] != 1):
            ids = [*ids, int(exported.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return str(exported.tokenizer.decode(ids[start:], skip_special_tokens=True)).split(".")[0].strip()
