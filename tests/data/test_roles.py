"""Turns of tools go to the templates that have them, are never trained, and are never left out in silence.

Run: pytest tests/data/test_roles.py
"""

from pathlib import Path

import pytest

from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.tokenizers import make_byte_level

SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "developer", "user", "tool", "ipython", "function", "observation")
OWN = (
    "{% for m in messages %}{% if CONDITION %}{{ '#' + m['role'] + '\n' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
)
"""A template of the tokenizer's own that prints the messages ``m`` of a condition."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_level(tmp_path_factory.mktemp("tokenizer"), special=SPECIAL)


def tokenizer_with(folder: Path, template: str, tmp_path: Path) -> Tokenizer:
    if template in BUILT_IN:
        return load_tokenizer(None, folder, template)
    (tmp_path / "own.jinja").write_text(template)
    return load_tokenizer(None, folder, str(tmp_path / "own.jinja"))


def text_and_trained(tokenizer: Tokenizer, *turns: tuple[str, str]) -> tuple[str, str]:
    """What the template makes of the turns, and what of it is trained."""
    messages = [{"role": role, "content": text} for role, text in turns]
    pieces = ChatTemplate(tokenizer.facts, LossRule()).pieces(messages)
    return "".join(piece.text for piece in pieces), "".join(piece.text for piece in pieces if piece.trained)


@pytest.mark.parametrize(
    ("template", "known", "printed"),
    [
        ("llama3", ("system", "user", "tool", "ipython"), "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"),
        ("chatml", ("system", "user", "tool"), "<|im_start|>tool\n3<|im_end|>\n"),
        ("plain", ROLES, "3\n"),
        ("tulu", ("system", "user"), None),
        ("llama2", ("system", "user"), None),
    ],
)
def test_a_built_in_template_has_the_roles_of_its_family(
    folder: Path, tmp_path: Path, template: str, known: tuple[str, ...], printed: str | None
) -> None:
    tokenizer = tokenizer_with(folder, template, tmp_path)
    for role in ROLES:
        turns = [("user", "1 + 2?"), ("assistant", "call"), (role, "3"), ("assistant", "Three.")]
        if role not in known:
            with pytest.raises(ChatError, match=f"the role {role} is not one of system, user.*have the role {role},"):
                text_and_trained(tokenizer, *turns)
            continue
        text, trained = text_and_trained(tokenizer, *turns)
        assert printed is None or role != "tool" or printed in text
        assert "call" in trained
        assert "Three." in trained
        assert "3" not in trained


@pytest.mark.parametrize(
    ("condition", "turns", "missed"),
    [
        ("m['role'] != 'tool'", ["user", "tool", "assistant"], "message 2 \\(of the role tool"),
        ("m['role'] in ('user', 'assistant')", ["system", "user", "assistant"], "message 1 \\(of the role system"),
        ("loop.index > 1", ["user", "user", "assistant"], "message 1 \\(of the role user"),
        ("true", ["system", "user", "tool", "assistant"], None),
    ],
)
def test_a_message_that_a_template_leaves_out_is_named(
    folder: Path, tmp_path: Path, condition: str, turns: list[str], missed: str | None
) -> None:
    tokenizer = tokenizer_with(folder, OWN.replace("CONDITION", condition), tmp_path)
    conversation = [(role, "same") for role in turns]
    if missed is None:
        assert text_and_trained(tokenizer, *conversation)[1] == "same<|im_end|>"
        return
    with pytest.raises(ChatError, match=f"doesn't print the text of {missed}\\), which would be lost; choose a"):
        text_and_trained(tokenizer, *conversation)


def test_a_template_that_reads_a_text_and_refuses_another_prints_it(folder: Path, tmp_path: Path) -> None:
    checked = "{% if 'x' in m['content'] %}{{ raise_exception('no x') }}{% endif %}"
    template = OWN.replace("CONDITION", "true").replace("{% if true %}", "{% if true %}" + checked)
    assert text_and_trained(tokenizer_with(folder, template, tmp_path), ("tool", "3"), ("assistant", "b"))[1]
