"""Which of a folder's chat templates is used is what transformers uses, and an export keeps the others."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hft_megatron.data.rendering import Renderer
from hft_megatron.data.templates import PLAIN
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.tokenizers import make_byte_level, train_sentencepiece

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
DEFAULT, TOOLS, FILE, EXTRA = (f"{name}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}" for name in "DTFX")
LISTED = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": DEFAULT}]
PLACES: dict[str, tuple[object, dict[str, str], set[str]]] = {
    "object": ({"default": DEFAULT, "tool_use": TOOLS}, {}, {"tool_use"}),
    "list": (LISTED, {}, {"tool_use"}),
    "text": (DEFAULT, {}, set()),
    "file before list": (LISTED, {"chat_template.jinja": FILE}, set()),
    "folder alone": (None, {"additional_chat_templates/default.jinja": EXTRA}, set()),
    "folder before list": (LISTED, {"additional_chat_templates/default.jinja": EXTRA}, set()),
    "folder before file": (
        None,
        {"chat_template.jinja": FILE, "additional_chat_templates/default.jinja": EXTRA},
        set(),
    ),
    "file and others": (None, {"chat_template.jinja": FILE, "additional_chat_templates/rag.jinja": EXTRA}, {"rag"}),
}
"""By kind chat_template of the config, files, and the names of the others."""


def make_folder(folder: Path, template: object, files: dict[str, str]) -> Path:
    make_byte_level(folder)
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def templates_in(folder: Path) -> tuple[object, dict[str, str]]:
    """(that of the config, texts of files by path)."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return config.get("chat_template"), {
        str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.jinja")
    }


@pytest.mark.parametrize("place", PLACES)
def test_a_conversation_is_rendered_as_transformers_renders_it_before_and_after_export(
    tmp_path: Path, place: str
) -> None:
    template, files, others = PLACES[place]
    folder = make_folder(tmp_path / "in", template, files)
    tokenizer = load_tokenizer(None, folder)
    facts = tokenizer.facts
    ours = Renderer(facts.chat_template, facts.template_variables).render(MESSAGES, add_generation_prompt=False)
    for keep in (True, False):
        lines = tokenizer.with_facts(exports_own_files=True).export(tmp_path / str(keep), keep_source=keep)
        assert templates_in(tmp_path / str(keep)) == templates_in(folder), "in the form that they have there"
        assert not any("template" in line for line in lines)
    for each in (folder, tmp_path / "True", tmp_path / "False"):
        loaded = AutoTokenizer.from_pretrained(each)
        assert loaded.apply_chat_template(MESSAGES, tokenize=False) == ours
        assert set(loaded.chat_template if others else {}) - {"default"} == others


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_template_beside_a_model_file_is_used_without_a_config(tmp_path: Path, name: str, keep: bool) -> None:
    folder = tmp_path / "in"
    train_sentencepiece(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(FILE)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(None, folder)
    assert tokenizer.facts.chat_template == FILE
    (tmp_path / "out").mkdir()
    shutil.copyfile(folder / "config.json", tmp_path / "out/config.json")
    tokenizer.export(tmp_path / "out", keep_source=keep)
    for each in (folder, tmp_path / "out"):
        loaded = AutoTokenizer.from_pretrained(each)
        assert loaded.chat_template == FILE
    if not keep:
        assert loaded.encode("one two") == [1, *tokenizer.encode("one two")]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("", "chat_template is empty; write the template, remove it, or choose one with --chat-template"),
        ({"default": ""}, "chat_template named default is empty; write the template"),
        ({"default": {"a": 1}}, r'chat_template named default is \{"a": 1\}; give its text'),
        ([{"name": "default"}], "chat_template named default is null; give its text"),
        ({"tool_use": TOOLS}, "has chat templates named tool_use but no `default`; rename the one"),
        ([{"name": "b", "template": "B"}, {"name": "a", "template": "A"}], "named a, b but no `default`"),
        (
            ["{{ messages }}"],
            r'chat_template is \["\{\{ messages \}\}"\]; give its text, or a list of objects with name',
        ),
        ({}, r"chat_template is \{\}; give its text, or a list"),
        (7, "chat_template is 7; give its text, or remove the key"),
        (True, "chat_template is true; give its text"),
    ],
)
def test_a_template_of_the_config_that_is_no_text_is_one_sentence(
    tmp_path: Path, template: object, sentence: str
) -> None:
    folder = make_folder(tmp_path, template, {})
    with pytest.raises(UserError, match=sentence) as caught:
        load_tokenizer(None, folder)
    assert "\n" not in str(caught.value)
    assert load_tokenizer(None, folder, "plain").facts.chat_template == PLAIN


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
@pytest.mark.parametrize(
    ("content", "sentence"), [(b"\xe9{{ x }}", "cannot be read: it is not text in UTF-8"), (b"", "is empty; write the")]
)
def test_a_template_file_that_is_no_text_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    folder = make_folder(tmp_path, None, {name: ""})
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {sentence}"):
        load_tokenizer(None, folder)


@pytest.mark.parametrize("place", PLACES)
def test_another_template_takes_the_place_of_the_default_alone_and_that_is_said(tmp_path: Path, place: str) -> None:
    template, files, others = PLACES[place]
    folder = make_folder(tmp_path / "in", template, files)
    [line] = load_tokenizer(None, folder, "plain").export(tmp_path / "out")
    assert line == "the default chat template is that of --chat-template instead of the folder's own"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (loaded["default"] if isinstance(loaded, dict) else loaded) == PLAIN
    assert (
        {name: text for name, text in loaded.items() if name != "default"}
        == ({name: TOOLS if name == "tool_use" else EXTRA for name in others})
        if others
        else isinstance(loaded, str)
    )
    (before, before_files), (after, after_files) = templates_in(folder), templates_in(tmp_path / "out")
    assert type(before) is type(after)
    assert before_files.keys() == after_files.keys()


def test_a_folder_without_a_template_gets_one_only_where_it_is_to_be_added(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", None, {})
    assert load_tokenizer(None, folder).export(tmp_path / "without", adds_template=False) == []
    assert templates_in(tmp_path / "without") == (None, {})
    [line] = load_tokenizer(None, folder, "plain").export(tmp_path / "with")
    assert line == "chat_template.jinja is added, with the chat template in use: the folder has none"
    assert templates_in(tmp_path / "with") == (None, {"chat_template.jinja": PLAIN})


def test_named_templates_without_a_default_get_the_one_in_use(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", [{"name": "tool_use", "template": TOOLS}], {})
    load_tokenizer(None, folder, "plain").export(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": PLAIN, "tool_use": TOOLS}


def test_a_name_that_leads_out_of_the_folder_is_not_written(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", {"default": DEFAULT, "../evil": TOOLS}, {})
    load_tokenizer(None, folder).export(tmp_path / "out")
    assert not list(tmp_path.rglob("evil.jinja"))
    assert templates_in(tmp_path / "out") == templates_in(folder)
