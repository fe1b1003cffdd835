"""Mistakes that show only when tokenizer, data, model or a saved run are read: one sentence, and no model is built.

Every folder here has a config.json and no weights, so a command that went further would fail in another way.
Run: pytest tests/cli/test_mistakes_end_to_end.py
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.checkpoint.position import TrainState
from hft_megatron.cli import main
from hft_megatron.config.loading import load_options, write_resolved
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, RUN_IDENTITY_FILE
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.cli.conftest import SHAPE
from tests.support.runs import run_cli
from tests.support.tokenizers import make_byte_level

GOOD = {"prompt": "What is 2 + 2?", "completion": "It is 4."}
CHAT = {"messages": [{"role": "assistant", "content": "Hello."}]}
LONG = {"prompt": "What is 2 + 2?", "completion": "It is 4. " * 100}
WEIGHTS = "d1gest of the weights"
"""What looking at the weights would give."""
CONFIG = {**SHAPE.to_hf_config(), "vocab_size": 340}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A folder with configuration and tokenizer, and no weights."""
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[str]:
    write_rows(tmp_path, GOOD)
    return ["sft", "--load-hf", str(model), "--train-data-path", str(tmp_path / "data.jsonl")]


def write_rows(folder: Path, *rows: object) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text)


def mistake_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence; asserts that there is only that."""
    code = main(command)
    out, err = capsys.readouterr()
    assert code == EXIT_USAGE, err
    assert out == ""
    assert err.startswith("hft-megatron: error: ")
    assert err.count("\n") == 1
    assert err.endswith(".\n")
    return err


DATA_MISTAKES: list[tuple[list[object], list[str]]] = [
    ([GOOD, "{not json}"], ["data.jsonl:2: the line is not valid JSON"]),
    ([GOOD, "", "[1, 2]"], ["data.jsonl:3: the record is a list"]),
    ([GOOD, {"text": "no"}], ["data.jsonl:2: the record has the keys `text`", "the file since ", "data.jsonl:1; put"]),
    ([{"question": "a"}], ["data.jsonl:1: the record has the keys `question`, which is no known format: `messages`"]),
    (
        [{"question": "a", "answer": "b"}],
        ["data.jsonl:1: ", "`text`. Read it with --data-keys question=prompt,answer=completion."],
    ),
    ([{"prompt": "a", "response": "b"}], ["`text`. Read it with --data-keys response=completion."]),
    ([{"problem": "a", "solution": "b", "answer": "c"}], ["which is no known format: ", "; `text`."]),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ["data.jsonl:1: the record is a preference pair"]),
    (
        [CHAT, CHAT, {"messages": [{"role": "user", "content": "Hello?"}]}],
        ["data.jsonl:3: the conversation has no assistant turn"],
    ),
    ([{"messages": []}], ["data.jsonl:1: `messages` is an empty list"]),
    ([{"messages": [{"role": "robot", "content": "x"}]}], ["data.jsonl:1: message 1 has the role 'robot'"]),
    (
        [GOOD, LONG],
        ["data.jsonl:2: the example has ", "but --seq-length is 128", "--long-examples drop, truncate or split"],
    ),
    ([], ["data.jsonl holds no example to train on: it is empty"]),
    (["", "  "], ["data.jsonl holds no example to train on: it is empty"]),
]


@pytest.mark.parametrize(("rows", "said"), DATA_MISTAKES)
@pytest.mark.parametrize("check", [True, False], ids=["check", "train"])
def test_a_mistake_in_the_data_names_file_and_line(
    rows: list[object],
    said: list[str],
    check: bool,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows(tmp_path, *rows)
    message = mistake_of(command + ["--check"] * check, capsys)
    for part in said:
        assert part in message


def test_data_that_is_not_there_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").unlink()
    assert f"--train-data-path {tmp_path / 'data.jsonl'}: there is no such file" in mistake_of(command, capsys)


def test_a_mistake_in_the_validation_data_is_found_too(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "valid.jsonl").write_text("{}\n")
    message = mistake_of([*command, "--valid-data-path", str(tmp_path / "valid.jsonl")], capsys)
    assert "valid.jsonl:1: the record has no keys" in message


def test_a_compressed_file_that_is_cut_off_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress((tmp_path / "data.jsonl").read_bytes())
    (tmp_path / "valid.jsonl.gz").write_bytes(whole[:-5])
    message = mistake_of([*command, "--valid-data-path", str(tmp_path / "*.gz")], capsys)
    assert "valid.jsonl.gz:2: the compressed data is truncated or damaged" in message


def test_a_chat_template_without_a_tokenizer_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    message = mistake_of(["sft", "--load-hf", str(model), "--train-iters", "0", "--chat-template", "tulu"], capsys)
    assert f"--chat-template tulu needs a tokenizer, but {model} has none" in message


@pytest.mark.usefixtures("no_weights_needed")
def test_check_counts_every_source_of_a_mixture(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "trace" / "FOMC"
    task.mkdir(parents=True)
    (task / "train.json").write_text(json.dumps([{"prompt": "Stance: ", "answer": "A"}] * 3))
    (tmp_path / "chat.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    mixture = ["--train-data-path", "3", str(tmp_path / "*.gz"), "1", str(task)]
    assert main([*command, *mixture, "--loss-on", "last", "--chat-template", "chatml", "--check"]) == EXIT_OK
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "*.gz (messages): 1 examples of 1 records" in first
    assert first.endswith("(sequence length 128); 3 samples of it in an epoch of 4 (weight 3)")
    assert "FOMC (trace): 3 examples of 3 records" in second
    assert second.endswith("; 1 samples of it in an epoch of 4 (weight 1)")


def test_all_examples_too_long_is_a_mistake(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, LONG, LONG)
    message = mistake_of([*command, "--long-examples", "drop"], capsys)
    assert "all 2 were longer than --seq-length 128" in message


@pytest.fixture
def no_weights_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hft_megatron.trainer.inputs.check_weights", lambda folder, shape: WEIGHTS)


@pytest.mark.usefixtures("no_weights_needed")
@pytest.mark.parametrize(
    ("rule", "counted"),
    [
        ("drop", "2 examples of 4 records, 20 trained tokens of 48, 0 truncated and 2 dropped"),
        ("truncate", "4 examples of 4 records"),
        ("split", ", 2 split (sequence length 128)"),
    ],
)
def test_examples_that_are_dropped_or_truncated_are_counted(
    rule: str, counted: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, GOOD, LONG, LONG, GOOD)
    assert main([*command, "--long-examples", rule, "--check"]) == EXIT_OK
    line = next(line for line in capsys.readouterr().out.splitlines() if "data.jsonl" in line)
    if rule == "drop":
        assert "2 examples of 4 records" in line
        assert "0 truncated and 2 dropped" in line
    else:
        assert counted in line
        assert f"{2 if rule == 'truncate' else 0} truncated and 0 dropped" in line


def set_config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    return change


def write_config(text: str) -> Callable[[Path], None]:
    return lambda model: (model / "config.json").write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


MODEL_MISTAKES: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("missing folder", shutil.rmtree, ["there is no such folder"]),
    ("no config", remove("config.json"), ["there is no config.json"]),
    ("broken config", write_config('{"model_type": '), ["config.json is not valid JSON"]),
    ("config of a list", write_config("[]"), ["config.json holds a list"]),
    ("another family", set_config(model_type="qwen2"), ['model_type is "qwen2"', 'only "llama" and "mistral" models']),
    ("quantized", set_config(quantization_config={"bits": 4}), ["a quantized model is not supported"]),
    ("biases", set_config(attention_bias=True), ["attention_bias = true is not supported"]),
    ("smaller than the tokenizer", set_config(vocab_size=300), ["has ids up to 333", "vocabulary has 300 rows"]),
    ("broken tokenizer", lambda model: (model / "tokenizer.json").write_text("{") and None, ["cannot be read"]),
    ("no weights", lambda model: None, ["neither model.safetensors nor model.safetensors.index.json is there"]),
]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [(break_it, said) for _, break_it, said in MODEL_MISTAKES],
    ids=[name for name, *_ in MODEL_MISTAKES],
)
def test_a_mistake_in_the_model_folder_names_it(
    break_it: Callable[[Path], None], said: list[str], command: list[str], model: Path, capsys: Any
) -> None:
    break_it(model)
    message = mistake_of(command, capsys)
    assert str(model) in message
    for part in said:
        assert part in message


def test_a_folder_without_any_tokenizer_is_named(
    command: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert f"{model} holds no tokenizer" in mistake_of(command, capsys)


@pytest.fixture
def saved_run(command: list[str], tmp_path: Path) -> Path:
    """What a run of ``command`` leaves in its folder, as far as starting again looks at it; without tensors."""
    from hft_megatron.cli.entry import commands
    from hft_megatron.config.validation import shape_of
    from hft_megatron.methods.registry import METHODS
    from hft_megatron.trainer import inputs

    folder = tmp_path / "run"
    folder.mkdir()
    options = load_options(commands()["sft"].options, command[1:]).as_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "check_weights", lambda folder, shape: WEIGHTS)
        read = inputs.read_inputs(METHODS["sft"], options, shape_of(options.model), world_size=1)
    write_resolved(read.config, folder / RESOLVED_CONFIG_FILE)
    (folder / RUN_IDENTITY_FILE).write_text(json.dumps(read.identity.to_dict()))
    (folder / "latest_checkpointed_iteration.txt").write_text("2\n")
    (folder / "iter_0000002").mkdir()
    TrainState(iteration=2).write(folder / "iter_0000002")
    return folder


OTHER_RUNS: list[tuple[str, list[str]]] = [
    ("--hft-ratio 0.25", ["its --hft-ratio is 0.5, but this command's is 0.25"]),
    ("--hft-ratio 1", ["its --hft-ratio is 0.5, but this command's is 1.0"]),
    ("--hft-seed 7", ["its --hft-seed is 1234, but this command's is 7"]),
    ("--seed 7", ["its --seed is 1234, but this command's is 7"]),
    ("--seq-length 64", ["its --seq-length is ", "but this command's is 64"]),
    ("--global-batch-size 2", ["its --global-batch-size is 1, but this command's is 2"]),
]


@pytest.mark.parametrize(("options", "said"), OTHER_RUNS)
@pytest.mark.parametrize("resume", [True, False], ids=["save and load", "load only"])
def test_a_folder_of_another_run_is_refused(
    options: str, said: list[str], resume: bool, command: list[str], saved_run: Path, capsys: Any
) -> None:
    folders = ["--load", str(saved_run), *(["--save", str(saved_run)] * resume)]
    message = mistake_of([*command, *folders, *options.split()], capsys)
    assert f"{saved_run} holds another run" in message
    for part in said:
        assert part in message


def test_other_data_is_another_run(command: list[str], saved_run: Path, tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path, GOOD, {**GOOD, "completion": "It is four."})
    message = mistake_of([*command, "--save", str(saved_run), "--load", str(saved_run)], capsys)
    assert "holds another run: its training data is" in message


def test_another_model_is_another_run(command: list[str], saved_run: Path, model: Path, capsys: Any) -> None:
    set_config(num_hidden_layers=4)(model)
    message = mistake_of([*command, "--save", str(saved_run), "--load", str(saved_run)], capsys)
    assert "holds another run: its model's num layers is 8, but this command's is 4" in message


def test_a_model_with_other_weights_is_another_run(
    command: list[str], saved_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hft_megatron.trainer.inputs.check_weights", lambda folder, shape: "another digest")
    message = mistake_of([*command, "--save", str(saved_run), "--load", str(saved_run)], capsys)
    assert "holds another run: its model's weights (--load-hf)" in message


@pytest.mark.usefixtures("no_weights_needed")
@pytest.mark.parametrize("options", [["--save", "other", "--finetune"], ["--save", "run"]])
def test_a_run_whose_checkpoints_were_discarded_is_neither_begun_again_nor_taken_weights_from(
    options: list[str], command: list[str], saved_run: Path, capsys: Any
) -> None:
    shutil.rmtree(saved_run / "iter_0000002")
    (saved_run / "latest_checkpointed_iteration.txt").unlink()
    (saved_run / "finished.json").write_text('{"iteration": 2, "round": 0}')
    _, name, *others = options
    message = mistake_of(
        [*command, "--load", str(saved_run), "--save", str(saved_run.with_name(name)), *others], capsys
    )
    assert f"--load {saved_run} holds a finished task whose checkpoints --continual-discard has deleted" in message


@pytest.mark.usefixtures("no_weights_needed")
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ""),
        (1, "--train-iters 500 --lr 1e-3 --log-interval 10"),
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    ],
)
def test_another_layout_or_number_of_iterations_is_the_same_run(
    world_size: int,
    options: str,
    command: list[str],
    saved_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    words = [*command, "--save", str(saved_run), "--load", str(saved_run), *options.split(), "--check"]
    assert main(words) == EXIT_OK, capsys.readouterr().err


def test_the_same_data_in_another_place_is_the_same_run(
    command: list[str], saved_run: Path, tmp_path: Path, no_weights_needed: None
) -> None:
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "data.jsonl").rename(moved)
    words = [str(moved) if word.endswith("data.jsonl") else word for word in command]
    assert main([*words, "--load", str(saved_run), "--check"]) == EXIT_OK


def test_two_ranks_say_a_mistake_in_the_data_once(command: list[str], tmp_path: Path) -> None:
    write_rows(tmp_path, GOOD, "{not json}")
    log = tmp_path / "log"
    assert run_cli(command[1:], ranks=2, log=log) == 1, "torchrun's own code, for any failure"
    assert log.read_text().count("data.jsonl:2: the line is not valid JSON") == 1
    assert "hft_megatron/" not in log.read_text(), "a trace of ours"


@pytest.mark.usefixtures("no_weights_needed")
def test_packs_and_epochs_are_reported(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path, *[GOOD] * 20)
    words = [*command, "--packing", "--train-epochs", "3", "--global-batch-size", "2", "--check"]
    assert main(words) == EXIT_OK
    said = capsys.readouterr().out
    # 17 positions each: seven fit into 128, and the 3 packs of an epoch make 9 in three, two in a step.
    assert "windows of 4096: 3 packs of 128 positions in the first epoch, 11.46% padding" in said
    assert "--train-epochs 3: 9 packs in 5 iterations" in said
    assert main([*command, "--train-epochs", "3", "--global-batch-size", "16", "--check"]) == EXIT_OK
    assert "--train-epochs 3: 60 examples in 4 iterations" in capsys.readouterr().out


@pytest.mark.usefixtures("no_weights_needed")
def test_a_warm_up_that_takes_all_epochs_is_a_mistake(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake_of([*command, "--train-epochs", "3", "--lr-warmup-iters", "3"], capsys)
    assert "--lr-warmup-iters 3 must be below --train-iters 3" in message
