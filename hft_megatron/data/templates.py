"""The chat templates that come with the project, and where the one of a run is from.

All of them render every text exactly as it is, whatever roles follow each other, and mark what the assistant produces
with ``{% generation %}``, its end token included. A role that the family of models doesn't have is refused. The export
writes the template in use next to the model.
"""

from collections.abc import Sequence
from pathlib import Path

from hft_megatron.data.rendering import TemplateError, compile_template
from hft_megatron.data.special_tokens import SpecialToken
from hft_megatron.errors import UserError

_BOS = "bos_token if bos_token is defined and bos_token not in (eos_token, '<|im_start|>') else ''"
"""Not what tokenizers name that put no begin token before a text: GPT-2's ends texts, and SmolLM2's opens turns."""
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
"""Nothing but the texts, one after the other; an answer ends with the end token."""

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
"""For a tokenizer that brings none."""
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
    """The text of a jinja file. Raises UserError, which begins with ``place``, where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UserError(f"{place} can't be read: {reason}; name a jinja file.") from error
