"""Every key is honoured, refused or named in the log, as the table in formats/keys.py says.

Run: pytest tests/data/formats/test_keys.py
docs/data.md shows the table; ``python -m tests.data.formats.test_keys`` prints what must stand there.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: make install brings it")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hft_megatron.config.data import ignored_keys
from hft_megatron.data.files.rows import Row
from hft_megatron.data.formats.conversations import Chat
from hft_megatron.data.formats.keys import MESSAGE_KEYS, RECORD_KEYS, Key
from hft_megatron.data.formats.table import FORMATS, recognise
from hft_megatron.data.record_errors import printable
from hft_megatron.data.records import Layout, RecordReader, RecordRules
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, write_rows
from tests.support.tokenizers import make_byte_level

DOCUMENTATION = Path(__file__).parents[3] / "docs/data.md"
TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
RECORDS: dict[Any, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "alpaca": {"instruction": "add", "output": "2"},
    "prompt-completion": {"prompt": "1+1?", "completion": "2"},
    "trace": {"prompt": "1+1?", "answer": "2"},
    "input-output": {"input": "1+1?", "output": "2"},
    "text": {"text": "1+1=2"},
}
PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
KNOWN = {
    of: sorted({name for row in table for name in row.names})
    for of, table in (("record", RECORD_KEYS), ("message", MESSAGE_KEYS))
}
EMPTY: list[Any] = ["", "[]", "{}", "null", [], {}]
"""What columns without a value hold, besides nulls."""
VALUES = [["u"], "unlike", {"k": "v"}, 7, True, [{"role": "user", "content": "other"}], [[{"k": None}, 0]], *EMPTY]


def shown_table() -> str:
    """The table as Markdown."""
    lines = ["| where | keys | what it is | who reads it | here |", "|---|---|---|---|---|"]
    for where, table in (("record", RECORD_KEYS), ("message", MESSAGE_KEYS)):
        for row in table:
            names = ", ".join(f"`{name}`" for name in row.names)
            few = row.formats or row.roles
            of = f" of {', '.join(f'`{name}`' for name in few)}" if few else ""
            lines.append(f"| {where}{of} | {names} | {row.meaning} | {row.peers} | {_treatment(row)} |")
    return "\n".join(lines)


def _treatment(row: Key) -> str:
    words = {"printed": "printed by the chat template, or refused", "harmless": "named in the log"}
    *values, last = (repr(value) for value in row.neutral) if row.neutral else [""]
    unless = [f"it is {', '.join(values)} or {last}"] * bool(last)
    unless += [f"it repeats {'or stands within ' * row.may_be_within}another text"] * row.may_be_a_copy
    return words.get(row.treatment, row.treatment) + (f", unless {' or '.join(unless)}" if unless else "")


def test_the_documentation_shows_the_table() -> None:
    assert f"\n{shown_table()}\n" in DOCUMENTATION.read_text(encoding="utf-8")


def test_the_honoured_keys_of_records_are_those_that_the_formats_read() -> None:
    read = {(name, key) for name, format in FORMATS.items() for key in format.reads}
    rows = [row for row in RECORD_KEYS if row.treatment == "honoured"]
    assert read == {(name, key) for row in rows for name, key in product(row.formats, row.names)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")), "chatml")


def expected_of_record(key: str, value: Any, format: str) -> str:
    """What the table says, read line by line."""
    for row in RECORD_KEYS:
        if key in row.names and row.treatment == "refused" and format in (row.formats or (format,)):
            return "reported" if value in EMPTY or value in row.neutral else "refused"
    return "reported"


KEYS = st.text(min_size=1, max_size=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(sorted(RECORDS)),
    key=st.sampled_from(KNOWN["record"]) | KEYS,
    value=st.sampled_from(VALUES),
)
def test_a_key_of_a_record_is_refused_or_named_in_the_log_and_changes_nothing(
    tmp_path: Path, tokenizer: Tokenizer, format: Any, key: str, value: Any
) -> None:
    row = RECORDS[format]
    if key in (*FORMATS[format].keys, *FORMATS[format].reads):
        return
    plain = load(write_rows(tmp_path / "plain.jsonl", [row, row]), tokenizer, data_format=format)
    path = write_rows(tmp_path / "rows.jsonl", [row, {**row, key: value}])
    ignored: tuple[str, ...] = ()
    if expected_of_record(key, value, format) == "refused":
        with pytest.raises(UserError, match=rf"rows.jsonl:2: `{key}` means .*--ignore-keys {key}\.$"):
            load(path, tokenizer, data_format=format)
        ignored = (key,)
    dataset = load(path, tokenizer, data_format=format, ignore_keys=ignored)
    what = "keys ignored by --ignore-keys" if ignored else "keys that are not read"
    assert dataset.describe()[1:] == [f"{path}: {what}: {printable(key)} (1)"]
    assert_same(dataset, plain)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(["messages", "sharegpt"]),
    key=st.sampled_from(KNOWN["message"]) | KEYS,
    value=st.sampled_from(VALUES),
    turn=st.integers(0, 1),
)
def test_a_key_of_a_message_is_refused_or_named_in_the_log_and_changes_nothing(
    tmp_path: Path, tokenizer: Tokenizer, format: Any, key: str, value: Any, turn: int
) -> None:
    rows = [row for row in MESSAGE_KEYS if key in row.names and not row.roles]
    treatment = rows[0].treatment if rows else "printed"
    if key in ("role", "content", "from", "value") or treatment == "honoured":
        return
    ((where, messages),) = RECORDS[format].items()
    plain = load(write_rows(tmp_path / "plain.jsonl", [RECORDS[format]] * 2), tokenizer)
    changed = [{**message, key: value} if n == turn else message for n, message in enumerate(messages)]
    path = write_rows(tmp_path / "rows.jsonl", [RECORDS[format], {where: changed}])
    ignored: tuple[str, ...] = ()
    if treatment != "harmless" and value not in EMPTY:
        with pytest.raises(UserError) as caught:
            load(path, tokenizer)
        assert f"`{printable(key)}` of message {turn + 1}" in str(caught.value)
        assert str(caught.value).endswith(f"--ignore-keys {printable(key)}.")
        ignored = (key,)
    dataset = load(path, tokenizer, ignore_keys=ignored)
    what = "keys ignored by --ignore-keys" if ignored else "keys that are not read"
    told = value not in ([], {})  # which are left out, since templates ask whether a key is there
    assert dataset.describe()[1:] == [f"{path}: {what}: {printable(key)} (1)"] * told
    assert_same(dataset, plain)


def assert_same(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for index in range(len(one)):
        for mine, theirs in zip(one.example(index), other.example(index), strict=True):
            assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("key", KNOWN["record"])
def test_a_key_of_a_pair_is_treated_as_the_table_says(key: str) -> None:
    if key in PAIR:
        return
    row = {**PAIR, key: "unlike"}
    if expected_of_record(key, "unlike", "preference") == "refused":
        says = "cannot be used with a prompt" if key == "system" else "means"
        with pytest.raises(UserError, match=f"^x:1: `{key}` {says} "):
            record(row, "preference")
    else:
        assert record(row, "preference").keys.unread == (key,)
    assert record(row, "preference", key).keys.ignored == (key,)


def record(row: dict[str, Any], format: Any, *ignored: str) -> Any:
    reader = RecordReader(RecordRules(ignore_keys=ignored))
    return reader.record_of(Row(place="x:1", value=row), Layout(format=format))


def test_a_pair_whose_answers_repeat_the_messages_is_refused_with_a_fix_that_works() -> None:
    row = {"messages": TURNS, "chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "3"}]}
    with pytest.raises(UserError, match="train on pairs with hft-megatron dpo --data-format preference, or") as caught:
        record(row, recognise(row))
    assert "`chosen`" in str(caught.value)
    assert record(row, "preference").chosen[0]["content"] == "2"


@pytest.mark.parametrize("empty", [None, "", [], {}, "[]"], ids=repr)
@pytest.mark.parametrize("key", ["tools", "images", "chosen", "system", "label"])
def test_a_column_without_a_value_is_no_reason_to_refuse(key: str, empty: Any) -> None:
    found = record({"messages": TURNS, key: empty}, "messages").keys.unread
    assert found == (() if empty is None else (key,))


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": TURNS, "prompt": "1+1?"}, "messages"),
        ({"messages": TURNS, "completion": [TURNS[1]]}, "messages"),
        ({"text": "Q: 1+1?\nA: 2", "prompt": "1+1?", "completion": "2"}, "text"),
        ({"prompt": "a", "completion": "b", "weight": 1.0}, "prompt-completion"),
        ({"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "3"}], "messages": TURNS}, "preference"),
    ],
)
def test_what_repeats_the_record_or_changes_nothing_is_only_named(row: dict[str, Any], format: Any) -> None:
    keys = FORMATS[format].keys
    assert record(row, format).keys.unread == tuple(key for key in row if key not in keys)


@pytest.mark.parametrize("value", ["1+1", 7, [], "2 "])
def test_what_only_resembles_a_text_of_the_record_is_no_copy(value: Any) -> None:
    if value == []:
        assert record({"messages": TURNS, "prompt": value}, "messages").keys.unread == ("prompt",)
        return
    with pytest.raises(UserError, match=r"^x:1: `prompt` means another question and answer"):
        record({"messages": TURNS, "prompt": value}, "messages")


PYTHON = {"instruction": "Add them.", "input": "1, 2", "output": "3"}
RENDERED = "Below is a task.\n\n### Instruction:\nAdd them.\n\n### Input:\n1, 2\n\n### Output:\n3"


def test_an_instruction_rendered_with_its_answer_is_a_copy_and_every_other_prompt_is_refused() -> None:
    assert record({**PYTHON, "prompt": RENDERED}, "alpaca").keys.unread == ("prompt",)
    for part in PYTHON.values():
        with pytest.raises(UserError, match="`prompt` means another question and answer"):
            record({**PYTHON, "prompt": RENDERED.replace(part, "x")}, "alpaca")


@pytest.mark.parametrize(
    ("key", "value", "row", "format", "fix"),
    [
        ("system_prompt", "Be brief.", {"instruction": "a", "output": "b"}, "alpaca", "system_prompt=system"),
        ("system_prompt", "Be brief.", {"prompt": "a", "completion": "b"}, "prompt-completion", "system_prompt=system"),
        ("context", "Birds fly.", {"instruction": "a", "output": "b"}, "alpaca", "context=input"),
        ("context", "Birds fly.", {"prompt": "a", "completion": "b"}, "prompt-completion", "context=input"),
    ],
)
def test_a_key_that_peers_read_is_refused_with_a_fix_that_works(
    key: str, value: str, row: dict[str, Any], format: Any, fix: str
) -> None:
    with pytest.raises(UserError, match=f"^x:1: `{key}` means .*--data-keys {fix}"):
        record({**row, key: value}, format)
    names = dict([fix.split("=")]) | {"prompt": "instruction", "completion": "output"}
    mapped = RecordReader(
        RecordRules(data_keys=tuple((name, names[name]) for name in names if name in {**row, key: 1}))
    )
    found = mapped.record_of(Row(place="x:1", value={**row, key: value}), Layout(format="alpaca"))
    assert isinstance(found, Chat)
    assert any(value in message["content"] for message in found.messages)


@pytest.mark.parametrize("options", [["3", "4"], {"A": "3", "B": "4"}])
def test_options_must_stand_in_the_question(options: Any) -> None:
    asked = {"prompt": "1+2? 3 or 4.", "completion": "3", "options": options}
    assert record(asked, "prompt-completion").keys.unread == ("options",)
    with pytest.raises(UserError, match=r"`options` means the answers to choose from.*write them into the quest"):
        record({**asked, "prompt": "1+2?"}, "prompt-completion")
    # Nor are they in the question where one is in the question and one in the answer.
    with pytest.raises(UserError, match="`options`"):
        record({**asked, "prompt": "1+2? 4?"}, "prompt-completion")


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "1.0"])
def test_a_weight_of_one_changes_nothing_also_where_it_is_a_text(value: Any) -> None:
    assert record({**RECORDS["alpaca"], "weight": value}, "alpaca").keys.unread == ("weight",)
    with pytest.raises(UserError, match="`weight` means"):
        record({**RECORDS["alpaca"], "weight": "0.5"}, "alpaca")


def test_keys_of_ranking_data_are_not_passed_over() -> None:
    answers = {"chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"}}
    asked = {"conversations": [{"from": "human", "value": "1+1?"}], **answers}
    with pytest.raises(UserError, match=r"^x:1: `chosen` means the answers of a preference pair.*hft-megatron dpo"):
        record(asked, "sharegpt")


def test_the_keys_to_ignore_are_named_with_commas() -> None:
    assert ignored_keys(None) == ()
    assert ignored_keys(" chosen ,a b,chosen") == ("a b", "chosen")
    for words in ("", "a,,b", "a,"):
        with pytest.raises(UserError, match=r"--ignore-keys .* has an empty name; write the keys like `id,source`"):
            ignored_keys(words)


if __name__ == "__main__":
    print(shown_table())
