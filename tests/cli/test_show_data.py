"""``show-data``: what is trained is seen, in text and on a page. Run: pytest tests/cli/test_show_data.py"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.cli.conftest import SHAPE
from tests.support.data_files import write_rows
from tests.support.tokenizers import make_byte_level

ROWS = [
    {"prompt": "2 + 2?\n", "completion": "<b>4</b> &"},
    {"prompt": "", "completion": "second\n🙂"},
    {"prompt": "hi\x1b[2J", "completion": "third"},
    {"prompt": "x", "completion": "fourth " * 60},
]
Show = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_byte_level(tmp_path_factory.mktemp("model"))
    (folder / "config.json").write_text(json.dumps({**SHAPE.to_hf_config(), "vocab_size": 340}))
    return folder


@pytest.fixture
def show_data(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """What ``show-data`` with the tokenizer, a file of ROWS and these words prints; it must end well."""
    write_rows(tmp_path / "a.jsonl", ROWS)

    def run(*words: object) -> str:
        options = ["--tokenizer-model", str(model), "--train-data-path", str(tmp_path / "a.jsonl")]
        assert main(["show-data", *options, *map(str, words)]) == EXIT_OK, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_without_a_terminal_marks_stand_around_what_is_trained(show_data: Show, tmp_path: Path) -> None:
    lines = show_data("--examples", 2).split("\n")
    assert lines[0] == "{+trained+}"
    assert lines[2].startswith(f"{tmp_path}/a.jsonl (prompt-completion): 4 examples of 4 records, ")
    assert lines[4].startswith("example 1: ")
    assert lines[5:7] == ["<|bos|>2 + 2?↵", "{+<b>4</b> &<|im_end|>+}"]
    assert lines[8].startswith("example 2: ")
    assert lines[9:11] == ["<|bos|>{+second↵", "🙂<|im_end|>+}"]
    assert lines[11:] == [""]


def test_lines_about_the_tokenizer_come_first(tmp_path: Path, show_data: Show) -> None:
    folder = make_byte_level(tmp_path / "padded")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    note = f"{folder}/special_tokens_map.json: pad_token is '[PAD]', which is not in the tokenizer's vocabulary"
    lines = show_data("--tokenizer-model", folder, "--examples", 1).split("\n")
    assert lines[2].startswith(note)
    page = tmp_path / "page.html"
    show_data("--tokenizer-model", folder, "--html", page)
    assert f"<p>{note}" in unescape(page.read_text())


def test_the_options_of_a_run_decide_what_is_shown(show_data: Show, tmp_path: Path) -> None:
    assert "<|bos|>{+2 + 2?" in show_data("--loss-on", "all")
    assert "& +}" not in show_data("--no-train-on-eos")
    assert "{+<b>4</b> &+}<|im_end|>" in show_data("--no-train-on-eos")
    short = show_data("--seq-length", 12, "--long-examples", "drop", "--examples", 9)
    assert "fourth" not in short
    assert "2 dropped with " in short
    assert " tokens lost (sequence length 12)" in short
    (tmp_path / "run.yaml").write_text("loss-on: all\nlr: 1\n")
    assert "<|bos|>{+2 + 2?" in show_data("--config", tmp_path / "run.yaml")


def test_other_keys_and_what_joins_prompt_and_answer_are_shown(show_data: Show, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "b.jsonl", [{"question": "2 + 2?", "answer": "4"}])
    shown = show_data(
        "--train-data-path", path, "--data-keys", "question=prompt,answer=completion", "--prompt-separator", r"\n"
    )
    head = (
        f"{path} (prompt-completion, `answer` as `completion`, `question` as `prompt`, '\\n' between prompt and answer)"
    )
    assert head in shown
    assert "<|bos|>2 + 2?↵\n{+4<|im_end|>+}" in shown


def test_every_source_is_shown_with_its_share(show_data: Show, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "b.jsonl", [{"text": "of b"}] * 2)
    shown = show_data("--train-data-path", 1, tmp_path / "a.jsonl", 2, path, "--valid-data-path", path, "--examples", 1)
    assert shown.count("example 1: ") == 3
    assert "; 4 samples of it in an epoch of 6 (weight 2)" in shown


def test_a_source_of_a_file_is_shown_by_its_own_options(show_data: Show, tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"text": "of b"}])
    (tmp_path / "valid.yaml").write_text("- {name: b, path: b.jsonl}\n- {name: c, path: b.jsonl, train_on_eos: no}\n")
    shown = show_data("--valid-data-path", tmp_path / "valid.yaml")
    assert "{+of b<|im_end|>+}" in shown
    assert "{+of b+}<|im_end|>" in shown


def test_colours_show_every_token_and_hide_no_text(
    show_data: Show, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = show_data("--examples", 3)
    assert "{+" not in coloured
    assert coloured.count("\x1b[30;48;5;114m") > 2
    assert "\x1b[2J" not in coloured  # a record's own codes don't reach the terminal
    assert all(line.endswith("\x1b[0m") for line in coloured.split("\n") if "\x1b[" in line)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in show_data()


def test_what_is_not_learned_stands_under_the_counts(show_data: Show, tmp_path: Path) -> None:
    rows = [{**row, "id": number, "label": 1} for number, row in enumerate(ROWS[:3])]
    path = write_rows(tmp_path / "keys.jsonl", [*rows, {"prompt": "x", "completion": ""}])
    words = ["--train-data-path", path, "--ignore-keys", "label", "--examples", 0]
    notes = [
        f"{path}: 1 of 4 answers are empty: only their end token is trained",
        f"{path}: keys that are not read: id (3)",
        f"{path}: keys ignored by --ignore-keys: label (3)",
    ]
    assert show_data(*words).splitlines()[3:] == notes
    page = tmp_path / "keys.html"
    show_data(*words, "--html", page)
    assert all(f"<p>{note}</p>" in page.read_text(encoding="utf-8") for note in notes)


class Page(HTMLParser):
    """The text of the tokens, trained or not, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[tuple[str, str]] = []
        self.kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span" and "title" in dict(attributes):
            self.kind = str(dict(attributes).get("class"))
            self.tokens.append((self.kind, ""))

    def handle_endtag(self, tag: str) -> None:
        self.kind = "" if tag == "span" else self.kind

    def handle_data(self, data: str) -> None:
        if self.kind:
            self.tokens[-1] = (self.kind, self.tokens[-1][1] + data)


