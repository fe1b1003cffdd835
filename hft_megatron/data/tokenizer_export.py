"""Comparison of transformers' reading of a tokenizer's files with ours, by probes, and export files with our ids.

Its pipelines of one folder differ between versions; a difference is reported, and the export is written so that there
is none.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.templates import templates_of_export
from hft_megatron.data.tokenizer import AnyTokenizer, Piece, Place, SpecialTokens, Tokenizer, TokenizerFacts
from hft_megatron.data.tokenizer_files import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    COPIED_FILES,
    MODEL_FILE,
    NAME_KEYS,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
)

TEXTS = (
    "Hello world",
    " leading",
    "",
    " ",
    "  two leading and trailing  ",
    "a  b   c",
    "line\nends\r\n\n\n behind",
    "\n\n",
    "\ttab\t\tstops",
    "0 12 345 6789 3.14",
    "it's I'LL _x_ `y`",
    "Größe, façade, naïve",
    "日本語の文章。한국어",
    "🙂 👩‍🚀 🇩🇪",
    "\uff26\uff35\uff2c\uff2c\u3000\uff57idth \ufb01ne ½",
    "zero\u200bwidth\ufeff nb\u00a0sp",
    "▁mark ▁▁",
    "<0x0A> [INST] <<SYS>>",
)
"""Texts where tokenizers are known to differ: white space, digits, scripts, and normalized characters."""
AROUND_NAME = ("{}text", "{} text", "text{}", "text {} text", "text{}text", "  {}  ", "{}{}\nx")
"""Forms with the name of a token in them."""
_SPECIAL, _IN_TEXT = 3, 8
"""Number of special tokens' names to try, which are alike, and of names that a text may hold."""


def first_difference(tokenizer: Tokenizer, encode: Callable[[str, bool], list[int]]) -> str | None:
    """A clause about the first text whose ids by ``encode`` differ from the trained ones; None without a difference.

    ``encode`` takes a text and whether begin and end tokens are put around it.
    """
    facts = tokenizer.facts
    names = [*(token.content for token in facts.special_tokens[:_SPECIAL]), *facts.names_in_text[:_IN_TEXT]]
    texts = [*TEXTS, *(form.format(name, name) for name in names for form in AROUND_NAME)]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text, ids in zip(texts, trained_ids(tokenizer, texts), strict=True):
        for with_special, ours in ((False, ids), (True, begin + ids)):
            theirs = encode(text, with_special)
            if with_special and theirs == [*ours, tokenizer.eos_id]:
                continue  # training itself puts the end token after the answer
            if theirs != ours:
                how = "" if with_special else ", without special tokens,"
                return f"makes {theirs} of {text!r}{how} instead of {ours}"
    return _difference_inside(tokenizer, lambda text: encode(text, False))


