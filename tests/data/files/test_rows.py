"""The same rows come out of every kind of file; a damaged one is named with the place. Run: pytest tests/data/files"""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.files import json_array, tables
from hft_megatron.data.files import rows as text_rows
from hft_megatron.data.files.sources import read_rows
from hft_megatron.errors import UserError

ROWS: list[Any] = [
    {"prompt": 'a\n{["]}\\', "completion": "é 日本 🙂"},
    {"prompt": "", "completion": "x" * 300, "more": {"list": [1, None, {"deep": [[]]}]}},
    {"prompt": "\u2028\u0085", "completion": "\r\n"},
]


def zstd() -> Any:
    return pytest.importorskip(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
        reason="backports.zstd is not installed",
    )


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: list[Any], **options: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, **options).encode()


def values(path: Path) -> list[Any]:
    return [row.value for row in read_rows(path)]


PLAIN: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: lines(ROWS),
    "no_suffix": lambda: lines(ROWS),
    "windows.jsonl": lambda: b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n"),
    "no_end.jsonl": lambda: lines(ROWS).rstrip(b"\n"),
    "lines.json": lambda: lines(ROWS),
    "array.json": lambda: array(ROWS),
    "escaped.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: b"\xef\xbb\xbf \r\n" + array(ROWS, indent=2) + b"\n\n",
    "a.jsonl.gz": lambda: gzip.compress(lines(ROWS)),
    "two_members.jsonl.gz": lambda: gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])),
    "array.JSON.GZ": lambda: gzip.compress(array(ROWS)),
    "a.jsonl.zst": lambda: bytes(zstd().compress(lines(ROWS))),
    "two_frames.jsonl.zst": lambda: bytes(zstd().compress(lines(ROWS[:1])) + zstd().compress(lines(ROWS[1:]))),
    "array.json.zst": lambda: bytes(zstd().compress(array(ROWS))),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    # What comes before the [ must be in the first chunk.
    monkeypatch.setattr(json_array, "CHUNK_BYTES", chunk if name != "pretty.json" else max(chunk, 8))
    (tmp_path / name).write_bytes(PLAIN[name]())
    assert values(tmp_path / name) == ROWS


TABLE = [
    {"prompt": 'a "quoted", word', "completion": "two\nlines\r\nand\ta tab"},
    {"prompt": "", "completion": "é 🙂\u2028"},
    {"prompt": " b", "completion": "x" * 200_000},
]
ON_ONE_LINE = [{**TABLE[0], "completion": "two lines"}, *TABLE[1:]]
TABLES: dict[str, Callable[[], bytes]] = {
    "a.csv": lambda: table(TABLE, ","),
    "unix.csv": lambda: table(TABLE, ",", lineterminator="\n").rstrip(b"\n"),
    "quoted.csv": lambda: b"\xef\xbb\xbf" + table(TABLE, ",", quoting=csv.QUOTE_ALL),
    "blank.csv": lambda: b"\n" + table(TABLE, ",", lineterminator="\n") + b"\n\n",
    "a.tsv": lambda: table(ON_ONE_LINE, "\t"),
    "quoted.tsv": lambda: table(ON_ONE_LINE, "\t", quoting=csv.QUOTE_ALL),
    "a.csv.gz": lambda: gzip.compress(table(TABLE, ",")),
    "A.TSV.ZST": lambda: bytes(zstd().compress(table(ON_ONE_LINE, "\t"))),
}


def table(rows: list[dict[str, str]], delimiter: str, **options: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_its_cells_as_texts_under_the_names_of_its_columns(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TABLES[name]())
    assert values(tmp_path / name) == (ON_ONE_LINE if ".tsv" in name.lower() else TABLE)


@pytest.mark.parametrize(
    "rows",
    ['"Stop\tsaid he\nGo\tnow"\tyes\n', '"Stop\tsaid"\tyes\n', '"Stop\nGo"\tyes\n', 'a\t"Stop\r\nGo\tnow"\r\n'],
)
def test_quotes_of_a_tsv_never_join_cells_or_rows(tmp_path: Path, rows: str) -> None:
    (tmp_path / "a.tsv").write_bytes(f"prompt\tcompletion\n{rows}".encode())
    with pytest.raises(
        UserError, match=r"a.tsv:2: cell [12] begins with a quote and would continue after a tab or a line"
    ):
        values(tmp_path / "a.tsv")


def test_a_row_of_a_table_stands_in_the_line_that_it_begins_in(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text\n"a\nb\n\nc"\n\n\nd\n"e\n"\nf')
    rows = list(read_rows(tmp_path / "a.csv"))
    assert [row.place for row in rows] == [f"{tmp_path}/a.csv:{line}" for line in (2, 8, 9, 11)]
    assert [row.value["text"] for row in rows] == ["a\nb\n\nc", "d", "e\n", "f"]


def test_a_parquet_file_gives_the_same_rows_with_a_null_for_what_is_missing(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "é", "name": None}]}, {"messages": [], "n": 1}]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0]]), tmp_path / "a.parquet")
    found = list(read_rows(tmp_path / "a.parquet"))
    assert found[0].value == rows[0]
    assert found[1].value == {"messages": []}  # `n` is not in the first row, so not in the schema
    assert found[2].place == f"{tmp_path / 'a.parquet'}: row 3"


