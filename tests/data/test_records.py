"""A file has one format, and every malformed record is named by its place in one sentence; what is harmless passes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.data import DataKeys, data_keys
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.formats.conversations import Chat, PassedOver
from hft_megatron.data.formats.preference import Preference
from hft_megatron.data.record_errors import RecordUse
from hft_megatron.data.records import RecordReader, RecordRules
from hft_megatron.errors import UserError
from tests.support.data_files import write_rows

GOOD = '{"prompt": "a", "completion": "b"}'
ANSWER = '{"role": "assistant", "content": "b"}'
ASK = '{"role": "user", "content": "a"}'


def read(path: Path, data_format: Any = None, **rules: Any) -> list[Any]:
    return list(RecordReader(RecordRules(data_format=data_format, **rules)).read([path]))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "the line is not valid JSON"),
        ('{"prompt": "a\x01", "completion": "b"}', "the line is not valid JSON"),
        ('{"prompt": "a\x00", "completion": "b"}', "the line has a NUL byte"),
        ("[" * 100_000, "the line is not valid JSON"),
        ("1" * 5_000, "the line is not valid JSON"),
        ("[1]", "the record is a list"),
        ("true", "the record is a truth value"),
        (
            "{}",
            "the record has no keys, but the format prompt-completion needs `prompt` and `completion`, the format",
        ),
        ('{"a\\nb": 1}', "the record has the keys `a\\\\nb`"),
        ('{"prompt": "a"}', "the record has the keys `prompt`, but"),
        ('{"messages": []}', "the record has the keys `messages`, but the format prompt-completion needs"),
        ('{"prompt": 1, "completion": "b"}', "`prompt` is a number, but it must be text"),
        ('{"prompt": "a", "completion": null}', r"the record has the keys `prompt`, `completion` \(null\), but"),
        ('{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError, match=sentence) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "known", "record"),
    [
        (f'{{"messages": [{ANSWER}]}}', "messages", Chat),
        ('{"conversations": [{"from": "gpt", "value": "b"}]}', "sharegpt", Chat),
        ('{"instruction": "a", "input": "", "output": "b"}', "alpaca", Chat),
        ('{"instruction": "a", "output": "b", "text": "a b"}', "alpaca", Chat),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference", Preference),
        (GOOD, "prompt-completion", Completion),
        ('{"prompt": "a", "answer": "b"}', "trace", Completion),
        ('{"input": "a", "output": "b"}', "input-output", Completion),
        ('{"text": "b", "id": 1}', "text", Completion),
        (f'{{"messages": [{ANSWER}], "prompt": "b"}}', "messages", Chat),
        (f'{{"messages": null, "conversations": null, {GOOD[1:]}', "prompt-completion", Completion),
        (f'{{"messages": [{ASK}], "chosen": {ANSWER}, "rejected": {ANSWER}}}', "preference", Preference),
        (f'{{"messages": [{ASK}], "chosen": "yes it is", "rejected": "no"}}', "preference", Preference),
        (f'{{"messages": [{ASK}], "chosen": [{ANSWER}], "rejected": [{ANSWER}]}}', "preference", Preference),
        (f'{{"conversations": [{ASK}], "chosen": {ANSWER}, "rejected": {ANSWER}}}', "preference", Preference),
        ('{"instruction": "a", "output": "d", "chosen": "b", "rejected": "c"}', "preference", Preference),
    ],
)
def test_a_format_is_known_by_its_keys_or_set(tmp_path: Path, row: str, known: Any, record: type) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(row)
    for data_format in (None, known):
        ((found, parsed),) = read(path, data_format)
        assert found == known
        assert type(parsed) is record
        assert parsed.place == f"{path}:1"


def test_a_record_that_no_format_fits_names_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "a", "reply": "b"}')
    with pytest.raises(
        UserError, match=r"train.jsonl:1: the record has the keys `question`, `reply`, which is no"
    ) as caught:
        read(path)
    for keys in ("`messages`", "`conversations`", "`instruction` and `output`", "`prompt` and `answer`", "`text`"):
        assert keys in str(caught.value)


def test_a_set_format_is_not_recognised_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD)
    with pytest.raises(UserError, match="the format alpaca needs `instruction` and `output`; correct --data-format"):
        read(path, "alpaca")


def test_each_file_of_a_source_has_its_own_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    records = list(RecordReader(RecordRules()).read([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert [known for known, _ in records] == ["prompt-completion", "text"]


def test_byte_order_mark_windows_line_ends_and_extra_keys_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f'{GOOD}\r\n\r\n{{"id": 7, "prompt": "b\\r\\n", "completion": ""}}'.encode())
    assert [record for _, record in read(path)] == [
        Completion(place=f"{path}:1", prompt="a", completion="b"),
        Completion(place=f"{path}:3", prompt="b\r\n", completion="", keys=PassedOver(unread=("id",))),
    ]


def test_no_damaged_line_ends_in_another_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "train.jsonl"
    line = b'{"messages": [{"role": "user", "content": "a\\u00e9"}, {"role": "assistant", "content": "\xc3\xa9"}]}'
    refused = 0
    for _ in range(500):
        damaged = bytearray(line)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(damaged))
            damaged[position : position + rng.randint(0, 3)] = bytes(rng.choices(b'{}[]":,0\\u\x00\xff e\n', k=2))
        path.write_bytes(damaged)
        try:
            read(path)
        except UserError:
            refused += 1
    assert refused > 250


QUESTION = {"question": "a", "answer": "b", "id": 3}
MAPPED = (("answer", "completion"), ("question", "prompt"))


@pytest.mark.parametrize(
    ("row", "keys", "known", "texts"),
    [
        (QUESTION, MAPPED, "prompt-completion", ("a", "b")),
        (QUESTION, MAPPED[1:], "trace", ("a", "b")),
        (QUESTION | {"prompt": None}, MAPPED, "prompt-completion", ("a", "b")),
        ({"prompt": "b", "completion": "a"}, (("completion", "prompt"), ("prompt", "completion")), None, ("a", "b")),
        ({"body": "b"}, (("body", "text"),), "text", ("", "b")),
        ({"prompt": "a", "completion": "b"}, MAPPED, "prompt-completion", ("a", "b")),
    ],
)
def test_a_mapped_key_is_read_under_the_name_that_a_format_has(
    tmp_path: Path, row: dict[str, Any], keys: DataKeys, known: str | None, texts: tuple[str, str]
) -> None:
    path = write_rows(tmp_path / "train.jsonl", [row])
    [(found, record)] = read(path, data_keys=keys)
    assert found == (known or "prompt-completion")
    assert (record.prompt, record.completion) == texts


def test_a_mapped_name_that_a_record_has_as_well_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [QUESTION, QUESTION | {"prompt": "z"}])
    with pytest.raises(
        UserError, match=r":2: the record has the key `prompt` as well as `question`, which --data-keys"
    ):
        read(path, data_keys=MAPPED)


def test_an_error_says_what_the_records_call_a_mapped_key(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [QUESTION | {"question": 1}])
    with pytest.raises(
        UserError, match=r"`prompt` is a number, but it must be text \(`prompt` is `question` by --data-k"
    ):
        read(path, data_keys=MAPPED)


ORCA = {"question": "a", "chosen": "b", "rejected": "c", "system": "s"}


@pytest.mark.parametrize(
    ("row", "keys", "sentence"),
    [
        (ORCA, {"question": "prompt"}, "with --data-keys question=instruction, or remove it"),
        ({"input": "a", "output": "b", "q": "c"}, {"q": "prompt"}, "ignore it with --ignore-keys q "),
        ({"query": "Q", "chosen": [json.loads(ANSWER)], "rejected": [{"role": "assistant", "content": "c"}]}, {},
         "begin with the assistant; name the key that holds it with --data-keys query=prompt, or write a `prompt`"),
    ],
)  # fmt: skip
def test_advice_names_the_keys_that_the_records_have(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, str], sentence: str
) -> None:
    path = write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=sentence):
        read(path, data_keys=tuple(keys.items()))


def test_advice_for_pairs_with_a_system_text_works(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [ORCA])
    [(_, record)] = read(path, data_keys=(("question", "instruction"),))
    assert [message["content"] for message in record.prompt] == ["s", "a"]


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"instruction": "a", "response": "b", "context": "c"}, "response=output,context=input"),
        ({"instruction": "a", "response": "b"}, "response=output"),
    ],
)
def test_an_instruction_with_another_name_for_its_output_is_read_as_proposed(
    tmp_path: Path, row: dict[str, str], advice: str
) -> None:
    path = write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=f"Read it with --data-keys {advice}\\.$"):
        read(path)
    [(found, record)] = read(path, data_keys=data_keys(advice))
    assert found == "alpaca"
    assert record.messages[0]["content"] == "\n".join(row[key] for key in ("instruction", "context") if key in row)


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"input": "1 2", "output": "3"}, "choose --data-format alpaca and write an empty `instruction` where none is"),
        ({"prompt": "1 2", "completion": "3"}, "write it into the prompt"),
        ({"prompt": "1 2", "answer": "3"}, "write it into the prompt"),
    ],
)
def test_an_instruction_of_a_file_that_began_without_one_is_read_or_named(
    tmp_path: Path, row: dict[str, str], fix: str
) -> None:
    copied = {"instruction": "1 2", **row}
    path = write_rows(tmp_path / "train.jsonl", [{"instruction": None, **row}, copied, {**row, "instruction": "add"}])
    reader = RecordReader(RecordRules()).read([path])
    assert (next(reader)[1].keys, next(reader)[1].keys) == (PassedOver(), PassedOver(unread=("instruction",)))
    with pytest.raises(UserError, match=rf":3: `instruction` means .*; {fix}"):
        next(reader)


TURNS = [json.loads(ASK), json.loads(ANSWER)]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "advice", "known"),
    [
        ({"conversation": TURNS}, "conversation=messages", "messages"),
        ({"dialog": SHAREGPT, "topic": ["x"]}, "dialog=conversations", "sharegpt"),
        ({"conversations": TURNS}, "conversations=messages", "messages"),
        ({"messages": SHAREGPT}, "messages=conversations", "sharegpt"),
    ],
)
def test_a_conversation_under_another_name_is_read_as_proposed(
    tmp_path: Path, row: dict[str, Any], advice: str, known: str
) -> None:
    path = write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=rf"[Rr]ead it with --data-keys {advice}\.$"):
        read(path)
    [(found, record)] = read(path, data_keys=data_keys(advice))
    assert found == known
    assert record.messages == tuple(TURNS)


@pytest.mark.parametrize("key", ["\x1f", "a,b", "a=b"])
def test_a_key_that_the_option_cannot_name_is_not_proposed(tmp_path: Path, key: str) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{key: TURNS}])
    with pytest.raises(UserError, match="Say which keys are meant") as caught:
        read(path)
    assert str(caught.value).isprintable()
    with pytest.raises(UserError, match="Read it with --data-keys 'my turns=messages'"):
        read(write_rows(tmp_path / "spaced.jsonl", [{"my turns": TURNS}]))


def test_two_conversations_leave_a_doubt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"turns": TURNS, "items": TURNS, "words": ["a"]}])
    with pytest.raises(UserError, match="Say which keys are meant"):
        read(path)


def test_a_conversation_of_another_form_is_named_by_the_records_own_key(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"turns": TURNS}])
    with pytest.raises(UserError, match=r"read it with --data-keys turns=messages \(`conversations` is `turns` by"):
        read(path, data_keys=(("turns", "conversations"),))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "rejected_response": "c"},
        {"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": TURNS[1:]},
        {"prompt": "a", "completion": "b", "label": True},
        {"question": "a", "response_j": "b", "response_k": "c"},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_record_that_is_no_pair_is_told_what_a_pair_has(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=r"but a pair has `chosen` and `rejected`, and its prompt in .* KEY=chosen,OTH"):
        read(path, "preference")


def test_the_input_of_a_pair_without_another_prompt_is_read_as_proposed(tmp_path: Path) -> None:
    row = {"input": "a", "chosen": "b", "rejected": "c"}
    path = write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=r"`input` is the prompt of a pair, .* --data-keys input=prompt, or"):
        read(path)
    [(_, record)] = read(path, data_keys=(("input", "prompt"),))
    assert (record.prompt, record.chosen, record.rejected) == ("a", "b", "c")
    with pytest.raises(UserError, match="`input` means a second prompt"):
        read(write_rows(path, [{**row, "prompt": "q"}]))


def test_an_empty_cell_of_a_table_might_as_well_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("instruction,input,history,weight,topic,output\nadd,,,1,,2\nsub,3,,,x,\n")
    (_, first), (_, second) = read(path)
    assert [message["content"] for message in first.messages] == ["add", "2"]
    assert [message["content"] for message in second.messages] == ["sub\n3", ""]
    assert first.keys.unread == ("weight",)
    assert second.keys.unread == ("topic",)
    as_json = write_rows(tmp_path / "train.jsonl", [{"instruction": "add", "history": "", "output": "2"}])
    with pytest.raises(UserError, match="`history` is text, but it must be a list"):
        read(as_json)


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "a", "completion": "b"}, ("a\n", "b")),
        ({"prompt": "a", "answer": "b"}, ("a\n", "b")),
        ({"input": "a", "output": "b"}, ("a\n", "b")),
        ({"prompt": "", "completion": "b"}, ("", "b")),
        ({"text": "b"}, ("", "b")),
        ({"prompt": "a:", "completion": "a:\nb"}, ("a:\n", "b")),
        ({"prompt": "a:", "completion": "a: b"}, ("a:", " b")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a\n", "b", "c")),
        ({"prompt": "a:", "chosen": "a:\nb", "rejected": "a:\nc"}, ("a:\n", "b", "c")),
        ({"prompt": "a:", "chosen": "a: b", "rejected": "a: c"}, ("a:", " b", " c")),
        ({"prompt": "a", "chosen": "a b", "rejected": "a c"}, ("a\n", "a b", "a c")),
    ],
)
def test_a_separator_stands_between_a_prompt_and_answers_of_text_once(
    tmp_path: Path, row: dict[str, Any], texts: tuple[str, ...]
) -> None:
    [(_, record)] = read(write_rows(tmp_path / "train.jsonl", [row]), prompt_separator="\n")
    answers = [record.chosen, record.rejected] if isinstance(record, Preference) else [record.completion]
    assert (record.prompt, *answers) == texts


def test_conversations_take_no_separator(tmp_path: Path) -> None:
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"prompt": [ask], "completion": [answer]}, {"prompt": [ask], "chosen": answer, "rejected": ask | answer}]
    for row in rows:
        reader = RecordReader(RecordRules(prompt_separator="\n"))
        [(_, record)] = reader.read([write_rows(tmp_path / "train.jsonl", [row])])
        messages = record.messages if isinstance(record, Chat) else (*record.prompt, *record.chosen)
        assert messages == (ask, answer)
        assert reader.use() == RecordUse()
