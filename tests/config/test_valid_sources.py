"""The names of validation sources, and a file that lists them. Run: pytest tests/config/test_valid_sources.py

docs/data.md shows the keys of an entry; ``python -m tests.config.test_valid_sources`` prints what must stand there.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.config.valid_sources import ENTRY_KEYS, check_pair_sources, check_valid_sources, valid_sources
from hft_megatron.errors import UserError

DOCUMENTATION = Path(__file__).parents[2] / "docs/data.md"


def shown_table() -> str:
    """The keys as Markdown."""
    rows = [f"| `{key}` | {meaning} |" for key, meaning in ENTRY_KEYS.items()]
    return "\n".join(["| key | what it is |", "|---|---|", *rows])


def test_the_documentation_shows_the_keys_of_an_entry() -> None:
    assert f"\n{shown_table()}\n" in DOCUMENTATION.read_text(encoding="utf-8")


def names(*words: str) -> list[str]:
    return [source.name for source in valid_sources(DataConfig(valid_data_path=words))]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.jsonl", "a"),
        ("x/a.jsonl y/b.json.gz z/c.v1.parquet", "a b c.v1"),
        ("x/eval.jsonl y/eval.jsonl other.csv", "x/eval y/eval other"),
        ("k/x/eval.jsonl l/x/eval.jsonl", "k/x/eval l/x/eval"),
        ("x/eval.jsonl y/eval.jsonl y/eval.csv", "x/eval y/eval.jsonl eval.csv"),
        ("a.jsonl a.json", "a.jsonl a.json"),
        ("x/*.jsonl y/part-?.jsonl", "x/* part-?"),
        ("prefix.of.v2", "prefix.of.v2"),
        ("tasks/C-STANCE tasks/v1.txt", "C-STANCE v1.txt"),
    ],
)
def test_a_source_is_called_by_as_much_of_its_path_as_no_other_has(
    words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("tasks/C-STANCE", "tasks/v1.txt"):
        (tmp_path / folder).mkdir(parents=True)
    assert names(*words.split()) == expected.split()
    assert names(*reversed(words.split())) == [*reversed(expected.split())]


def listed(folder: Path, text: str) -> str:
    (folder / "valid.yaml").write_text(text, encoding="utf-8")
    return str(folder / "valid.yaml")


def test_an_entry_has_the_options_of_the_run_but_for_its_own(tmp_path: Path) -> None:
    file = listed(
        tmp_path,
        """
- name: general
  path: [more/a.txt, /b.txt]
  train_on_eos: no
  chat_template: null
- {name: chats, path: c.jsonl, data-keys: "q=prompt", long_examples: drop, loss_on: last, data_format: trace}
""",
    )
    data = DataConfig(valid_data_path=("x/chats.jsonl", file), ignore_keys="id", data_keys="a=answer")
    plain, general, chats = valid_sources(data)
    assert (plain.name, plain.data, plain.own) == ("x/chats", data, ())
    assert (general.name, general.paths) == ("general", (f"{tmp_path}/more/a.txt", "/b.txt"))
    assert (general.data, general.own) == (replace(data, train_on_eos=False), ("train_on_eos",))
    own = {"data_keys": "q=prompt", "long_examples": "drop", "loss_on": "last", "data_format": "trace"}
    assert (chats.data, {*chats.own}) == (replace(data, **own), {*own})
    assert (chats.place, chats.folder) == (f"{file}:6", tmp_path)


GENERAL = "- name: general\n  path: a.txt\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "--valid-data-path FILE: the file must hold a list of sources, each `- name: ...` with its `path: ...`."),
        ("[]", "--valid-data-path FILE: the file must hold a list of sources"),
        ("name: a\npath: b", "--valid-data-path FILE: the file must hold a list of sources"),
        ("- a.jsonl", "FILE:1: a source must be `- name: ...` with its `path: ...`."),
        ("- name: [", "FILE:1 is not valid YAML: expected the node content, but found '<stream end>'."),
        ("- path: a", "FILE:1: the source has no name; add `name: ...`, which is text."),
        ("- name: ' a'\n  path: a", "FILE:1: the name of a source must be one line of text"),
        ("- name: [a, b]\n  path: a", "FILE:1: the name of a source must be one line of text"),
        (f"{GENERAL}- name: b", "FILE:3: the source has no path; add `path: ...`, which is text, or a list of texts."),
        ("- name: b\n  path: []", "FILE:1: the source has no path"),
        ("- name: b\n  path: [a, [b]]", "FILE:1: the source has no path"),
        ("- name: b\n  path: null", "FILE:1: the source has no path"),
        (f"{GENERAL}{GENERAL}", "FILE:1: another source has the name general as well; give every source its own name."),
        (f"{GENERAL}  paht: b", "FILE:3: paht is not a key of a source; choose from name, path, data_format"),
        (f"{GENERAL}  packing: true", "FILE:3: packing is not a key of a source"),
        (f"{GENERAL}  path: b", "FILE:3: path is set twice in one source"),
        (f"{GENERAL}  loss_on: users", "FILE:3: loss_on users: the value must be one of assistant, all, last."),
        (f"{GENERAL}  train_on_eos: 2", "FILE:3: train_on_eos 2: the value must be true or false."),
        (f"{GENERAL}  data_keys: x", "FILE:1: --data-keys x: 'x' is not KEY=NAME"),
        (f"{GENERAL}  prompt_separator: '\\x'", r"FILE:1: --prompt-separator \x: a \ must be followed by n, t or"),
        (f"{GENERAL}  ignore_keys: 'a,'", "FILE:1: --ignore-keys 'a,' has an empty name"),
    ],
)
def test_a_mistake_in_a_file_of_sources_is_a_sentence_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    file = listed(tmp_path, text)
    with pytest.raises(UserError) as error:
        check_valid_sources(DataConfig(valid_data_path=(file,)))
    assert str(error.value).startswith(sentence.replace("FILE", file))
    assert "\n" not in str(error.value)


def test_what_pairs_have_no_use_for_is_found_in_an_entry(tmp_path: Path) -> None:
    file = listed(tmp_path, f"{GENERAL}  loss_on: all")
    with pytest.raises(UserError, match=rf"^{file}:1: --loss-on all would also compare the prompts of a pair"):
        check_pair_sources(DataConfig(valid_data_path=(file,)))


def test_one_source_under_two_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--valid-data-path a.jsonl is given twice, but .*; leave one of them out\.$"):
        names("a.jsonl", "x/../a.jsonl")
    with pytest.raises(UserError, match=r"^--valid-data-path absent.yaml cannot be read: No such file"):
        names("absent.yaml")


if __name__ == "__main__":
    print(shown_table())
