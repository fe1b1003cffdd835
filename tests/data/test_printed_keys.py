"""What a chat template doesn't print of a message is an error that names it.

Run: pytest tests/data/test_printed_keys.py
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.rendering import Renderer
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.tokenizers import make_byte_level

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' }}{% generation %}"
    "{% if m.calls %}{{ m.calls[0].name }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endgeneration %}{% endfor %}"
)
ALL_CALLS = CALLING.replace("m.calls[0].name", "m.content + (m.calls | tojson)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_level(tmp_path_factory.mktemp("tokenizer"))


def chat(folder: Path, template: str, **loss: Any) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(template)
    tokenizer: Tokenizer = load_tokenizer(None, folder)
    return ChatTemplate(tokenizer.facts, LossRule(**loss))


def answer(text: str = "b", **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": text, **keys}]


@pytest.mark.parametrize(
    "keys",
    [
        {"tool_calls": [{"function": {"name": "f"}}]},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"reasoning_content": "so"},
        {"name": "Ann"},
        {"odd\nkey": 1},
        {"flag": True},
        {"number": 0},
        {"list": [[]]},
        {"punctuation": "!"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_key_that_is_not_printed_is_named_with_its_message_and_the_option(folder: Path, keys: dict[str, Any]) -> None:
    name = next(iter(keys)).replace("\n", "\\n")
    with pytest.raises(ChatError) as caught:
        chat(folder, CHATML).pieces(answer(**keys))
    assert str(caught.value).startswith(f"the chat template doesn't print `{name}` of message 2, which would be lost; ")
    assert str(caught.value).endswith(f"--ignore-keys {name}")
    key = next(iter(keys))
    template = CHATML.replace("m['role'] +", f"m['role'] + (m[{key!r}] | tojson if {key!r} in m else '') +")
    asked = [{**answer()[0], **keys}, answer()[1]]
    if keys[key] == [[]]:  # nothing in these can be changed
        return
    text = "".join(piece.text for piece in chat(folder, template).pieces(asked))
    assert text.startswith(f"<|im_start|>user{json.dumps(keys[key])}")


def test_a_call_without_a_text_is_named_where_the_template_has_no_place_for_it(folder: Path) -> None:
    messages = answer(tool_calls=[{"function": {"name": "f"}}])
    messages[1]["content"] = None
    with pytest.raises(ChatError, match="doesn't print `tool_calls` of message 2, which would be lost"):
        chat(folder, CHATML).pieces(messages)


def test_a_key_is_printed_for_one_role_and_not_for_another(folder: Path) -> None:
    template = CHATML.replace("m['role'] +", "m['role'] + (m.name if m.role == 'user' and m.name else '') +")
    pieces = chat(folder, template).pieces([{**answer()[0], "name": "Ann"}, answer()[1]])
    assert "userAnn" in "".join(piece.text for piece in pieces)
    with pytest.raises(ChatError, match="doesn't print `name` of message 2"):
        chat(folder, template).pieces(answer(name="Ann"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_entry_of_a_list_must_be_printed(folder: Path, count: int) -> None:
    turns = [{"role": "assistant", "content": "", "calls": [{"name": f"f{number}"} for number in range(count)]}]
    assert "f2" in "".join(piece.text for piece in chat(folder, ALL_CALLS).pieces(turns)) or count < 3
    if count == 1:
        assert "f0" in "".join(piece.text for piece in chat(folder, CALLING).pieces(turns))
        return
    with pytest.raises(ChatError, match=r"doesn't print all of `calls` of message 1 \(`\[1\].name` in it\)"):
        chat(folder, CALLING).pieces(turns)


FLAT = CALLING.replace("m.calls[0].name", "m.calls[0].name ~ '(' ~ m.calls[0].arguments ~ ')'")
NESTED = {"calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "id": "z"}}}]}
"""A call as OpenAI has it, of which FLAT prints nothing but brackets."""


@pytest.mark.parametrize("first", [[], ["flat"]], ids=["alone", "behind another"])
def test_a_call_of_another_structure_is_looked_at_anew(folder: Path, first: list[str]) -> None:
    template = chat(folder, FLAT)
    for _ in first:
        pieces = template.pieces(answer("", calls=[{"name": "f", "arguments": {"a": 1}}])[1:])
        assert "f({'a': 1})" in "".join(piece.text for piece in pieces)
    with pytest.raises(ChatError, match="doesn't print `calls` of message 1, which would be lost"):
        template.pieces(answer("", **NESTED)[1:])


VALUES: list[Any] = [
    "u",
    "",
    7,
    0,
    True,
    [],
    {},
    ["u"],
    {"k": "v"},
    {"k": ""},
    {"k": {"k": "v"}},
    [{"k": "v"}],
    {"j": 0},
]


@pytest.mark.parametrize(
    "printing",
    [
        "{% if m.x is mapping %}{{ m.x.k }}{% elif m.x is string %}{{ m.x }}{% endif %}",
        "{% if m.x %}{{ m.x }}{% endif %}",
    ],
)
def test_the_verdict_on_a_value_does_not_depend_on_the_values_before_it(folder: Path, printing: str) -> None:
    def verdict(template: ChatTemplate, value: object) -> str:
        try:
            return "".join(piece.text for piece in template.pieces([{**answer()[0], "x": value}, answer()[1]]))
        except ChatError as error:
            return str(error)

    template = CHATML.replace("{{ '<|im_start|>'", printing + "{{ '<|im_start|>'")
    alone = [verdict(chat(folder, template), value) for value in VALUES]
    assert len(set(alone)) > 4
    for reverse in (False, True):
        together = chat(folder, template)
        order = sorted(range(len(VALUES)), reverse=reverse)
        assert {at: verdict(together, VALUES[at]) for at in order} == dict(enumerate(alone))


def test_the_verdict_on_a_text_does_not_depend_on_the_values_of_other_keys_before_it(folder: Path) -> None:
    template = chat(folder, CHATML.replace("m['content'] +", "(m.flag if m.flag else m['content']) ~"))
    template.pieces([{**answer()[0], "flag": False}, answer()[1]])
    with pytest.raises(ChatError, match=r"text of message 1 \(of the role user, with `flag`\)"):
        template.pieces([{**answer()[0], "flag": True}, answer()[1]])


@pytest.mark.parametrize(
    ("printed", "part"),
    [
        ("c.name", "[0].arguments.a"),
        ("c.arguments", "[0].name"),
        ("c.name ~ c.arguments.a", "[0].arguments.id"),
        ("c.name ~ c.arguments.a ~ c.arguments.id", "[0].arguments.b[0]"),
        ("c.name ~ c.arguments", ""),
        ("c.id ~ c.name ~ c.arguments | upper", ""),
        ("c.name ~ c.arguments | tojson", ""),
    ],
)
def test_every_part_of_a_call_must_be_printed_but_its_id_and_type(folder: Path, printed: str, part: str) -> None:
    arguments = {"a": 1, "id": "z", "b": [True, 2.5], "none": None, "empty": ""}
    calls = [{"id": "1", "type": "function", "name": "f", "arguments": arguments}]
    template = chat(folder, CALLING.replace("m.calls[0].name", printed.replace("c.", "m.calls[0].")))
    messages = answer("", calls=calls)[1:]
    if not part:
        assert "2.5" in "".join(piece.text for piece in template.pieces(messages))
        return
    with pytest.raises(ChatError) as caught:
        template.pieces(messages)
    assert f"doesn't print all of `calls` of message 1 (`{part}` in it), which would be lost; " in str(caught.value)


def test_numbers_that_a_text_holds_already_are_told_apart(folder: Path) -> None:
    numbers = [8_461_730_000 + index for index in range(3)]
    with pytest.raises(ChatError, match="doesn't print `calls` of message 2"):
        chat(folder, CHATML).pieces(answer(" ".join(map(str, numbers)), calls=numbers))


def test_verdicts_take_few_renderings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for a new structure of whatever size, and none for a known one."""
    rendered = []
    plain = Renderer.render

    def render(self: Renderer, messages: Any, **options: Any) -> str:
        rendered.append(messages)
        return plain(self, messages, **options)

    monkeypatch.setattr(Renderer, "render", render)
    template = chat(folder, ALL_CALLS)
    counts = []
    for number in range(3):
        rendered.clear()
        calls = [{"name": f"f{number}", "arguments": {str(n): n + number + 1 for n in range(50)}}] * 4
        template.pieces(answer("", calls=calls)[1:])
        counts.append(len(rendered))
    assert counts[1] == counts[2]
    assert counts[0] - counts[1] <= 4