def test_a_parquet_row_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    from hft_megatron.data.files import tables as reader

    monkeypatch.setattr(reader, "MAX_RECORD_BYTES", 2000)
    rows = [{"text": "x" * 1900}, {"text": "y" * 1900}, {"text": "z" * 2100}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows[:2]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: row 3: the row is longer than"):
        values(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "backports.zstd"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for module in ("backports.zstd", "backports", "compression.zstd", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name} needs the package {package}; run `pip install {package}`"):
        values(tmp_path / name)


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines([1]) + b"\n" + lines([2]))
    assert [row.place for row in read_rows(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{line}" for line in (2, 4)]
    (tmp_path / "a.json").write_bytes(b'[\n{"a": [\n1]},\n\n{}]')
    places = [row.place for row in read_rows(tmp_path / "a.json")]
    assert places == [f"{tmp_path}/a.json:2, record 1", f"{tmp_path}/a.json:5, record 2"]


LONG = [{"text": f"{number} " + "x" * 50} for number in range(2000)]
DAMAGED: list[tuple[str, Callable[[], bytes], str]] = [
    ("a.jsonl.gz", lambda: gzip.compress(lines(LONG))[:-2000], r"a.jsonl.gz:\d+: the compressed data is truncated or"),
    ("a.jsonl.gz", lambda: gzip.compress(lines(LONG))[:-4], r"a.jsonl.gz:2001: the compressed data is truncated"),
    ("a.jsonl.gz", lambda: gzip.compress(lines(LONG))[:5], r"a.jsonl.gz:1: the compressed data is truncated"),
    ("a.jsonl.gz", lambda: lines(LONG), r"a.jsonl.gz:1: the compressed data is truncated or damaged \(Not a gzipped"),
    ("a.jsonl.gz", lambda: gzip.compress(lines(LONG))[:-8] + b"\0" * 8, r"a.jsonl.gz:2001: .* damaged \(CRC check"),
    ("a.json.gz", lambda: gzip.compress(array(LONG))[:-2000], r"a.json.gz:1: the compressed data is truncated"),
    ("a.jsonl.zst", lambda: bytes(zstd().compress(lines(LONG))[:-9]), r"a.jsonl.zst:\d+: the compressed data is trunc"),
    ("a.jsonl.zst", lambda: zstd() and lines(LONG), r"a.jsonl.zst:1: the compressed data is truncated or damaged"),
    ("a.jsonl", lambda: b"\x1f\x8b\x08", r"a.jsonl:1: byte 2 of the line is not UTF-8"),
    ("a.jsonl", lambda: "{}\n{}".encode("utf-16"), r"a.jsonl:1: the line has a NUL byte"),
    ("a.jsonl", lambda: b"{}\n\0\0\0", r"a.jsonl:2: the line has a NUL byte"),
    ("a.jsonl", lambda: lines([{}]) + b'{"a": "b', r"a.jsonl:2: the line is not valid JSON \(Unterminated string"),
    ("a.csv", lambda: b"a,b\n1,2\n3", r"a.csv:3: the row has 1 cells, but the file has 2 columns \(a, b\); put a cell"),
    ("a.tsv", lambda: b"a\tb\n1\t2\t3", r"a.tsv:2: the row has 3 cells, .* or a tab as .csv or JSON Lines"),
    ("a.csv", lambda: b"a,b,a\n1,2,3", r"a.csv:1: 2 columns have the name 'a'"),
    ("a.csv", lambda: b'a,b\n1,"2"3\n', r"a.csv:2: the row cannot be read \(',' expected after '\"'\)"),
    ("a.csv", lambda: b'a,b\n1,"2\n\n3', r"a.csv:2: the row cannot be read \(unexpected end of data\)"),
    ("a.csv", lambda: b"a,b\r1,2\r", r"a.csv:1: the row cannot be read \(new-line character seen in unquoted field"),
    ("a.csv", lambda: b"a,b\n1,\xff", r"a.csv:2: byte 3 of the line is not UTF-8"),
    ("a.csv", lambda: b"a,b\n1,\0", r"a.csv:2: the line has a NUL byte"),
    ("a.csv.gz", lambda: gzip.compress(b"a\n" + bytes(range(97, 122)) * 999)[:-9], r"a.csv.gz:2: .* truncated"),
    ("a.json", lambda: array(LONG)[:-9], r"a.json:1, record 2000: not valid JSON \(Unterminated string starting at\)"),
    ("a.json", lambda: array(LONG)[:-1], r"a.json:1: record 2000 is followed by the end of the file instead"),
    ("a.json", lambda: b"[{}\n{}]", r"a.json:2: record 1 is followed by '{' instead of a comma or a \]"),
    ("a.json", lambda: b"[{},]", r"a.json:1, record 2: not valid JSON \(Expecting value\)"),
    ("a.json", lambda: b"[{}, {'a': 1}" + b" " * 99, r"a.json:1, record 2: not valid JSON \(Expecting property name"),
    ("a.json", lambda: b"[{}] {}", r"a.json:1: '{' follows the end of the array"),
    ("a.json", lambda: b"[{}, " + b"[" * 9999, r"a.json:1, record 2: not valid JSON"),
    ("a.json", lambda: b'[{"a": "\xff"}]', r"a.json:1: the text after it is not UTF-8"),
    ("a.json", lambda: b'[{"a": "\\udc00"}]', r"a.json:1, record 1: the record has half of a surrogate pair"),
    ("a.json", lambda: b'{\n"data": []}', r"a.json:1: the line is not valid JSON"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), DAMAGED)
def test_a_damaged_file_is_named_with_the_place(
    tmp_path: Path, name: str, content: Callable[[], bytes], sentence: str
) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=sentence) as caught:
        values(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"PAR1" + data, lambda data: b""])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(LONG), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a.parquet: the Parquet file cannot be read after row 0 \(") as caught:
        values(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"a": "' + b"x" * 3000 + b'"}\n', ":2: the line"),
        ("a.jsonl", b"x" * 9000, ":2: the line"),
        ("a.jsonl.gz", b'{"a": "' + b"x" * 3000 + b'"}\n', ":2: the line"),
        ("a.csv", b"x" * 3000, ":2: the line"),
        ("a.csv", b'"' + b"x\n" * 3000, ":2: the cell"),
        ("a.json", b'[{},\n{"a": "' + b"x" * 3000 + b'"}]', ":2, record 2: the record"),
        ("a.json", b'[{},\n{"a": "' + b"x" * 9000, ":2, record 2: the record"),
    ],
)
def test_a_record_over_the_limit_is_refused_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, place: str
) -> None:
    for module in (text_rows, json_array, tables):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2000)
    # What comes before the [ must be in the first chunk.
    monkeypatch.setattr(json_array, "CHUNK_BYTES", 64)
    content = content if name.endswith(".json") else b"{}\n" + content
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=f"{name}{place} is longer than 0 MiB"):
        values(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_the_limit_is_the_same_behind_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (text_rows, json_array):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2000)
    fits = b'"' + b"x" * 1997 + b'"\n'
    (tmp_path / name).write_bytes(text_rows.BYTE_ORDER_MARK + fits)
    assert len(values(tmp_path / name)) == 1
    for line in (b"x" * 2001, b"x" * 9000):
        (tmp_path / name).write_bytes(text_rows.BYTE_ORDER_MARK + line + b"\nnext\n")
        with pytest.raises(UserError, match=f"{name}:1: the line is longer than 0 MiB"):
            values(tmp_path / name)


