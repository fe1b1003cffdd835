"""Every malformed record is named by file and line in one sentence; what is harmless is accepted."""

import random
from pathlib import Path

import pytest

from hft_megatron.data.records import Chat, Completion, read_records
from hft_megatron.errors import UserError

GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "the line is not valid JSON"),
        ('{"prompt": "a\x00", "completion": "b"}', "the line is not valid JSON"),
        ("[" * 100_000, "the line is not valid JSON"),
        ("[1]", "the line holds a list"),
        ("true", "the line holds a truth value"),
        ("{}", "the record has the keys none, but it needs `messages`, or `prompt` and `completion`"),
        ('{"question": "a", "answer": "b"}', "the record has the keys `question`, `answer`"),
        ('{"prompt": "a"}', "the record has the keys `prompt`"),
        ('{"prompt": 1, "completion": "b"}', "`prompt` is a number, but it must be text"),
        ('{"prompt": "a", "completion": null}', "`completion` is null"),
        ('{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": {}}', "`messages` is an object"),
        ('{"messages": []}', "`messages` is an empty list"),
        ('{"messages": ["a"]}', "message 1 is text"),
        ('{"messages": [{"content": "a"}]}', "message 1 has the role None"),
        ('{"messages": [{"role": "gpt", "content": "a"}]}', "message 1 has the role 'gpt'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1 has the role \\['user'\\]"),
        ('{"messages": [{"role": "user"}]}', "the `content` of message 1 is missing"),
        ('{"messages": [{"role": "user", "content": []}]}', "the `content` of message 1 is an empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no assistant turn"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError, match=sentence) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match=r"train.jsonl:1: byte 2 of the line is not UTF-8"):
        list(read_records(path))


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(UserError, match="can't be read"):
            list(read_records(path))


def test_byte_order_mark_windows_line_ends_and_extra_keys_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    chat = '{"id": 7, "prompt": "x", "messages": [{"role": "assistant", "content": "b\\r\\n"}]}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{chat}".encode())
    assert list(read_records(path)) == [
        Completion(line=1, prompt="a", completion="b"),
        Chat(line=3, messages=({"role": "assistant", "content": "b\r\n"},)),
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
            list(read_records(path))
        except UserError:
            refused += 1
    assert refused > 250