@pytest.mark.parametrize("empty", ["", "[]", [], {}], ids=repr)
@pytest.mark.parametrize("key", ["images", "name", "loss_scale", "tool_calls"])
def test_a_key_without_a_value_is_no_reason_to_refuse(folder: Path, key: str, empty: Any) -> None:
    template = chat(folder, CHATML)
    messages = answer(**{key: empty})
    assert template.pieces(messages) == template.pieces(answer())
    assert list(template.unread_keys(messages)) == [key]
    with pytest.raises(ChatError, match=f"`{key}` of message 2"):
        template.pieces(answer(**{key: False}))


def test_a_text_that_is_not_printed_is_named_with_its_role_and_keys(folder: Path) -> None:
    deaf = CHATML.replace(
        "{{ '<|im_start|>' +", "{% if 'name' in m %}{{ m.name }}{% elif m.role != 'system' %}{{ '<|im_start|>' +"
    ).replace("}}{% endfor", "}}{% endif %}{% endfor")
    told = [{"role": "system", "content": "Be brief."}, *answer()]
    with pytest.raises(ChatError, match=r"text of message 1 \(of the role system\), which would be lost"):
        chat(folder, deaf).pieces(told)
    assert chat(folder, deaf).pieces([{"role": "system", "content": ""}, *answer()])
    named = [{**answer()[0], "name": "Ann"}, answer()[1]]
    with pytest.raises(ChatError, match=r"text of message 1 \(of the role user, with `name`\), which would be lost"):
        chat(folder, deaf).pieces(named)


