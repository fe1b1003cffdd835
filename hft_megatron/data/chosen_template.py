"""The chat template of a run: the one that --chat-template names, else the tokenizer's own, else the project's."""

from collections.abc import Sequence

from hft_megatron.data import templates
from hft_megatron.data.special_tokens import SpecialToken
from hft_megatron.data.tokenizer_files import TEMPLATE_FILE, TokenizerFiles
from hft_megatron.errors import UserError


def choose_template(choice: str | None, files: TokenizerFiles, special_tokens: Sequence[SpecialToken]) -> str:
    """The jinja text.

    Raises what ``read_template`` does, and UserError for a folder with several templates of which none is ``default``.
    """
    if choice is not None:
        return templates.read_template(choice, special_tokens)
    own = _own_template(files)
    return templates.DEFAULT if own is None else own


def _own_template(files: TokenizerFiles) -> str | None:
    """As transformers chooses it: the file, else the config's, which may hold several by name."""
    path = files.folder / TEMPLATE_FILE
    if files.reads_folder and path.exists():
        return path.read_text(encoding="utf-8")
    template = files.config.get("chat_template")
    if not isinstance(template, list):
        return None if template is None else str(template)
    by_name = {str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)}
    if "default" not in by_name:
        raise UserError(
            f"--tokenizer-model {files.folder} has chat templates named {', '.join(sorted(by_name))} but no `default`; "
            f"name the one to use `default`, or give it by --chat-template."
        )
    return str(by_name["default"])
