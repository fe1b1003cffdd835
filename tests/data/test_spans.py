"""A turn that a template doesn't mark is all that it puts there: thoughts, text, calls of tools and the end token.

Run: pytest tests/data/test_spans.py
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.tokenizer import TokenizerFacts
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.chat_templates import LLAMA31
from tests.support.tokenizers import make_byte_level

Make = Callable[..., ChatTemplate]
Messages = list[dict[str, Any]]

CALLS = "{% for c in m.tool_calls or [] %}OPEN{{ c | tojson }}CLOSE{% endfor %}"
THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
HEADED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}TURN{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}TURN{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
SAID = "{{ m.content or '' }}"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = make_byte_level(
        tmp_path_factory.mktemp("tokenizer"), special=("<|tc|>", "<|/tc|>", "<|head|>", "<|/head|>")
    )
    facts: TokenizerFacts = load_tokenizer(None, folder).facts
    return lambda template, **loss: ChatTemplate(replace(facts, chat_template=template), LossRule(**loss))


def trained(chat: ChatTemplate, messages: Messages) -> str:
    """All trained text, with a bar where it is interrupted."""
    text, last = "", True
    for piece in chat.pieces(messages):
        text += ("" if last or not text else "|") + piece.text if piece.trained else ""
        last = piece.trained
    return text


def calls(opening: str, closing: str = "") -> str:
    return CALLS.replace("OPEN", opening).replace("CLOSE", closing)


ASK = {"role": "user", "content": "a"}
SAY = {"role": "assistant", "content": " Let me. "}
CALL = {"tool_calls": [{"name": "f"}, {"name": "g"}]}
F, G = '{"name": "f"}', '{"name": "g"}'


BRANCH = "{% if m.tool_calls %}<|tc|>{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
CALLING = {**SAY, **CALL}
SILENT = {**CALLING, "content": None}
THINKING = {**SAY, "reasoning_content": "so"}
TURNS = {
    "special opener": (HEADED, SAID + calls("<|tc|>"), CALLING, f" Let me. <|tc|>{F}<|tc|>{G}"),
    "special opener, no text": (HEADED, SAID + calls("<|tc|>"), SILENT, f"<|tc|>{F}<|tc|>{G}"),
    "special opener, no call": (HEADED, SAID + calls("<|tc|>"), SAY, " Let me. "),
    "call in text": (
        HEADED,
        SAID + calls("{{ '\\n<call>\\n' }}", "\n</call>"),
        CALLING,
        f" Let me. \n<call>\n{F}\n</call>\n<call>\n{G}\n</call>",
    ),
    "call first": (
        HEADED,
        calls("<|tc|>", "<|/tc|>") + SAID,
        CALLING,
        f"<|tc|>{F}<|/tc|><|tc|>{G}<|/tc|> Let me. ",
    ),
    "call last, closed": (HEADED, SAID + calls("<|tc|>", "<|/tc|>"), SILENT, f"<|tc|>{F}<|/tc|><|tc|>{G}<|/tc|>"),
    "thought first": (HEADED, THOUGHT + SAID, THINKING, "<think>\nso\n</think>\n\n Let me. "),
    "thought last": (HEADED, SAID + THOUGHT, THINKING, " Let me. <think>\nso\n</think>\n\n"),
    "empty thought": (HEADED, "<think>\n\n</think>\n\n" + SAID, SAY, "<think>\n\n</think>\n\n Let me. "),
    "trimmed": (HEADED, "{{ m.content | trim }}", SAY, "Let me."),
    "thought opened by the header": (
        HEADED.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        SAID,
        {**SAY, "content": "<think>\nso</think>b"},
        "so</think>b",
    ),
    "no header": (BARE, SAID + calls("[CALL]"), SILENT, f"[CALL]{F}[CALL]{G}"),
    "no header, another branch": (BARE, BRANCH, SILENT, f"<|tc|>[{F}, {G}]"),
    "no header, thought first": (BARE, " " + THOUGHT + SAID, THINKING, " <think>\nso\n</think>\n\n Let me. "),
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_whole_turn_is_trained_and_its_last_special_token_ends_it(make: Make, name: str, rounds: int) -> None:
    frame, turn, answer, expected = TURNS[name]
    template, end = frame.replace("TURN", turn), "<|im_end|>"
    messages = [ASK, answer] * rounds
    assert trained(make(template), messages) == "|".join([expected + end] * rounds)
    assert trained(make(template), [*messages, ASK]) == "|".join([expected + end] * rounds)
    assert trained(make(template, train_on_eos=False), messages) == "|".join([expected] * rounds)


def test_a_call_without_a_text_is_found_where_the_template_turns_to_another_branch(make: Make) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 3}}}]}
    messages = [ASK, call, {"role": "tool", "content": "15"}, SAY]
    assert trained(make(LLAMA31), messages) == ('{"name": "f", "parameters": {"a": 3}}<|im_end|>|Let me.<|im_end|>')


def test_what_a_template_puts_behind_the_conversation_is_no_part_of_the_turn(make: Make) -> None:
    # As Phi-3.5's, which closes what is not to be continued.
    template = HEADED.replace("TURN", SAID + calls("<|tc|>")).replace("<|im_end|>", "<|/tc|>")
    template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert trained(make(template), [ASK, SAY, ASK, SAY]) == " Let me. <|/tc|>| Let me. <|/tc|>"
    assert trained(make(template), [ASK, {**SAY, **CALL}]) == f" Let me. <|tc|>{F}<|tc|>{G}<|/tc|>"


def test_a_call_that_nobody_asked_for_is_trained_with_its_text(make: Make) -> None:
    template = HEADED.replace("TURN", SAID + calls("<|tc|>"))
    expected = f" Let me. <|tc|>{F}<|tc|>{G}"
    for more in ([], [ASK]):
        assert trained(make(template), [{**SAY, **CALL}, *more]) == expected + "<|im_end|>"
        assert trained(make(template, train_on_eos=False), [{**SAY, **CALL}, *more]) == expected


UNENDED = HEADED.replace("<|im_end|>", "").replace("<|im_start|>", "# ")


@pytest.mark.parametrize("first", [[], [ASK]], ids=["unasked", "asked"])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (UNENDED.replace("TURN", SAID + calls("\n<tool_call>")), {**SAY, **CALL}),
        (UNENDED.replace("TURN", SAID + calls("<|tc|>")), {**SAY, **CALL}),
        (UNENDED.replace("TURN", SAID + "<|tc|>!"), SAY),
        (UNENDED.replace("TURN", calls("\n<tool_call>") + SAID), {**SAY, **CALL}),
        (
            UNENDED.replace("TURN", "{% if m.tool_calls %}{{ m.tool_calls }}{% else %}{{ m.content }}{% endif %}"),
            {**SAY, **CALL, "content": ""},
        ),
    ],
    ids=["call", "special call", "text behind a special token", "call first", "call alone"],
)
@pytest.mark.parametrize("train_on_eos", [True, False])
def test_a_turn_whose_end_cannot_be_told_is_an_error_that_says_so(
    make: Make, template: str, answer: dict[str, Any], first: Messages, train_on_eos: bool
) -> None:
    with pytest.raises(ChatError, match=r"doesn't render message \d as a continuation .*: it (puts other|doesn't put)"):
        make(template, train_on_eos=train_on_eos).pieces([*first, answer])


def test_a_call_that_is_printed_with_a_later_message_alone_is_an_error(make: Make) -> None:
    template = HEADED.replace("TURN", SAID).replace(
        "<|im_start|>{{ m.role }}",
        (
            "{% if loop.previtem is defined and loop.previtem.tool_calls %}{{ loop.previtem.tool_calls }}{% endif %}"
            "<|im_start|>{{ m.role }}"
        ),
    )
    messages = [ASK, {**SAY, **CALL}, {"role": "tool", "content": "3"}, SAY]
    with pytest.raises(ChatError, match="doesn't print `tool_calls` of message 2"):
        make(template).pieces(messages)
    assert trained(make(template, loss_on="last"), messages) == " Let me. <|im_end|>"


def test_a_call_behind_a_marked_text_does_not_end_it(make: Make) -> None:
    template = HEADED.replace("TURN", "{% generation %}{{ m.content }}{% endgeneration %}" + calls("<|tc|>"))
    assert trained(make(template), [ASK, SAY]) == " Let me. <|im_end|>"
    with pytest.raises(ChatError, match="puts no special token right after"):
        make(template).pieces([ASK, {**SAY, **CALL}])


@pytest.mark.parametrize("first", [[], [ASK]], ids=["unasked", "asked"])
def test_a_turn_without_an_end_token_keeps_the_white_space_before_the_next(make: Make, first: Messages) -> None:
    template = HEADED.replace("<|im_end|>", "").replace("TURN", SAID + "{{ '\\n' }}")
    assert trained(make(template, train_on_eos=False), [*first, SAY, ASK]) == " Let me. \n"