def _difference_inside(tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> str | None:
    """The same for a text that continues another, which begins with a token's name because no merge crosses that."""
    for name in tokenizer.facts.names_in_text[:_IN_TEXT]:
        before, text = "a", f"{name}b {name} c"
        theirs = encode(before + text)
        start = tokenizer.encode(before)
        ours = start + tokenizer.encode_batch([text], continues=True)[0]
        # A name that is not found after a letter is text, which is cut elsewhere when it is whole.
        if theirs[: len(start)] == start and theirs != ours:
            return f"makes {theirs} of {before + text!r}, without special tokens, instead of {ours}"
    return None


def trained_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text in which names of special tokens are those tokens, as in a rendered conversation."""
    special = SpecialTokens(tokenizer.facts.special_tokens)
    return [ids.tolist() for ids, _ in tokenizer.encode_pieces([_pieces(special, text) for text in texts])]


def _pieces(special: SpecialTokens, text: str) -> list[Piece]:
    pieces: list[Piece] = []
    position = 0
    for found in special.pattern.finditer(text):
        pieces += _plain(text[position : found.start()], after_special=bool(pieces))
        pieces.append(Piece(text=special.found(found).content, place=Place.SPECIAL, trained=False))
        position = found.end()
    return pieces + _plain(text[position:], after_special=bool(pieces))


def _plain(text: str, *, after_special: bool) -> list[Piece]:
    place = Place.AFTER_SPECIAL if after_special else Place.START
    return [Piece(text=text, place=place, trained=False)] if text else []


class TransformersView:
    """transformers' tokenizer of a folder, or the reason why there is none."""

    def __init__(self, folder: Path) -> None:
        import transformers  # here, because it costs seconds that --help shouldn't

        self.version = transformers.__version__
        self.loaded: Any = None
        self.reason = ""
        try:
            self.loaded = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # anything can be wrong with the files, and the Rust reader raises plain Exception
            self.reason = " ".join(str(error).split())[:200]

    @property
    def names(self) -> dict[str, str]:
        """Special tokens by their keys in NAME_KEYS, defaults of the folder's tokenizer class included.

        Others have keys of their own in some versions only.
        """
        if self.loaded is None:
            return {}
        return {key: str(token) for key, token in self.loaded.special_tokens_map.items() if key in NAME_KEYS}

    def compared(self, tokenizer: AnyTokenizer, file: str) -> AnyTokenizer:
        """``tokenizer``, with a line about the first difference; then an export writes its own files.

        ``file`` is the source of its ids.
        """
        difference = self.difference(tokenizer)
        if difference is None:
            return tokenizer
        note = (
            f"{tokenizer.facts.source}: the ids are those of its {file}, but transformers {difference}; an export "
            f"has tokenizer files made for the same ids, and says where it cannot (--keep-source-tokenizer leaves the "
            f"source's)"
        )
        return tokenizer.with_facts(notes=(*tokenizer.facts.notes, note), exports_own_files=True)

    def difference(self, tokenizer: Tokenizer) -> str | None:
        """A clause about the first text whose ids differ in transformers, None where there is none."""
        if self.loaded is None:
            return f"{self.version} cannot load the folder ({self.reason})"
        found = first_difference(
            tokenizer, lambda text, with_special: list(self.loaded.encode(text, add_special_tokens=with_special))
        )
        return None if found is None else f"{self.version} {found}"


FILE_CLASS = "PreTrainedTokenizerFast"
"""The class for which every version of transformers reads tokenizer.json unchanged."""
_DECIDE_IDS = (
    "added_tokens_decoder",
    "add_prefix_space",
    "auto_map",
    "fix_mistral_regex",
    "from_slow",
    "legacy",
    "sp_model_kwargs",
    "split_special_tokens",
)
"""Settings of a class that would change the pipeline, or that tokenizer.json already has."""


def copy_files(
    directory: Path, files: TokenizerFiles, facts: TokenizerFacts, rust: RustTokenizer, *, adds_template: bool
) -> list[str]:
    """Copy the folder's own files and add only missing ones. Returns a line where a chat template is not its own.

    transformers' ``save_pretrained`` would write the loading machine's settings into the config and a class name that
    older versions don't know.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in COPIED_FILES:
        if (files.folder / name).exists():
            shutil.copyfile(files.folder / name, directory / name)
    if not ((directory / TOKENIZER_FILE).exists() or (directory / MODEL_FILE).exists()):
        _save(rust, facts, directory)
    config = dict(files.config) or {"tokenizer_class": FILE_CLASS}
    for key, name in _names(facts).items():
        if config.get(key) is None:
            config[key] = name
    return _write_config(directory, config, files, facts, adds_template=adds_template)


def write_files(
    directory: Path, files: TokenizerFiles, tokenizer: Tokenizer, rust: RustTokenizer, *, adds_template: bool
) -> list[str]:
    """Write ``rust``, and a config whose class reads it unchanged.

    Returns lines about differences from the folder, and about a text whose ids by the written files differ from those
    of ``tokenizer``, used in training.
    """
    facts = tokenizer.facts
    directory.mkdir(parents=True, exist_ok=True)
    if files.reads_folder and (files.folder / MODEL_FILE).exists():
        shutil.copyfile(files.folder / MODEL_FILE, directory / MODEL_FILE)
    _save(rust, facts, directory)
    begins = facts.bos_id is not None
    config = {
        **{key: value for key, value in files.config.items() if key not in (*_DECIDE_IDS, *NAME_KEYS)},
        **{key: None for key in NAME_KEYS if key in files.config and files.config[key] is None},
        **_names(facts),
        "tokenizer_class": FILE_CLASS,
        "add_bos_token": begins,
        "add_eos_token": _ends(rust, facts),
    }
    if files.variables:
        has_list = isinstance(config.get("extra_special_tokens"), list)
        config["model_specific_special_tokens" if has_list else "extra_special_tokens"] = dict(files.variables)
    of_templates = _write_config(directory, config, files, facts, adds_template=adds_template)
    changes = [_what_changed(files, config)] if files.config else []
    difference = pipeline_difference(tokenizer, RustTokenizer.from_file(str(directory / TOKENIZER_FILE)))
    if difference is None:
        written = "tokenizer files written so that transformers gives the trained ids"
        return [*(f"{written}: {it}" for it in changes), *of_templates]
    return [
        *of_templates,
        *(f"tokenizer files written: {it}" for it in changes),
        f"the exported {TOKENIZER_FILE} does not give the trained ids for every text: it {difference}",
    ]


def pipeline_difference(tokenizer: Tokenizer, rust: RustTokenizer) -> str | None:
    """A clause about the first text whose ids by ``rust`` and ``tokenizer`` differ; None without a difference."""
    return first_difference(
        tokenizer, lambda text, with_special: rust.encode(text, add_special_tokens=with_special).ids
    )


def _names(facts: TokenizerFacts) -> dict[str, str]:
    """Special tokens by their keys, with the pad token in use if there is to be one."""
    variables = facts.template_variables
    named = {key: variables[key] for key in NAME_KEYS if facts.named_id(key) is not None}
    if not facts.names_pad:
        return named
    return {**named, "pad_token": next(token.content for token in facts.special_tokens if token.id == facts.pad_id)}


def _ends(rust: RustTokenizer, facts: TokenizerFacts) -> bool:
    return rust.encode("a").ids[-1:] == [facts.eos_id]


def _save(rust: RustTokenizer, facts: TokenizerFacts, directory: Path) -> None:
    """Write tokenizer.json, without a pad token that the model has no row for."""
    state = json.loads(rust.to_str())
    state["added_tokens"] = [
        # Names that are searched for in normalized text are found elsewhere than where they were trained.
        {**token, "normalized": token["normalized"] and not token["special"]}
        for token in state["added_tokens"]
        if token["id"] < facts.vocab_size
    ]
    text = json.dumps(state, ensure_ascii=False, indent=2)
    (directory / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")


def _write_config(
    directory: Path, config: dict[str, Any], files: TokenizerFiles, facts: TokenizerFacts, *, adds_template: bool
) -> list[str]:
    """Write tokenizer_config.json and the chat templates; a line where one is not the folder's own."""
    templates = templates_of_export(files, facts.chat_template, adds=adds_template)
    config.pop("chat_template", None)
    if templates.in_config is not None:
        config["chat_template"] = templates.in_config
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in templates.files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(text)
    return [templates.line] if templates.line else []


def _what_changed(files: TokenizerFiles, config: Mapping[str, Any]) -> str:
    old = {key: value for key, value in files.config.items() if key != "chat_template"}
    gone = [key for key in old if key not in (*config, *NAME_KEYS)]
    given = [key for key in config if key not in (*NAME_KEYS, "chat_template") and old.get(key) != config[key]]
    left_out = [name for name in (SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE) if (files.folder / name).exists()]
    settings = ", ".join([*(f"{key} {json.dumps(config[key])}" for key in given), *(f"no {key}" for key in gone)])
    without = f"; {' and '.join(left_out)} left out, as {TOKENIZER_FILE} has their tokens" if left_out else ""
    return f"{TOKENIZER_FILE} with the pipeline in use, {CONFIG_FILE} with {settings}{without}"
