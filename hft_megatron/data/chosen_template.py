"""The chat template of a run: the one that --chat-template names, else the tokenizer's own, else the project's."""

import json
from collections.abc import Sequence
from pathlib import Path

from hft_megatron.data import templates
from hft_megatron.data.special_tokens import SpecialToken
from hft_megatron.data.tokenizer_files import CONFIG_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER, TokenizerFiles
from hft_megatron.errors import UserError

_DEFAULT = "default"
"""Name of the template that transformers renders conversations with."""


def choose_template(choice: str | None, files: TokenizerFiles, special_tokens: Sequence[SpecialToken]) -> str:
    """The jinja text.

    Raises what ``read_template`` does, and UserError for a folder's template that is empty, no text or not to be read,
    and for several templates of which none is ``default``.
    """
    if choice is not None:
        return templates.read_template(choice, special_tokens)
    own = _own_template(files)
    return templates.DEFAULT if own is None else own


def other_templates(files: TokenizerFiles) -> dict[str, bytes]:
    """The folder's further templates by name, which an export keeps: all whose name can be that of a file."""
    by_name = {path.stem: path.read_bytes() for path in _template_files(files)}
    if not by_name and not _has_template_file(files):
        listed = _by_name(files.config.get("chat_template"))
        by_name = {name: text.encode() for name, text in listed.items() if isinstance(text, str)}
    return {name: text for name, text in by_name.items() if name != _DEFAULT and Path(name).name == name}


def _own_template(files: TokenizerFiles) -> str | None:
    """As transformers chooses it: the template files, else the config's, either of which may be several by name."""
    paths = {path.stem: path for path in _template_files(files)}
    if _has_template_file(files):
        paths.setdefault(_DEFAULT, files.folder / TEMPLATE_FILE)
    if paths:
        _refuse_without_default(files, list(paths))
        path = paths[_DEFAULT]
        return _refuse_empty(templates.read_text(path, str(path)), str(path))
    place = f"{files.folder / CONFIG_FILE}: chat_template"
    template = files.config.get("chat_template")
    if template is None:
        return None
    if isinstance(template, list | dict):
        by_name = _by_name(template)
        if not by_name:
            raise UserError(
                f"{place} is {_shown(template)}; give its text, or a list of objects with name and template."
            )
        _refuse_without_default(files, list(by_name))
        place, template = f"{place} named {_DEFAULT}", by_name[_DEFAULT]
    if not isinstance(template, str):
        raise UserError(f"{place} is {_shown(template)}; give its text, or remove the key.")
    return _refuse_empty(template, place)


def _has_template_file(files: TokenizerFiles) -> bool:
    return files.reads_folder and (files.folder / TEMPLATE_FILE).exists()


def _template_files(files: TokenizerFiles) -> list[Path]:
    return sorted((files.folder / TEMPLATES_FOLDER).glob("*.jinja")) if files.reads_folder else []


def _by_name(template: object) -> dict[str, object]:
    """Of an object with texts by name, or of a list of objects that have ``name`` and ``template``."""
    if isinstance(template, dict):
        return template
    listed = template if isinstance(template, list) else []
    return {str(each["name"]): each.get("template") for each in listed if isinstance(each, dict) and "name" in each}


def _refuse_without_default(files: TokenizerFiles, names: Sequence[str]) -> None:
    if _DEFAULT not in names:
        raise UserError(
            f"--tokenizer-model {files.folder} has chat templates named {', '.join(sorted(names))} but no "
            f"`{_DEFAULT}`; name the one to use `{_DEFAULT}`, or give it by --chat-template."
        )


def _refuse_empty(text: str, place: str) -> str:
    if not text:
        raise UserError(f"{place} is empty; write the template, remove it, or name one by --chat-template.")
    return text


def _shown(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
