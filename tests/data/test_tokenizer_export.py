"""How a folder is compared with what transformers makes of it, and what an export writes then."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer import fit_tokenizer
from hft_megatron.data.tokenizer_export import TransformersView
from hft_megatron.data.tokenizer_files import COPIED_FILES
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, write_rows
from tests.support.published_tokenizers import PUTS_BEGIN, PublishedTokenizers
from tests.support.tokenizers import make_byte_level

TURNS = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "It is 4."), ("user", "?"), ("assistant", "x")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedTokenizers:
    return PublishedTokenizers(tmp_path_factory.mktemp("published"))


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a version that cannot load any folder."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such class")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)


@pytest.fixture
def agreeing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a version that makes the same ids of every folder."""
    monkeypatch.setattr(TransformersView, "difference", lambda *_: None)


@pytest.mark.parametrize("name", PUTS_BEGIN)
def test_a_difference_is_a_line_with_an_example_and_after_export_there_is_none(
    published: PublishedTokenizers, tmp_path: Path, name: str
) -> None:
    folder = published.path(name)
    tokenizer = load_tokenizer(None, folder)
    differs = TransformersView(folder).difference(tokenizer) is not None
    told = [note for note in tokenizer.facts.notes if f"but transformers {transformers.__version__} makes" in note]
    assert len(told) == differs
    assert (tokenizer.bos_id is not None) is PUTS_BEGIN[name]
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    lines = tokenizer.export(tmp_path, adds_template=False)
    assert TransformersView(tmp_path).difference(tokenizer) is None
    exported = load_tokenizer(None, tmp_path)
    assert exported.facts.notes == ()
    assert (exported.bos_id, exported.eos_id, exported.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    if tokenizer.facts.exports_own_files:
        assert "tokenizer files written so that transformers gives the trained ids" in lines[0]
    else:
        assert lines == []
        copied = [file for file in COPIED_FILES if (folder / file).exists()]
        assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in copied)


def test_the_line_has_the_text_and_both_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_byte_level(tmp_path / "in")
    ours = load_tokenizer(None, folder).encode(" leading")
    other = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    other.normalizer = normalizers.Strip()
    theirs = other.encode(" leading", add_special_tokens=False).ids
    fake = transformers.PreTrainedTokenizerFast(tokenizer_object=other)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: fake)
    tokenizer = load_tokenizer(None, folder)
    [note] = tokenizer.facts.notes
    assert note.startswith(f"{folder}: the ids are those of its tokenizer.json, but transformers")
    assert f"makes {theirs} of ' leading', without special tokens, instead of {ours}; an export has" in note
    assert tokenizer.encode(" leading") == ours
    tokenizer.export(tmp_path / "out")
    monkeypatch.undo()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(" leading", add_special_tokens=False) == ours


def test_an_end_token_behind_every_text_is_no_difference(tmp_path: Path) -> None:
    folder = make_byte_level(tmp_path)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(name, rust.token_to_id(name)) for name in ("<|bos|>", "<|im_end|>")]
    rust.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|im_end|>", special_tokens=special)
    rust.save(str(folder / "tokenizer.json"))
    facts = load_tokenizer(None, folder).facts
    assert (facts.notes, facts.exports_own_files) == ((), False)


