"""A chat template gives the text, and where it marks answers the mask, that transformers gives.

Run: pytest tests/data/test_rendering.py
"""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.rendering import TEMPLATE_DATE
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer import Place, Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.chat_templates import DOCUMENTS, LLAMA31, SHAPES
from tests.support.tokenizers import make_byte_level

Conversation = list[dict[str, Any]]
TEMPLATES = {**BUILT_IN, **SHAPES}


def turns(*pairs: tuple[str, str], **more: Any) -> Conversation:
    """Messages of (first letter of the role, text); the last one also has ``more``."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages: Conversation = [{"role": roles[letter], "content": text} for letter, text in pairs]
    messages[-1].update(more)
    return messages


ROUND = (("u", " Who?\n"), ("a", "Héllo 🙂"))
CONVERSATIONS = {
    "one round": turns(*ROUND),
    "a system message": turns(("s", "Be brief."), *ROUND),
    "three rounds": turns(*ROUND, ("u", "日本"), ("a", " b \n\n c"), ("u", "{{ x }}"), ("a", "1")),
    "ends with the user": turns(*ROUND, ("u", "more")),
    "the assistant first": turns(("a", "Good evening."), ("u", "A lamp."), ("a", "This one.")),
    "the assistant after a system message": turns(("s", "You sell."), ("a", "Good evening."), ("u", "A."), ("a", "B")),
    "only the assistant": turns(("a", "Alone.")),
    "two answers in a row": turns(("u", "a"), ("a", "b"), ("a", "c")),
    "a thought in the text": turns(("u", "a"), ("a", "<think>so</think>b")),
}
NOT_FOUND = {
    # It puts the system's text before the last question, and only where nothing answers that.
    ("mistral", "a system message"),
    # It takes the thought out of the answer.
    ("deepseek", "a thought in the text"),
}


class Both:
    """One tokenizer, read by transformers and here."""

    def __init__(self, folder: Path) -> None:
        make_byte_level(
            folder, special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|head|>", "<|/head|>")
        )
        self.theirs: Any = AutoTokenizer.from_pretrained(folder)
        self.ours: Tokenizer = load_tokenizer(None, folder)

    def template(self, text: str, **loss: Any) -> ChatTemplate:
        return ChatTemplate(replace(self.ours.facts, chat_template=text), LossRule(**loss))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _date_of_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return TEMPLATE_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_what_transformers_renders(both: Both, name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    try:
        expected = both.theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False)
    except jinja2.TemplateError as refusal:
        with pytest.raises(ChatError, match=str(refusal)):
            both.template(TEMPLATES[name]).pieces(messages)
        return
    if (name, conversation) in NOT_FOUND:
        with pytest.raises(ChatError, match="the trained span cannot be found"):
            both.template(TEMPLATES[name]).pieces(messages)
        return
    pieces = both.template(TEMPLATES[name]).pieces(messages)
    assert "".join(piece.text for piece in pieces) == expected
    trained = "".join(piece.text for piece in pieces if piece.trained and piece.place is not Place.SPECIAL)
    said = "".join(message["content"] for message in messages if message["role"] == "assistant")
    assert "".join(trained.split()) == "".join(said.split())


MARKED = {
    "llama 3.1": LLAMA31.replace(
        "'<|/head|>\\n\\n' + message['content'] | trim + '<|im_end|>' }}",
        "'<|/head|>\\n\\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim + "
        "'<|im_end|>' }}{% endgeneration %}{% else %}{{- message['content'] | trim + '<|im_end|>' }}{% endif %}",
    ),
    "documents": DOCUMENTS,
    **BUILT_IN,
}


@pytest.mark.parametrize("conversation", ["one round", "three rounds", "the assistant after a system message"])
@pytest.mark.parametrize("name", MARKED)
def test_marked_answers_are_the_mask_of_transformers(both: Both, name: str, conversation: str) -> None:
    template, messages = MARKED[name], CONVERSATIONS[conversation]
    assert "{% generation %}" in template.replace("{%-", "{%")
    _, [[*expected]] = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **both.ours.facts.template_variables
    )
    text, found = "", []
    for piece in both.template(template).pieces(messages):
        if piece.trained:
            found.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    assert _joined(found) == _joined([(start, end) for start, end in expected])
    assert len(expected) == sum(message["role"] == "assistant" for message in messages)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without the cuts between neighbours."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


CALL = {"type": "function", "function": {"name": "area", "arguments": {"a": 3, "b": [5], "é": "<|im_end|>"}}}


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (
            "llama 3.1",
            [*turns(("u", "a"), ("a", ""), tool_calls=[CALL]), {"role": "tool", "content": "15"}, *turns(*ROUND)],
        ),
        (
            "llama 3.1",
            [
                *turns(("u", "a"), ("a", ""), content=None, tool_calls=[CALL]),
                {"role": "tool", "content": "15"},
                *turns(*ROUND),
            ],
        ),
        ("qwen", [*turns(("u", "a"), ("a", "b"), reasoning_content="so\n"), *turns(("a", "c"))]),
    ],
    ids=["tool calls", "tool calls without a text", "thoughts"],
)
def test_other_keys_are_printed_as_transformers_prints_them(both: Both, name: str, messages: Conversation) -> None:
    expected = both.theirs.apply_chat_template(messages, chat_template=SHAPES[name], tokenize=False)
    pieces = both.template(SHAPES[name]).pieces(messages)
    assert "".join(piece.text for piece in pieces) == expected


@pytest.mark.parametrize("special", ["<|im_end|>", "</s>"])
def test_a_template_that_looks_for_a_special_token_in_a_text_is_an_error(both: Both, special: str) -> None:
    # transformers would give such a template the text as it is; here the token's name is hidden from it.
    cutting = TEMPLATES["chatml"].replace("message['content'] + '<", f"message['content'].split('{special}')[-1] + '<")
    messages = turns(("u", f"a{special}b"), ("a", "c"))
    if special == "</s>":  # no token of this tokenizer
        expected = both.theirs.apply_chat_template(messages, chat_template=cutting, tokenize=False)
        assert "".join(piece.text for piece in both.template(cutting).pieces(messages)) == expected
        return
    with pytest.raises(ChatError, match="looks for the name of a special token"):
        both.template(cutting).pieces(messages)