def test_a_text_that_a_template_changes_is_printed(folder: Path) -> None:
    template = CHATML.replace(
        "m['content'] +", "(m['content'] | upper | tojson(true) if m.role == 'user' else m.content) +"
    )
    text = "".join(piece.text for piece in chat(folder, template).pieces(answer()))
    assert '"A"' in text


@pytest.mark.parametrize("key", ["train_detail", "loss_scale", "mask", "images"])
def test_a_key_that_nothing_here_reads_is_an_error_also_where_it_is_printed(folder: Path, key: str) -> None:
    template = CHATML.replace("m['role'] +", f"m['role'] + (m.{key} | string) +")
    with pytest.raises(ChatError, match=f"`{key}` of message 2 means .*--ignore-keys {key}$"):
        chat(folder, template).pieces(answer(**{key: ["x"]}))


def test_a_harmless_key_that_is_not_printed_is_told(folder: Path) -> None:
    turns = [{**answer()[0], "tool_call_id": "1"}, answer()[1]]
    silent = chat(folder, CHATML)
    assert silent.pieces(turns) == silent.pieces(answer())
    assert list(silent.unread_keys(turns)) == ["tool_call_id"]
    printing = chat(folder, CHATML.replace("m['role'] +", "m['role'] + (m.tool_call_id or '') +"))
    assert list(printing.unread_keys(turns)) == []


def test_a_name_is_harmless_where_it_is_a_tools_and_not_where_it_is_who_speaks(folder: Path) -> None:
    named = {"role": "tool", "content": "3", "name": "add"}
    silent = chat(folder, CHATML)
    assert list(silent.unread_keys([answer()[0], named, answer()[1]])) == ["name"]
    silent.pieces([answer()[0], named, answer()[1]])
    with pytest.raises(ChatError, match="doesn't print `name` of message 2"):
        silent.pieces([answer()[0], {**named, "role": "user"}, answer()[1]])