@pytest.mark.parametrize("name", ["llama2", "deepseek"])
def test_an_export_does_not_depend_on_the_version_that_is_installed(
    published: PublishedTokenizers, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    load_tokenizer(None, published.path(name)).export(tmp_path / "a")
    request.getfixturevalue("agreeing_transformers")
    tokenizer = load_tokenizer(None, published.path(name))
    assert tokenizer.facts.notes == ()
    tokenizer.export(tmp_path / "b")
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_keeping_the_source_copies_its_files(published: PublishedTokenizers, tmp_path: Path) -> None:
    for name in ("llama2", "vicuna"):
        folder, out = published.path(name), tmp_path / name
        assert load_tokenizer(None, folder).export(out, keep_source=True, adds_template=False) == []
        for file in COPIED_FILES:
            assert (out / file).exists() == (folder / file).exists()
            assert not (out / file).exists() or (out / file).read_bytes() == (folder / file).read_bytes()
        kept = json.loads((out / "tokenizer_config.json").read_text())
        source = json.loads((folder / "tokenizer_config.json").read_text())
        assert kept == source
        assert (source["pad_token"] is None) == (name == "llama2"), "a null is kept, too"


@pytest.mark.parametrize("name", ["llama2", "openllama", "smollm2"])
def test_names_and_identity_don_t_depend_on_transformers(
    published: PublishedTokenizers, name: str, request: pytest.FixtureRequest
) -> None:
    before = load_tokenizer(None, published.path(name)).facts
    request.getfixturevalue("without_transformers")
    after = load_tokenizer(None, published.path(name)).facts
    assert after.identity == before.identity
    assert after.template_variables == before.template_variables
    assert after.special_tokens == before.special_tokens
    assert "cannot load the folder (no such class)" in after.notes[-1]


@pytest.mark.usefixtures("without_transformers")
def test_a_folder_that_transformers_cannot_load_is_exported_so_that_it_can(
    published: PublishedTokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(None, published.path("tinyllama"))
    tokenizer.export(tmp_path)
    monkeypatch.undo()
    assert TransformersView(tmp_path).difference(tokenizer) is None


def test_another_pipeline_is_another_identity(published: PublishedTokenizers, tmp_path: Path) -> None:
    source = published.path("llama2")
    whole = load_tokenizer(None, source).facts.identity
    for change in ({"add_bos_token": False}, {"tokenizer_class": "PreTrainedTokenizerFast"}, {"eos_token": "<s>"}):
        folder = tmp_path / next(iter(change))
        shutil.copytree(source, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **change}))
        assert load_tokenizer(None, folder).facts.identity != whole, change
    (tmp_path / "pieces").mkdir()
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / file, tmp_path / "pieces" / file)
    assert load_tokenizer(None, tmp_path / "pieces").facts.identity != whole


def padded(folder: Path, **special: object) -> Path:
    """A byte-level folder whose pad token is the last of 335."""
    make_byte_level(folder, pad_token="<extra>")
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 334}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<extra>", **special}))
    return folder


def test_a_pad_token_without_a_row_is_replaced_also_in_the_export(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, padded(tmp_path / "in", unk_token="<|pad|>"))
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (335, 334)
    assert fit_tokenizer(tokenizer, 335) is tokenizer
    fitted = fit_tokenizer(tokenizer, 334)
    assert (fitted.vocab_size, fitted.pad_id) == (334, 333)
    assert "the pad token <extra> has the id 334, but the model has only 334 rows" in fitted.facts.notes[-1]
    assert fitted.encode("a<extra>") == tokenizer.encode("a<extra>")
    assert max(fitted.encode("a<extra>")) < 334
    [line] = fitted.export(tmp_path / "out", adds_template=False)
    assert "special_tokens_map.json and added_tokens.json left out" in line
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.pad_token, loaded.pad_token_id, len(loaded)) == ("<|pad|>", 333, 334)
    assert loaded.encode("a<extra>", add_special_tokens=False) == fitted.encode("a<extra>")


def test_another_token_without_a_row_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, padded(tmp_path / "one"))
    with pytest.raises(UserError, match="has ids up to 333, but the model's vocabulary has 333 rows"):
        fit_tokenizer(tokenizer, 333)
    also_eos = load_tokenizer(None, padded(tmp_path / "two", eos_token="<extra>"))
    with pytest.raises(UserError, match="has ids up to 334, but the model's vocabulary has 334 rows"):
        fit_tokenizer(also_eos, 334)


@pytest.mark.parametrize("template", [name for name in BUILT_IN if name != "llama3"])
def test_no_template_begins_with_a_token_that_the_tokenizer_never_puts(
    published: PublishedTokenizers, tmp_path: Path, template: str
) -> None:
    tokenizer = load_tokenizer(None, published.path("smollm2"), template)
    ids, mask = load(write_rows(tmp_path / "rows.jsonl", [{"messages": MESSAGES}]), tokenizer).example(0)
    begin = tokenizer.facts.named_id("bos_token")
    assert np.count_nonzero(ids == begin) == (len(MESSAGES) if template == "chatml" else 0)
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = loaded.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ids.tolist()
    assert theirs["assistant_masks"] == mask.astype(int).tolist()


@pytest.mark.parametrize("name", PUTS_BEGIN)
def test_a_completion_begins_as_transformers_begins_a_text_after_export(
    published: PublishedTokenizers, tmp_path: Path, name: str
) -> None:
    tokenizer = load_tokenizer(None, published.path(name))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "What is the capital?", "completion": " Paris."}])
    ids, mask = load(rows, tokenizer).example(0)
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("What is the capital?").input_ids == ids[: int(mask.argmax())].tolist()
    assert loaded.decode(ids, skip_special_tokens=True) == "What is the capital? Paris."
