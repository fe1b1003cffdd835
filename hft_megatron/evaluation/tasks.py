"""A task: its files, the questions made of their rows, and its measures."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from hft_megatron.config.file_digest import file_digest
from hft_megatron.data.files.sources import find_input

TaskKind = Literal["generate", "choose", "text", "preference"]
Split = Literal["test", "eval", "train"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One entry of a tasks file.

    ``prompt``, ``target``, ``answer`` and ``text`` are each the name of a column, or, with ``{{`` or ``{%`` in them, a
    jinja template over the columns (``row`` has them all, for names that jinja cannot write).
    """

    name: str
    """The task's own name in the results."""
    kind: TaskKind
    """`generate` continues a prompt and compares the text with references, `choose` scores answers that are given,
    `text` scores documents, `preference` scores pairs of answers."""
    files: tuple[str, ...]
    """Files, globs or TRACE task folders, relative to the tasks file: .jsonl, .json, .csv, .tsv, .txt, each also with
    .gz or .zst, and .parquet."""
    split: Split = "test"
    """Which file of a TRACE task's folder is read: test.json, eval.json or train.json."""
    rows: str | None = None
    """The key under which a .json file, if it is one object, has its list of rows."""
    columns: tuple[str, ...] = ()
    """Names of the columns of .csv and .tsv files whose first line is a row already."""
    limit: Annotated[int, Ge(1)] | None = None
    """Only the first so many rows."""
    metrics: tuple[str, ...] = ()
    """Names of measures; unset, by kind: exact_match; accuracy; perplexity and bits_per_byte; preference_accuracy."""

    prompt: str | None = None
    """The question."""
    chat: bool = False
    """Whether the prompt is the user's message in the model's chat template, instead of plain text behind the begin
    token."""
    system: str | None = None
    """The system message in front of the user's, as it is."""
    description: str | None = None
    """Text in front of the few-shot examples and the prompt, as it is."""
    target_delimiter: str = ""
    """Text between a prompt and its answer, a part of the answer: it stands in front of every choice, and of the
    answers of few-shot examples."""
    fewshot: Annotated[int, Ge(0)] = 0
    """Solved examples in front of the prompt; a row that equals the asked one is never among them."""
    fewshot_files: tuple[str, ...] = ()
    """Files of the solved examples; unset: `files`."""
    fewshot_split: Split | None = None
    """Which file of a TRACE task's folder the solved examples are from; unset: as `split`."""
    fewshot_seed: int | None = None
    """Draws other solved examples for each prompt, at random; unset: the first ones of the files."""
    fewshot_separator: str = "\n\n"
    """Text behind the description and behind each few-shot example."""
    cut_long_prompts: bool = False
    """Whether a prompt that leaves no room for the answer loses tokens at its beginning, behind the begin token, and is
    counted; otherwise it is an error."""

    target: str | None = None
    """The reference answer; a column with a list has several."""
    extract: str = "whole"
    """Rule that finds the answer in the generated text."""
    extract_target: str = "whole"
    """Rule that finds the answer in each reference; finding nothing there is an error."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens that are generated at most."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, besides the end token; they are no part of the answer."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """0 takes the most likely token each time; above, tokens are drawn."""
    top_k: Annotated[int, Ge(0)] = 0
    """Draws from so many most likely tokens; 0: from all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draws from the fewest most likely tokens that have this probability together."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the draws above temperature 0."""

    choices: tuple[str, ...] = ()
    """The answers to choose from: a column with a list of them, or with TruthfulQA's `choices` and `labels`; or a list
    of texts and templates, such as `["{{ A }}", "{{ B }}"]`."""
    answer: str | None = None
    """Which choice is right: its text, its number counted from 0, or its letter, whichever fits first (a number in JSON
    is no text); a list has several."""

    text: str = "text"
    """The document."""
    separator: str | None = None
    """The line between the documents of .txt files, such as `<|endoftext|>`; unset: a file is one document."""
    window: Annotated[int, Ge(2)] | None = None
    """Tokens that are read at once; unset: the model's context."""
    stride: Annotated[int, Ge(1)] | None = None
    """Tokens from the beginning of a window to that of the next; unset: `window`, so that windows share
    one token."""
    end_token: bool = False
    """Whether the token that ends a document is scored."""

    data_keys: str | None = None
    """As the option of `hft-megatron dpo`: `question=prompt`."""
    ignore_keys: str | None = None
    """As the option of `hft-megatron dpo`: `id,source`."""
    prompt_separator: str = ""
    """Text between a prompt and its answers, a part of the prompt."""

    place: str = ""
    """``tasks.yaml:3``, for errors; not a setting."""
    folder: Path = Path()
    """Folder that file names are relative to; not a setting."""

    def paths(self) -> tuple[Path, ...]:
        """The files in order. Raises UserError where one isn't there."""
        return find_input(f"{self.place}: files", self._words(self.files), f"{self.split}.json")

    def fewshot_paths(self) -> tuple[Path, ...]:
        """The files of the few-shot examples. Raises UserError where one isn't there."""
        option, split = f"{self.place}: fewshot_files", self.fewshot_split or self.split
        return find_input(option, self._words(self.fewshot_files or self.files), f"{split}.json")

    def _words(self, files: tuple[str, ...]) -> list[str]:
        return [str(self.folder / file) for file in files]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the settings and of the files' contents; their names and places don't count.

        Tasks of one digest ask the same questions of a model that has the same tokenizer and chat template. Raises
        UserError where a file doesn't exist.
        """
        settings: dict[str, Any] = asdict(self)
        for name in (*LOCATION, "files", "fewshot_files"):
            del settings[name]
        files = {"files": self.paths(), "fewshot_files": self.fewshot_paths() if self.fewshot else ()}
        contents = {name: [file_digest(path) for path in paths] for name, paths in files.items()}
        return hashlib.sha256(json.dumps([settings, contents], sort_keys=True).encode()).hexdigest()


LOCATION = ("place", "folder")
"""Fields that no tasks file has."""
_ALWAYS = ("name", "kind", "files", "split", "limit", "metrics")
_ROWS = ("rows", "columns")
_PROMPTED = ("prompt", "chat", "system", "description", "target_delimiter", "fewshot", "fewshot_files", "fewshot_split",
             "fewshot_seed", "fewshot_separator", "cut_long_prompts")  # fmt: skip
FIELDS_OF: Mapping[TaskKind, tuple[str, ...]] = {
    "generate": (*_ALWAYS, *_ROWS, *_PROMPTED, "target", "extract", "extract_target", "max_new_tokens", "stop",
                 "temperature", "top_k", "top_p", "seed"),
    "choose": (*_ALWAYS, *_ROWS, *_PROMPTED, "choices", "answer"),
    "text": (*_ALWAYS, *_ROWS, "text", "separator", "window", "stride", "end_token"),
    "preference": (*_ALWAYS, "cut_long_prompts", "data_keys", "ignore_keys", "prompt_separator"),
}  # fmt: skip
"""The fields that a kind reads."""
NEEDED_BY: Mapping[TaskKind, tuple[str, ...]] = {
    "generate": ("prompt", "target"),
    "choose": ("prompt", "choices"),
    "text": (),
    "preference": (),
}
"""Fields that a kind needs, besides name, kind and files."""
