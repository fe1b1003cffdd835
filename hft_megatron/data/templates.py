"""Chat templates: built-in ones by name, and the choice between a folder's files and the options.

All built-in ones render every text exactly as it is, whatever the order of roles, and mark the assistant's text with
``{% generation %}``, its end token included. A role that the family of models doesn't have is refused. The export
writes the template in use next to the model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.data.rendering import TemplateError, compile_template
from hft_megatron.data.tokenizer import SpecialToken
from hft_megatron.data.tokenizer_files import CONFIG_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER, TokenizerFiles
from hft_megatron.errors import UserError

_BOS = "bos_token if bos_token is defined and bos_token not in (eos_token, '<|im_start|>') else ''"
"""The begin token, except for tokenizers that put none before a text: GPT-2's ends texts, and SmolLM2's opens turns."""
_BEGIN = f"{{{{- {_BOS} }}}}\n"

PLAIN = (
    _BEGIN
    + """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{% endgeneration %}
{{- '' if loop.last else '\\n' }}
{%- else %}{{- message['content'] + '\\n' }}
{%- endif %}
{%- endfor %}
"""
)
"""Only the texts, one after the other; an answer ends with the end token."""

TULU = (
    _BEGIN
    + """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' }}{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}
{{- '' if loop.last else '\\n' }}
{%- elif message['role'] in ('system', 'user') %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- else %}{{- raise_exception('the role ' + message['role'] + ' is not one of system, user and assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
"""
)
"""Tulu's form, whose tags are plain text in any vocabulary: the one for a tokenizer without a template of its own."""

LLAMA2 = (
    f"{{%- set begin = {_BOS} %}}\n"
    + """\
{%- for message in messages %}
{%- set role = message['role'] %}
{%- set before = '' if loop.first else loop.previtem['role'] %}
{%- set after = '' if loop.last else loop.nextitem['role'] %}
{%- if before in ('', 'assistant') %}{{- begin }}{% endif %}
{%- if role == 'assistant' %}
{{- '[INST]  [/INST]' if before in ('', 'assistant') else '' }}
{%- generation %}{{- ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}
{%- elif role == 'system' %}
{{- '[INST] <<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' + ('' if after == 'user' else ' [/INST]') }}
{%- elif role == 'user' %}
{{- ('' if before == 'system' else '[INST] ') + message['content'] + ' [/INST]' }}
{%- else %}{{- raise_exception('the role ' + message['role'] + ' is not one of system, user and assistant') }}
{%- endif %}
{%- endfor %}
"""
)
"""Llama 2's: a round between begin and end tokens, the system's text inside the instruction that follows it.

An answer has one space on either side, as Meta's code has it; both belong to what the model produces. One that
answers nothing gets an empty instruction."""

LLAMA3 = (
    _BEGIN
    + """\
{%- for message in messages %}
{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{%- if role not in ('system', 'user', 'assistant', 'ipython') %}
{{- raise_exception('the role ' + message['role'] + ' is not one of system, user, assistant, tool and ipython') }}
{%- endif %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if role == 'assistant' %}
{%- generation %}{{- message['content'] + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message['content'] + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
)
"""Llama 3's headers, without the dates and definitions of tools that 3.1 adds; what a tool answers is ipython's."""

CHATML = (
    _BEGIN
    + """\
{%- for message in messages %}
{%- if message['role'] not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception('the role ' + message['role'] + ' is not one of system, user, assistant and tool') }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
)
"""ChatML, after the begin token where the tokenizer has one."""

BUILT_IN = {"plain": PLAIN, "tulu": TULU, "llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML}
DEFAULT = TULU
"""Template for a tokenizer that has none."""
_NEEDS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def read_template(choice: str, special_tokens: Sequence[SpecialToken]) -> str:
    """The jinja text that --chat-template names: a built-in one, else a file.

    Raises UserError for a built-in one whose tokens the tokenizer lacks, and for a file that isn't a template.
    """
    if choice in BUILT_IN:
        names = {token.content for token in special_tokens}
        for token in _NEEDS.get(choice, ()):
            if token not in names:
                raise UserError(
                    f"--chat-template {choice} needs the special token {token}, which the tokenizer doesn't have; use "
                    f"tulu, whose tags are text, or the tokenizer that belongs to {choice}."
                )
        return BUILT_IN[choice]
    if not Path(choice).exists():
        raise UserError(
            f"--chat-template {choice} is neither a file nor one of {', '.join(BUILT_IN)}; name one of them."
        )
    text = read_text(Path(choice), f"--chat-template {choice}")
    if not text:
        raise UserError(f"--chat-template {choice} is empty; name a jinja file with a template.")
    try:
        compile_template(text)
    except TemplateError as error:
        raise UserError(f"--chat-template {choice}: {error}; correct the file.") from error
    return text


def read_text(path: Path, place: str) -> str:
    """The text of a jinja file. Raises UserError, which begins with ``place``, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UserError(f"{place} cannot be read: {reason}; name a jinja file.") from error


_DEFAULT = "default"
"""Name of the template with which transformers renders conversations."""


def choose_template(choice: str | None, files: TokenizerFiles, special_tokens: Sequence[SpecialToken]) -> str:
    """The jinja text of the template in use.

    Raises what ``read_template`` does, and UserError for a folder's template that is empty, not text or unreadable, and
    for several templates of which none is ``default``.
    """
    if choice is not None:
        return read_template(choice, special_tokens)
    own = _own_template(files)
    return DEFAULT if own is None else own


@dataclass(frozen=True, kw_only=True)
class ExportedTemplates:
    """The chat templates of an export, in the places where transformers looks for them."""

    in_config: object
    """Value of ``chat_template`` in tokenizer_config.json; None where it has none."""
    files: Mapping[str, bytes]
    """Template files by path in the folder."""
    line: str = ""
    """A line for the log, where they are not all the folder's own."""


def templates_of_export(files: TokenizerFiles, text: str, *, adds: bool) -> ExportedTemplates:
    """The folder's templates in their places, with ``text``, the one in use, as the default.

    A folder without a template gets it only if the export ``adds`` it.
    """
    in_config = files.config.get("chat_template")
    paths = [*_template_files(files), *([files.folder / TEMPLATE_FILE] if _has_template_file(files) else [])]
    in_files = {str(path.relative_to(files.folder)): path.read_bytes() for path in paths}
    if _is_own(files, text):
        return ExportedTemplates(in_config=in_config, files=in_files)
    if in_config is None and not in_files:
        added = {TEMPLATE_FILE: text.encode()} if adds else {}
        line = f"{TEMPLATE_FILE} is added, with the chat template in use: the folder has none"
        return ExportedTemplates(in_config=None, files=added, line=line if adds else "")
    holders = [name for name in (TEMPLATE_FILE, f"{TEMPLATES_FOLDER}/{_DEFAULT}.jinja") if name in in_files]
    if in_config is not None:
        in_config = _with_default(in_config, text)
    elif not holders:
        holders = [TEMPLATE_FILE]
    return ExportedTemplates(
        in_config=in_config,
        files=in_files | dict.fromkeys(holders, text.encode()),
        line="the default chat template is that of --chat-template instead of the folder's own",
    )


def _is_own(files: TokenizerFiles, text: str) -> bool:
    try:
        return _own_template(files) == text
    except UserError:  # unreadable, or without a default, where another was asked for
        return False


def _with_default(template: object, text: str) -> object:
    if isinstance(template, dict):
        return {**template, _DEFAULT: text}
    if isinstance(template, list):
        others = [each for each in template if not (isinstance(each, dict) and each.get("name") == _DEFAULT)]
        return [{"name": _DEFAULT, "template": text}, *others]
    return text


def _own_template(files: TokenizerFiles) -> str | None:
    """The template that transformers chooses: the template files, else the config's; both may be several by name."""
    paths = {path.stem: path for path in _template_files(files)}
    if _has_template_file(files):
        paths.setdefault(_DEFAULT, files.folder / TEMPLATE_FILE)
    if paths:
        _refuse_without_default(files, list(paths))
        path = paths[_DEFAULT]
        return _refuse_empty(read_text(path, str(path)), str(path))
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
    """Texts of an object with texts by name, or of a list of objects that have ``name`` and ``template``."""
    if isinstance(template, dict):
        return template
    listed = template if isinstance(template, list) else []
    return {str(each["name"]): each.get("template") for each in listed if isinstance(each, dict) and "name" in each}


def _refuse_without_default(files: TokenizerFiles, names: Sequence[str]) -> None:
    if _DEFAULT not in names:
        raise UserError(
            f"--tokenizer-model {files.folder} has chat templates named {', '.join(sorted(names))} but no "
            f"`{_DEFAULT}`; rename the one to use `{_DEFAULT}`, or choose one with --chat-template."
        )


def _refuse_empty(text: str, place: str) -> str:
    if not text:
        raise UserError(f"{place} is empty; write the template, remove it, or choose one with --chat-template.")
    return text


def _shown(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
