"""Every mistake in the options and data of `pretrain`: one sentence, exit code 2, no model built.

The model's folder has a config.json and no weights, so a command that went further would fail in another way.
Run: pytest tests/cli/test_pretrain_mistakes.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.cli.conftest import SHAPE, Training
from tests.support.corpora import write_corpus
from tests.support.tokenizers import make_byte_level

GOOD = "--load-hf MODEL --data-path CORPUS --seq-length 16"
APART = "--load-hf MODEL --train-data-path CORPUS --seq-length 16"
VOCAB_SIZE = 340


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """``model`` without weights, and ``corpus``: 100 documents of 20 tokens."""
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**SHAPE.to_hf_config(), "vocab_size": VOCAB_SIZE}))
    write_corpus(tmp_path / "corpus", [[number + 5] * 20 for number in range(100)])
    return tmp_path


def mistake_of(options: str, folder: Path, capsys: pytest.CaptureFixture[str], *, check: bool) -> str:
    """The one sentence; asserts that there is only that."""
    places = {"MODEL": "model", "CORPUS": "corpus", "ABSENT": "absent"}
    words = [str(folder / places[word]) if word in places else word for word in options.split()]
    code = main(["pretrain", *words, *(["--check"] * check)])
    out, err = capsys.readouterr()
    assert code == EXIT_USAGE, err
    assert out == ""
    assert err.startswith("hft-megatron: error: ")
    assert err.count("\n") == 1
    assert err.endswith(".\n")
    return err


OPTIONS: list[tuple[int, str, list[str]]] = [
    (1, "--load-hf MODEL", ["--data-path is missing: give the prefix of .bin and .idx files, --mock-data"]),
    (1, f"{GOOD} --mock-data", ["--mock-data and --data-path ", "both given"]),
    (1, f"{GOOD} --data-path 0.5 CORPUS 0.5", ["--data-path: no path follows the weight 0.5"]),
    (1, f"{GOOD} --data-path 0.5 CORPUS CORPUS", ["corpus has no weight, but other paths do"]),
    (1, f"{GOOD} --data-path 0.5 0.5", ["--data-path: no path follows the weight 0.5"]),
    (1, f"{GOOD} --data-path 0 CORPUS", ["--data-path: the weight 0 must be above 0"]),
    *(
        (1, f"{GOOD} --split {split}", [f"--split {split}: must be one to three numbers"])
        for split in ("90/10", "a,b,c", "90,10,5,5", "90,,10", "-1,2", "9e1,1", "nan", ",")
    ),
    (1, f"{GOOD} --split 0,1", ["--split 0,1 leaves nothing to train on"]),
    (1, f"{GOOD} --split 0", ["--split 0 leaves nothing to train on"]),
    (
        1,
        f"{GOOD} --reset-position-ids",
        ["--reset-position-ids needs --reset-attention-mask: rotary positions restart"],
    ),
    (1, f"{GOOD} --train-epochs 2", ["--train-epochs 2: a corpus ", "give --train-iters"]),
    (1, f"{GOOD} --hft-round-interval epoch", ["--hft-round-interval epoch: a corpus ", "--hft-round-interval 50"]),
    (1, f"{GOOD} --eval-interval 5", ["--eval-interval 5 needs --eval-iters"]),
    (1, f"{GOOD} --split 1 --eval-iters 5", ["--eval-iters 5 needs a part for validation, but --split 1 has none"]),
    (
        2,
        f"{GOOD} --seq-length 15 --tensor-model-parallel-size 2 --sequence-parallel",
        ["--seq-length 15 is not a multiple of --tensor-model-parallel-size 2", "that fits is 14"],
    ),
    (1, f"{GOOD} --hft-ratio 2", ["--hft-ratio 2.0: must be a number between 0 and 1"]),
    # options of fine-tuning
    (1, f"{GOOD} --chat-template tulu", ["--chat-template tulu: it is an option of `hft-megatron sft` and `dpo`"]),
    (
        1,
        f"{GOOD} --packing",
        ["--packing is an option of `hft-megatron sft`, `dpo` and", "not of this command; leave it out"],
    ),
    # sources of their own for training and validation
    (1, f"{GOOD} --train-data-path x", ["--data-path ", "corpus and --train-data-path x are both given; keep one"]),
    (1, "--load-hf MODEL --mock-data --train-data-path x", ["--mock-data and --train-data-path x are both given"]),
    (1, f"{APART} --split 9,1", ["--split 9,1 splits --data-path, not --train-data-path"]),
    (1, f"{APART} --valid-data-path x", ["--valid-data-path x needs --eval-iters; add it"]),
    (1, f"{APART} --eval-on-start", ["--eval-on-start needs --eval-iters; add it"]),
    (1, f"{APART} --eval-iters 2", ["--eval-iters 2 needs --valid-data-path beside --train-data-path"]),
    (
        1,
        f"{APART} --train-data-path 0.5 CORPUS CORPUS",
        ["--train-data-path: ", "corpus has no weight, but other paths"],
    ),
    (1, f"{APART} --valid-data-path 0.5 --eval-iters 1", ["--valid-data-path: no path follows the weight 0.5"]),
    (1, f"{GOOD} --valid-data-path x --eval-iters 1", ["--valid-data-path x needs --train-data-path; give both"]),
]


@pytest.mark.parametrize(("world_size", "options", "said"), OPTIONS)
def test_a_mistake_in_the_options_is_one_sentence(
    world_size: int,
    options: str,
    said: list[str],
    folder: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    message = mistake_of(options, folder, capsys, check=False)
    for part in said:
        assert part in message
    assert training.calls == []


def cut_tokens(folder: Path) -> None:
    path = folder / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-100])


def damage_index(folder: Path) -> None:
    path = folder / "corpus.idx"
    path.write_bytes(path.read_bytes()[:60] + b"\xff" * 20 + path.read_bytes()[80:])


DATA: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "no such files": (lambda f: None, f"{GOOD} --data-path ABSENT", ["there are no files", "absent.bin"]),
    "no tokens": (lambda f: (f / "corpus.bin").unlink(), GOOD, ["corpus.bin is missing, and corpus.idx is there"]),
    "no index": (lambda f: (f / "corpus.idx").unlink(), GOOD, ["corpus.idx is missing, and corpus.bin is there"]),
    "cut tokens": (cut_tokens, GOOD, ["corpus.bin has 3900 bytes, but corpus.idx describes 4000"]),
    "damaged index": (damage_index, GOOD, ["corpus.idx is damaged"]),
    "no such files to validate on": (
        lambda f: None,
        f"{APART} --valid-data-path ABSENT --eval-iters 1",
        ["--valid-data-path ", "there are no files", "absent.bin"],
    ),
    "no folder for indices": (
        lambda f: (f / "absent").touch(),
        f"{GOOD} --data-cache-path ABSENT",
        ["--data-cache-path ", "absent cannot be used: File exists; name a writable folder"],
    ),
    "ids beyond the model": (
        lambda f: write_corpus(f / "corpus", [[5] * 30, [VOCAB_SIZE]]),
        GOOD,
        ["holds the id 340 (token 30), but the model's vocabulary has 340 rows"],
    ),
    "no end of a document": (
        lambda f: None,
        f"{GOOD} --reset-attention-mask",
        ["--reset-attention-mask needs the token", "corpus.bin has none; make the corpus with it (--append-eod)"],
    ),
    "no end that could be left out": (lambda f: None, f"{GOOD} --eod-mask-loss", ["--eod-mask-loss needs the token"]),
    "shorter than a sample": (
        lambda f: write_corpus(f / "corpus", [[5] * 8] * 2),
        f"{GOOD} --split 1",
        ["leaves 16 tokens in 2 documents for training, but one sample needs 17"],
    ),
    "no document to train on": (lambda f: None, f"{GOOD} --split 1,999", ["leaves 0 tokens in 0 documents for train"]),
    "nothing to validate on": (lambda f: None, f"{GOOD} --split 999,1 --eval-iters 1", ["0 documents for validation"]),
    "too short without weights": (
        lambda f: None,
        f"{GOOD} --data-path CORPUS CORPUS --train-iters 1000",
        ["one pass over all sources is 242 samples of 16 tokens, and --train-iters asks for 1000"],
    ),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("check", [True, False], ids=["check", "train"])
def test_a_mistake_in_the_corpus_is_one_sentence(
    case: str, check: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, options, said = DATA[case]
    break_it(folder)
    message = mistake_of(options, folder, capsys, check=check)
    for part in said:
        assert part in message


def test_check_says_what_would_be_trained_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hft_megatron.trainer.inputs.check_weights", lambda folder, shape: "digest")
    words = ["--load-hf", str(folder / "model"), "--data-path", str(folder / "corpus"), "--seq-length", "16"]
    words += ["--train-iters", "10", "--eval-iters", "1", "--split", "9,1", "--check"]
    assert main(["pretrain", *words]) == EXIT_OK
    out = capsys.readouterr().out
    assert "corpus: 1,800 tokens in 90 documents for training, 200 tokens in 10 documents for validation" in out
    assert "10 samples of 16 tokens to train on" in out


def test_one_file_of_options_serves_both_commands(
    folder: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text(
        f"load_hf: {folder / 'model'}\ndata_path: [0.5, {folder / 'corpus'}, 0.5, {folder / 'corpus'}]\n"
        "chat_template: tulu\nseq_length: 16\n"
    )
    for command, *words in (("pretrain",), ("sft", "--train-data-path", "x.jsonl")):
        assert main([command, "--config", str(folder / "run.yaml"), *words]) == EXIT_OK, capsys.readouterr().err
    (_, pretraining, _), (_, tuning, _) = training.calls
    assert pretraining.corpus.data_path[::2] == ("0.5", "0.5")
    assert pretraining.data.chat_template is None
    assert tuning.corpus.data_path == ()
    assert tuning.data.chat_template == "tulu"
