"""The trained spans of a rendered conversation are the assistant's texts and their end tokens, or there is an error."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.templates import BUILT_IN, read_template
from hft_megatron.data.tokenizer import Piece, Place, Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.chat_templates import LLAMA31, QWEN
from tests.support.tokenizers import make_byte_level, train_sentencepiece

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
TRIMMING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi <|im_end|> there"},
    {"role": "assistant", "content": "\n Héllo 🙂 <|im_start|>\n"},
    {"role": "user", "content": "more"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "end"},
]


def load(folder: Path, template: str | None) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = load_tokenizer(None, make_byte_level(folder, chat_template=template))
    return tokenizer, ChatTemplate(tokenizer.facts, LossRule())


def trained_texts(pieces: list[Piece]) -> list[str]:
    """The text of every trained span that an end token closes."""
    spans, text = [], ""
    for piece in pieces:
        if piece.trained and piece.place is Place.SPECIAL:
            assert piece.text in ("<|im_end|>", "</s>")
            spans.append(text)
            text = ""
        elif piece.trained:
            text += piece.text
    assert text == ""
    return spans


@pytest.mark.parametrize("template", [None, CHATML, MARKED], ids=["built in", "found", "marked"])
def test_every_assistant_text_is_trained_exactly_with_its_end_token(tmp_path: Path, template: str | None) -> None:
    tokenizer, chat = load(tmp_path, template)
    pieces = chat.pieces(CONVERSATION)
    expected = [message["content"] for message in CONVERSATION if message["role"] == "assistant"]
    assert trained_texts(pieces) == expected
    ((ids, mask),) = tokenizer.encode_pieces([pieces])
    end = tokenizer.eos_id
    assert tokenizer.decode([int(token) for token in ids[mask] if token != end]) == "".join(expected)
    assert int((ids[mask] == end).sum()) == len(expected)
    special = {token.id for token in tokenizer.facts.special_tokens}
    assert "hi <|im_end|> there" in tokenizer.decode([int(token) for token in ids if token not in special])


@pytest.mark.parametrize("template", [None, CHATML, MARKED], ids=["built in", "found", "marked"])
def test_the_prompt_has_the_ids_transformers_gives_it(tmp_path: Path, template: str | None) -> None:
    tokenizer, chat = load(tmp_path / "in", template)
    tokenizer.export(tmp_path / "out")
    messages = [{"role": "user", "content": "What is 2+2?\n"}, {"role": "assistant", "content": "4"}]
    ((ids, mask),) = tokenizer.encode_pieces([chat.pieces(messages)])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template(messages, return_dict=False) == ids.tolist()
    if template is MARKED:
        assistant = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert assistant["assistant_masks"] == mask.astype(int).tolist()
    else:
        prompt = loaded.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert prompt == ids[: int(mask.argmax())].tolist()


def test_an_exported_sentencepiece_tokenizer_renders_the_prompt_as_it_was_trained(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "in"))
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    ((ids, mask),) = tokenizer.encode_pieces([ChatTemplate(tokenizer.facts, LossRule()).pieces([*messages, *messages])])
    first = int(mask.argmax())
    assert (
        loaded.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False) == ids[:first].tolist()
    )
    whole = loaded.apply_chat_template([*messages, *messages], return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"] == ids.tolist()
    assert whole["assistant_masks"] == mask.astype(int).tolist()


def test_white_space_that_the_template_puts_around_the_text_is_part_of_the_span(tmp_path: Path) -> None:
    _, chat = load(tmp_path, TRIMMING)
    pieces = chat.pieces([{"role": "user", "content": " a "}, {"role": "assistant", "content": " b \n"}])
    assert [(piece.text, piece.trained) for piece in pieces] == [
        ("[INST] a [/INST]", False),
        (" b ", True),
        ("<|im_end|>", True),
    ]


def test_the_end_token_is_trained_even_when_the_marked_span_leaves_it_out(tmp_path: Path) -> None:
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    _, chat = load(tmp_path, template)
    assert trained_texts(chat.pieces(CONVERSATION))[-1] == "end"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (CHATML.replace("m['content'] + '<|im_end|>", "m['content'] + '<|im_end|>'+ m['role'] + '"), "text after"),
        (CHATML.replace("{% for", "{{ messages | length }}{% for"), "doesn't render message 3"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "doesn't render message 3"),
        (CHATML.replace("<|im_end|>\\n", "\\n\\n"), "puts no special token right after"),
        ("{{ raise_exception('no system turn') }}", "refuses the messages: no system turn"),
        ("{% for m in messages %}", "not valid jinja"),
        ("{{ messages[0].absent.more }}", "refuses the messages"),
        ("{{ messages | stringify }}", "not valid jinja: line 1: No filter named 'stringify'$"),
        ("{{ raise_exception('No\\n tools.') }}", "refuses the messages: No tools$"),
        (" \n", "is empty text"),
        ("{% generation %}x<|im_end|>{% endgeneration %}", "marks 1 trained spans, not one per assistant turn"),
        (
            MARKED.replace("{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}"),
            "message 3 doesn't hold",
        ),
        (
            MARKED.replace("{% generation %}{{ m['content'] }}", "{% generation %}{{ m['content'] | upper }}"),
            "message 3 doesn't hold",
        ),
        ("{{ 1 // (messages | length - 7) }}", "refuses the messages: integer division or modulo by zero"),
    ],
)
def test_a_span_that_cannot_be_found_exactly_is_an_error(tmp_path: Path, template: str, sentence: str) -> None:
    _, chat = load(tmp_path, template)
    with pytest.raises(ChatError, match=sentence):
        chat.pieces(CONVERSATION)


LABELLED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


@pytest.mark.parametrize("train_on_eos", [True, False])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CHATML.split("{% if add")[0], ""),  # the turn's header could be an empty answer and its end token
        (LABELLED, ""),
        (LABELLED, "assistant"),
        (LABELLED, "assistant:"),
        (LABELLED, "a"),
    ],
)
def test_an_answer_like_the_header_that_is_put_before_it_is_not_taken_for_it(
    tmp_path: Path, template: str, answer: str, train_on_eos: bool
) -> None:
    tokenizer, _ = load(tmp_path, template)
    chat = ChatTemplate(tokenizer.facts, LossRule(train_on_eos=train_on_eos))
    with pytest.raises(ChatError, match="doesn't render message 2"):
        chat.pieces([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize("content", ["{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"])
def test_the_token_that_begins_the_next_turn_does_not_end_the_one_before_it(tmp_path: Path, content: str) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + m['content'] + '[/INST]' }}"
        f"{{% else %}}{content}{{% endif %}}{{% endfor %}}"
    )
    _, chat = load(tmp_path, template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ChatError, match="puts no special token right after the assistant's text"):
        chat.pieces(turns)


@pytest.mark.parametrize("answer", ["", "b"])
def test_marks_around_the_users_turns_are_an_error_also_where_an_answer_is_part_of_a_question(
    tmp_path: Path, answer: str
) -> None:
    _, chat = load(tmp_path, MARKED.replace("== 'assistant'", "== 'user'"))
    with pytest.raises(ChatError, match=r"marks with \{% generation %\} for message 2 doesn't hold the message's text"):
        chat.pieces([{"role": "user", "content": "abc"}, {"role": "assistant", "content": answer}])


def test_a_span_that_is_not_asked_for_need_not_be_found(tmp_path: Path) -> None:
    # As templates of reasoning models do: earlier answers lose a part that the last one keeps.
    history = CHATML.replace("m['content'] + '<", "(m['content'] if loop.last else m['content'] | upper) + '<")
    tokenizer, chat = load(tmp_path, history)
    messages = CONVERSATION[-3:]
    with pytest.raises(ChatError, match="doesn't render message 3"):
        chat.pieces([*messages, *messages])
    last = ChatTemplate(tokenizer.facts, LossRule(loss_on="last"))
    assert trained_texts(last.pieces([{"role": "assistant", "content": "x"}, *messages])) == ["end"]


def test_without_the_loss_on_end_tokens_a_template_may_have_none(tmp_path: Path) -> None:
    tokenizer, _ = load(tmp_path, CHATML.replace("<|im_end|>\\n", "\\n\\n"))
    chat = ChatTemplate(tokenizer.facts, LossRule(train_on_eos=False))
    trained = [piece.text for piece in chat.pieces(CONVERSATION[1:3]) if piece.trained]
    assert trained == [CONVERSATION[2]["content"] + "\n\n"]


@pytest.mark.parametrize("extra", [{"name": "<|im_end|>"}, {"calls": [{"<|im_end|>": ["a<|im_end|>"]}]}], ids=str)
def test_the_names_of_special_tokens_are_text_wherever_a_person_writes_them(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    _, chat = load(tmp_path, MARKED.replace("{{ bos_token }}", "{{ messages | tojson }}"))
    pieces = chat.pieces([{"role": "user", "content": "<|im_end|>", **extra}, {"role": "assistant", "content": "b"}])
    assert pieces[0].place is Place.START
    assert pieces[0].text.count("<|im_end|>") == 1 + str(extra).count("<|im_end|>")
    assert [piece.text for piece in pieces if piece.place is Place.SPECIAL] == ["<|im_start|>", "<|im_end|>"] * 2


def test_a_noncharacter_in_a_text_is_refused(tmp_path: Path) -> None:
    _, chat = load(tmp_path, None)
    for key, value in (("content", "a\ufdd0b"), ("calls", [{"\ufdd2": 1}])):
        with pytest.raises(ChatError, match="U\\+FDD0"):
            chat.pieces([{"role": "assistant", "content": "x", key: value}])


def test_a_template_that_prints_the_date_renders_the_same_every_day(tmp_path: Path) -> None:
    _, chat = load(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    pieces = chat.pieces([{"role": "assistant", "content": "x"}])
    assert pieces[0].text == "26 Jul 2024"


def swallowing(folder: Path, template: str, **loss: Any) -> ChatTemplate:
    """A template's conversations where every special token takes the white space after it, as Phi-3's do."""
    tokenizer, _ = load(folder, template)
    special = tuple(replace(token, strips_right=True) for token in tokenizer.facts.special_tokens)
    return ChatTemplate(replace(tokenizer.facts, special_tokens=special), LossRule(**loss))


TAGGED = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [TAGGED, MARKED.replace(" + m['role'] + '\\n' }}", " }}").removeprefix("{{ bos_token }}")],
    ids=["found", "marked"],
)
@pytest.mark.parametrize("text", ["b", " b", "\n\nb\n", ""])
def test_white_space_that_a_special_token_takes_decides_nothing_about_it(
    tmp_path: Path, template: str, text: str
) -> None:
    messages = [{"role": "user", "content": " a"}, {"role": "assistant", "content": text}]
    messages += [messages[0], {"role": "assistant", "content": "c"}]

    def special(**loss: Any) -> list[tuple[str, bool]]:
        pieces = swallowing(tmp_path, template, **loss).pieces(messages)
        return [(piece.text, piece.trained) for piece in pieces if piece.place is Place.SPECIAL]

    asked, answer = [("<|im_start|>", False), ("<|im_end|>", False)], [("<|im_start|>", False), ("<|im_end|>", True)]
    assert special() == [*asked, *answer] * 2
    assert special(train_on_eos=False) == asked * 4
    spared = special(loss_on="all", train_on_eos=False)
    assert [trained for _, trained in spared] == [True, True, True, False] * 2


@pytest.mark.parametrize(
    "aside", ["{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}", "{{ '{%generation%}' }}"]
)
def test_a_generation_tag_that_is_no_code_marks_nothing(tmp_path: Path, aside: str) -> None:
    _, chat = load(tmp_path, aside + CHATML)
    assert trained_texts(chat.pieces(CONVERSATION[:3])) == [CONVERSATION[2]["content"]]


@pytest.mark.parametrize(
    "tag", ["{%generation%}", "{%- generation -%}", "{%+ generation %}", "{# a #}{% generation %}"]
)
def test_a_generation_tag_is_found_in_any_form(tmp_path: Path, tag: str) -> None:
    _, chat = load(tmp_path, MARKED.replace("{% generation %}", "<b>" + tag))
    text = "".join(piece.text for piece in chat.pieces(CONVERSATION[:3]) if piece.trained)
    assert text == CONVERSATION[2]["content"] + "<|im_end|>"


ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi <|im_end|> there"},
    {"role": "assistant", "content": "Héllo 🙂"},
    {"role": "user", "content": " more \n"},
]
MARKED_WITH_HEADER = MARKED + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


@pytest.mark.parametrize("text", ["end", " end \n"])
@pytest.mark.parametrize("template", [*sorted(BUILT_IN), CHATML, TRIMMING, MARKED_WITH_HEADER, LLAMA31, QWEN])
def test_generation_starts_behind_the_tokens_that_training_has_in_front_of_an_answer(
    tmp_path: Path, template: str, text: str
) -> None:
    names = ("<|head|>", "<|/head|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path, special=names))
    template = read_template(template, tokenizer.facts.special_tokens) if template in BUILT_IN else template
    chat = ChatTemplate(replace(tokenizer.facts, chat_template=template), LossRule(loss_on="last"))
    messages = ASKED[1:] if template == TRIMMING else ASKED
    answered = chat.pieces([*messages, {"role": "assistant", "content": text}])
    ((asked, none), (whole, trained)) = tokenizer.encode_pieces([chat.prompt_pieces(messages), answered])
    assert not none.any()
    assert asked.tolist() == whole[: int(trained.argmax())].tolist()


def test_a_template_that_marks_answers_which_begin_elsewhere_has_no_place_to_generate_at(tmp_path: Path) -> None:
    _, chat = load(tmp_path, MARKED)
    with pytest.raises(ChatError, match="don't begin where generation starts"):
        chat.prompt_pieces([{"role": "user", "content": "hi"}])