def test_a_line_of_100_megabytes_costs_no_more_memory_than_the_limit(tmp_path: Path) -> None:
    import tracemalloc

    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a.jsonl.gz:1: the line is longer than 16 MiB"):
        values(tmp_path / "a.jsonl.gz")
    assert tracemalloc.get_traced_memory()[1] < 3 * text_rows.MAX_RECORD_BYTES
    tracemalloc.stop()


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for name in ("absent.jsonl", "absent.json.gz"):
        with pytest.raises(UserError, match=f"the data file {tmp_path}/{name} cannot be read: No such file"):
            values(tmp_path / name)


def test_names_of_columns_can_be_given_for_a_table_without_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"1 + 1, or so?",2,3\nx,y,z\n', encoding="utf-8")
    rows = list(read_rows(tmp_path / "a.csv", ["question", "A", "B"]))
    assert [row.value for row in rows] == [
        {"question": "1 + 1, or so?", "A": "2", "B": "3"},
        {"question": "x", "A": "y", "B": "z"},
    ]
    assert rows[0].place == f"{tmp_path}/a.csv:1"
    with pytest.raises(UserError, match=r"a\.csv:1: the row has 3 cells, but the file has 2 columns \(question, A\)"):
        list(read_rows(tmp_path / "a.csv", ["question", "A"]))