def test_the_page_needs_nothing_else_and_shows_every_token(show_data: Show, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    assert show_data("--html", page, "--examples", 1) == f"{page}: 1 examples\n"
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.tags <= {"html", "head", "meta", "title", "style", "body", "p", "span", "h2", "h3", "pre"}
    assert "src=" not in text
    assert "url(" not in text
    assert "".join(token for kind, token in parsed.tokens if "t" in kind.split()) == "<b>4</b> &<|im_end|>"
    assert "".join(token for kind, token in parsed.tokens if "t" not in kind.split()) == "<|bos|>2 + 2?↵\n"
    assert ("t s", "<|im_end|>") in parsed.tokens


def test_only_a_page_of_its_own_is_written_over(
    show_data: Show, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out.html"
    show_data("--html", page, "--examples", 1)
    show_data("--html", page, "--examples", 2)
    assert page.read_text().count("<pre>") == 2
    page.write_text("mine")
    options = ["--tokenizer-model", str(model), "--train-data-path", str(tmp_path / "a.jsonl"), "--html", str(page)]
    assert main(["show-data", *options]) == EXIT_USAGE
    assert f"--html {page} already exists with other contents; choose another name" in capsys.readouterr().err
    assert page.read_text() == "mine"


PAIRS = [
    {"prompt": "2 + 2? ", "chosen": "4", "rejected": "five"},
    {"prompt": "same", "chosen": "x", "rejected": "x"},
    {"prompt": "and", "chosen": "yes", "rejected": "no"},
]


@pytest.mark.parametrize("named", [True, False])
def test_of_a_pair_both_answers_are_shown(show_data: Show, tmp_path: Path, named: bool) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--data-format", "preference"] if named else []
    shown = show_data("--train-data-path", path, *words, "--dpo-bad-pairs", "skip", "--examples", 2)
    lines = shown.split("\n")
    assert lines[2] == (
        f"{path}: 2 pairs of 3 records, 0 truncated and 0 dropped, 1 left out: `chosen` and `rejected` are the same"
    )
    assert lines[4].startswith("pair 1, chosen: ")
    assert [line for line in lines if "<|bos|>" in line] == [
        "<|bos|>2 + 2? {+4<|im_end|>+}",
        "<|bos|>2 + 2? {+five<|im_end|>+}",
        "<|bos|>and{+yes<|im_end|>+}",
        "<|bos|>and{+no<|im_end|>+}",
    ]
    (tmp_path / "run.yaml").write_text("dpo-bad-pairs: skip\ndpo-beta: 0.2\n")
    page = tmp_path / "pairs.html"
    only = ["--train-data-path", path, "--valid-data-path", path, "--config", tmp_path / "run.yaml", "--examples", 1]
    assert show_data(*only, "--html", page) == f"{page}: 4 examples\n"
    titles = [line.split(":")[0] for line in page.read_text().split("\n") if line.startswith("<h3>")]
    assert titles == ["<h3>pair 1, chosen", "<h3>pair 1, rejected"] * 2


BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


def test_a_browser_shows_every_token_of_the_page_in_its_colour(show_data: Show, tmp_path: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    page = tmp_path / "out.html"
    show_data("--html", page, "--examples", 2)
    # What the browser itself computed of every token, written into the page that it gives back.
    script = (
        "<script>document.title = JSON.stringify([...document.querySelectorAll('pre span')].map("
        "s => [s.innerText, getComputedStyle(s).backgroundColor, s.getClientRects().length > 0]))</script>"
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, check=True, timeout=120)
    title = done.stdout.decode("utf-8").split("<title>")[1].split("</title>")[0]
    tokens = json.loads(unescape(title))
    assert all(visible for _, _, visible in tokens)
    green = {"rgb(155, 226, 155)", "rgb(196, 240, 196)"}
    assert "".join(text for text, colour, _ in tokens if colour in green) == "<b>4</b> &<|im_end|>second↵\n🙂<|im_end|>"
    assert "".join(text for text, colour, _ in tokens if colour not in green) == "<|bos|>2 + 2?↵\n<|bos|>"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--tokenizer-model MODEL", "--train-data-path is missing: name the data to show."),
        ("--train-data-path DATA", "--tokenizer-model is missing: name a tokenizer, or a model folder with --load-hf."),
        ("--load-hf absent --train-data-path DATA", "--load-hf absent: there is no such folder"),
        ("--load-hf SMALL --train-data-path DATA", "has ids up to 333, but the model's vocabulary has 300 rows"),
        ("--load-hf MODEL --train-data-path DATA", "DATA:4: the example has "),
        (
            "--tokenizer-model MODEL --train-data-path DATA --examples -1",
            "--examples -1: must be a whole number of at least 0.",
        ),
        (
            "--tokenizer-model MODEL --train-data-path DATA --seq-length 0",
            "--seq-length 0: must be a whole number of at least 1.",
        ),
        ("--tokenizer-model MODEL --train-data-path DATA --chat-template x", "--chat-template x is neither a file nor"),
        ("--tokenizer-model MODEL --train-data-path DATA --valid-data-path 2 DATA", "takes no weights; leave 2 out."),
        (
            "--tokenizer-model MODEL --train-data-path DATA --html /absent/x.html",
            "--html /absent/x.html cannot be writ",
        ),
        (
            "--tokenizer-model MODEL --train-data-path DATA --data-keys a=b",
            "--data-keys a=b: 'b' is not a key of any format",
        ),
        (
            "--tokenizer-model MODEL --train-data-path DATA --data-keys a=text",
            "no record of --train-data-path has the key",
        ),
        (
            "--tokenizer-model MODEL --train-data-path DATA --prompt-separator \\x",
            "--prompt-separator \\x: a \\ must be followed",
        ),
        (
            "--tokenizer-model MODEL --train-data-path DATA --lr 1",
            "--lr is an option of `hft-megatron sft`, `dpo` and `pretrain`, not of this command",
        ),
        ("--tokenizer-model MODEL --train-data-path PAIRS", "PAIRS:2: `chosen` and `rejected` are the same; correct"),
        (
            "--tokenizer-model MODEL --train-data-path PAIRS --loss-on all",
            "--loss-on all would also compare the prompts",
        ),
        (
            "--tokenizer-model MODEL --train-data-path PAIRS --long-examples split",
            "--long-examples split would cut an ans",
        ),
        ("--tokenizer-model MODEL --train-data-path DATA PAIRS", "3 records (PAIRS:1, PAIRS:2, ...): the record is"),
    ],
)
def test_a_mistake_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    data = write_rows(tmp_path / "a.jsonl", ROWS)
    small = tmp_path / "small"
    shutil.copytree(model, small)
    (small / "config.json").write_text(json.dumps({**SHAPE.to_hf_config(), "vocab_size": 300}))
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    for name, place in (("MODEL", model), ("SMALL", small), ("DATA", data), ("PAIRS", pairs)):
        words, sentence = words.replace(name, str(place)), sentence.replace(name, str(place))
    assert main(["show-data", *words.split()]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