FIRST = [{"role": "assistant", "content": " Good evening.\n"}, {"role": "user", "content": "A lamp."}]
FIRST += [{"role": "assistant", "content": "This."}]
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "spans"),
    [
        # A template with an error for a conversation without messages, and one that begins with the assistant alone.
        ("{% if messages[0].role == 'x' %}{% endif %}" + CHATML, [" Good evening.\n", "This."]),
        (LLAMA2, [" Good evening. ", " This. "]),
        ("{{ bos_token + 'Shop' }}" + CHATML, [" Good evening.\n", "This."]),
    ],
    ids=["no empty conversation", "no header", "a text before all"],
)
def test_an_answer_that_nobody_asked_for_is_found_in_the_whole(folder: Path, template: str, spans: list[str]) -> None:
    for before in ([], [{"role": "system", "content": "You sell."}]):
        if before and template is LLAMA2:
            continue
        pieces = chat(folder, template, train_on_eos=False).pieces([*before, *FIRST])
        assert [piece.text for piece in pieces if piece.trained] == spans
        whole = chat(folder, template).pieces([*before, *FIRST])
        assert [piece.text for piece in whole if piece.trained] == [spans[0], "<|im_end|>", spans[1], "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (CHATML.split("{% if add")[0], "doesn't render message 1"),
        (CHATML.replace("m['content'] + '<", "'<think></think>' + m['content'] + '<"), "doesn't render message 1"),
        (CHATML.replace("m['content'] + '<", "m['content'] + m['content'] + '<"), "doesn't render message 1"),
        (CHATML.replace("m['content'] + '<", "m['content'] | upper + '<"), "doesn't render message 1"),
        (LLAMA2.replace("{{ bos_token }}", "{{ bos_token + 'Answer:' }}"), "doesn't render message 1"),
        (CHATML + "{{ messages[1].role[:0] }}{% if messages | length == 1 %}{{ messages[3].x }}{% endif %}", "alone"),
    ],
)
def test_an_answer_that_nobody_asked_for_and_that_cannot_be_found_is_an_error(
    folder: Path, template: str, sentence: str
) -> None:
    with pytest.raises(ChatError, match=sentence):
        chat(folder, template).pieces(FIRST)


@pytest.mark.parametrize("key", ["<|im_end|>", "a<|im_end|>b"])
def test_a_key_with_the_name_of_a_special_token_is_shown_as_it_is(folder: Path, key: str) -> None:
    with pytest.raises(ChatError) as caught:
        chat(folder, CHATML).pieces(answer(**{key: 1}))
    assert str(caught.value).startswith(f"the chat template doesn't print `{key}` of message 2, ")
    assert str(caught.value).endswith(f"--ignore-keys {key}")
    calling = chat(folder, CALLING.replace("m.calls[0].name", "m.calls.a"))
    with pytest.raises(ChatError, match=re.escape(f"all of `calls` of message 2 (`{key}` in it)")):
        calling.pieces(answer("", calls={"a": 1, key: 1}))


@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_a_value_of_many_levels_is_one_sentence(folder: Path, kind: str) -> None:
    value: Any = "x"
    for level in range(900):
        value = [value] if kind == "lists" else {"k": value}
        if level == 99:
            assert chat(folder, ALL_CALLS).pieces(answer("", calls=value)[1:])
        elif level == 100:
            with pytest.raises(ChatError, match=r"^`calls` of message 1 has more than 100 .*--ignore-keys calls$"):
                chat(folder, ALL_CALLS).pieces(answer("", calls=value)[1:])
    with pytest.raises(ChatError, match=r"^`calls` of message 1 has more than 100 levels of lists and objects"):
        chat(folder, ALL_CALLS).pieces(answer("", calls=value)[1:])
