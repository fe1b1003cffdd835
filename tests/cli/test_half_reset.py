"""``hft-megatron half-reset`` from its words to its exit code, and what its output is good for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.support.pairs import change_config, make_pair, read_weights, same_bits
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.tokenizers import make_byte_level


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, and with a tokenizer and a generation config in the tuned folder."""
    folder = make_pair(tmp_path_factory.mktemp("pair"), "tied", vocab_size=335)
    make_byte_level(folder / "tuned", chat_template="{{ messages[0].content }}")
    (folder / "tuned" / "README.md").write_text("The model card of another model.")
    return folder


def words(pair: Path, output: Path, *options: object) -> list[str]:
    given = ["--tuned", pair / "tuned", "--base", pair / "base", "--output", output, *options]
    return [str(word) for word in given]


def test_the_command_gives_a_folder_that_transformers_loads(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert main(["half-reset", *words(pair, out, "--ratio", 0.5, "--level", "category", "--seed", 1)]) == EXIT_OK
    said = capsys.readouterr().out
    assert "half-reset: 20 of 38 tensors have the tuned model's values and the others the base's" in said
    assert "attention    8 of 16 units train (50.0%)" in said
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(same_bits(state[name], tensor) for name, tensor in read_weights(out).items())
    assert torch.equal(model.lm_head.weight, read_weights(pair / "tuned")["model.embed_tokens.weight"])
    tuned, merged = (AutoTokenizer.from_pretrained(folder) for folder in (pair / "tuned", out))
    assert merged("Say 1! bridge").input_ids == tuned("Say 1! bridge").input_ids
    assert merged.chat_template == tuned.chat_template
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    kept |= {file.name for file in (pair / "tuned").glob("README.md")}  # of newer versions of transformers
    assert {file.name for file in out.iterdir()} == kept | {"model.safetensors", "half_reset.json"}
    for name in kept:
        assert (out / name).read_bytes() == (pair / "tuned" / name).read_bytes()


def test_the_plan_is_that_of_the_plan_command_with_the_same_options(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, options in enumerate(
        (["--seed", "7"], ["--ratio", "0.25", "--level", "model"], ["--counting", "parameters", "--seed", "0"], [])
    ):
        out = tmp_path / str(number)
        assert main(["half-reset", *words(pair, out, *options)]) == EXIT_OK
        capsys.readouterr()
        as_run = [f"--hft-{word[2:]}" if word.startswith("--") and word != "--seed" else word for word in options]
        assert main(["plan", "--load-hf", str(pair / "base"), *as_run, "--json"]) == EXIT_OK
        digest = json.loads(capsys.readouterr().out)["digest"]
        with safe_open(out / "model.safetensors", framework="pt") as weights:
            assert weights.metadata()["hft_plan"] == digest
        again = ["plan", "--load-hf", str(out), "--hft-plan", str(out / "half_reset.json"), "--json"]
        assert main(again) == EXIT_OK
        assert json.loads(capsys.readouterr().out)["digest"] == digest


def test_resetting_what_a_run_rested_changes_nothing(ranks: RankPools, tmp_path: Path) -> None:
    """Half fine-tuning with the same seed moves just what Half-Reset keeps."""
    inputs = make_inputs(tmp_path)
    trained = words_for(inputs, "--train-iters", 3, "--seed", 5, "--save-hf", tmp_path / "tuned")
    ranks(1).run(run_sft_words, words=trained)
    (inputs / "model").rename(tmp_path / "base")
    for seed, unchanged in ((5, True), (6, False)):
        out = tmp_path / f"seed {seed}"
        assert main(["half-reset", *words(tmp_path, out, "--seed", seed)]) == EXIT_OK
        tuned, merged = read_weights(tmp_path / "tuned"), read_weights(out)
        assert all(same_bits(merged[name], tuned[name]) for name in tuned) == unchanged


@pytest.mark.parametrize(
    ("options", "record"),
    [
        (["--criterion", "fapm"], {"sparsity": 0.9}),
        (["--criterion", "dare", "--drop-rate", 0.8, "--seed", 4], {"drop_rate": 0.8, "seed": 4}),
    ],
)
def test_a_criterion_for_single_entries_leaves_its_record_and_a_folder_that_transformers_loads(
    options: list[object], record: dict[str, object], pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    name = str(options[1])
    assert main(["half-reset", *words(pair, tmp_path / "out", *options)]) == EXIT_OK
    assert f"\n{name}: " in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert found.items() >= record.items()
    assert found["base"]["folder"] == str(pair / "base")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as weights:
        assert (
            weights.metadata().items() >= {"hft_merge": name, **{f"hft_{k}": str(v) for k, v in record.items()}}.items()
        )
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    # What is made of it has no record of weights that it doesn't have.
    again = ["--tuned", tmp_path / "out", "--base", pair / "base", "--output", tmp_path / "again"]
    assert main(["average", *map(str, again)]) == EXIT_OK
    assert not (tmp_path / "again" / f"{name}.json").exists()


def test_mistakes_end_with_one_sentence_and_exit_code_2(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases = [
        (["--output", str(out)], "--tuned is missing"),
        (words(pair, out, "--ratio", "1.5"), "--ratio 1.5: must be a number between 0 and 1"),
        (words(pair, out, "--ratio", "nan"), "--ratio nan: must be a number between 0 and 1"),
        (words(pair, out, "--seed", "-1"), "--seed -1: must be a whole number of at least 0"),
        (words(pair, out, "--level", "category-level"), "--level category-level: the value must be one of category"),
        (words(pair, out, "--selection", "spectrum"), "--selection is not an option"),
        (
            words(pair, out, "--hft-ratio", "0.5"),
            "--hft-ratio is an option of `hft-megatron sft`, `dpo` and `pretrain`, not of this command; leave it out",
        ),
        (words(pair, out, "--criterion", "taylor"), "--criterion taylor: the value must be one of random, fapm, dare"),
        (words(pair, out, "--criterion", "fapm", "--sparsity", "1.1"), "--sparsity 1.1: must be a number between 0"),
        (words(pair, out, "--sparsity", "0.5"), "--sparsity 0.5 is for --criterion fapm, but it is random; leave one"),
        (words(pair, out, "--criterion", "fapm", "--level", "layer"), "--level layer is for --criterion random, but"),
        (words(pair, out, "--criterion", "fapm", "--seed", "7"), "--seed 7 is for --criterion random or dare, but it"),
        (words(pair, out, "--criterion", "dare", "--ratio", "0.3"), "--ratio 0.3 is for --criterion random, but it is"),
        (words(pair, out, "--criterion", "dare"), "--criterion dare needs --drop-rate, the probability that an entry"),
        (words(pair, out, "--criterion", "dare", "--drop-rate", "1"), "--drop-rate 1.0: must be a number from 0 to"),
        (words(pair, pair), f"--output {pair} is not empty"),
        (words(pair, out, "--base", str(pair / "tuned")), "is the folder of --tuned"),
        (words(pair, out, "--base", str(pair / "none")), f"--base {pair / 'none'}: there is no such folder"),
    ]
    for arguments, sentence in cases:
        assert main(["half-reset", *arguments]) == EXIT_USAGE, sentence
        printed = capsys.readouterr()
        assert sentence in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import sys
from hft_megatron.cli import main
code = main(sys.argv[1:])
assert not {"torch", "megatron", "transformers"} & sys.modules.keys()
sys.exit(code)
"""


def test_help_and_mistakes_of_the_command_need_no_torch(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    change_config(pair / "base", vocab_size=97)
    for arguments, exit_code, said in (
        (["--help"], EXIT_OK, "--ratio FLOAT"),
        (words(pair, tmp_path / "out"), EXIT_USAGE, "has vocab_size 97"),
    ):
        command = [sys.executable, "-c", WITHOUT_TORCH, "half-reset", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == exit_code, done.stderr
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
