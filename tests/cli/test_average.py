"""``hft-megatron average`` from its words to its exit code, and a folder that transformers loads."""

import json
from pathlib import Path

import pytest
import torch

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.support.pairs import make_pair, read_weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"), "tied", torch.bfloat16)


def words(pair: Path, output: Path, *options: object) -> list[str]:
    given = ["--tuned", pair / "tuned", "--base", pair / "base", "--output", output, *options]
    return [str(word) for word in given]


def test_the_average_is_a_folder_that_transformers_loads(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["average", *words(pair, tmp_path / "out", "--coefficient", 0.75)]) == EXIT_OK
    assert f"the 38 tensors of {tmp_path / 'out'} are base + 0.75 x (tuned - base)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "average.json").read_text())["coefficient"] == 0.75
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    name = "model.embed_tokens.weight"
    tuned, base = read_weights(pair / "tuned")[name].float(), read_weights(pair / "base")[name].float()
    assert torch.equal(model.lm_head.weight, (base + 0.75 * (tuned - base)).to(torch.bfloat16))


def test_the_coefficient_is_half_unless_given_and_may_be_0_or_1(pair: Path, tmp_path: Path) -> None:
    for number, options in enumerate(([], ["--coefficient", "0"], ["--coefficient", "1.0"])):
        assert main(["average", *words(pair, tmp_path / str(number), *options)]) == EXIT_OK
        record = json.loads((tmp_path / str(number) / "average.json").read_text())
        assert record["coefficient"] == (0.5, 0, 1)[number]


def test_a_path_is_a_folder_for_each_coefficient(pair: Path, tmp_path: Path) -> None:
    assert main(["average", *words(pair, tmp_path / "out", "--path", 0.25, 0.5)]) == EXIT_OK
    for name in ("0.25", "0.5"):
        assert json.loads((tmp_path / "out" / name / "average.json").read_text())["coefficient"] == float(name)
        assert (tmp_path / "out" / name / "model.safetensors").exists()


def test_mistakes_end_with_one_sentence_and_exit_code_2(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases = [
        (["--tuned", str(pair / "tuned")], "--base is missing"),
        (words(pair, out, "--coefficient", "1.01"), "--coefficient 1.01: must be a number between 0"),
        (words(pair, out, "--coefficient", "-0.1"), "--coefficient -0.1: must be a number between 0"),
        (words(pair, out, "--coefficient", "nan"), "--coefficient nan: must be a number between 0"),
        (words(pair, out, "--coefficient", "half"), "--coefficient half: the value must be a number"),
        (words(pair, out, "--path", "0.5", "half"), "--path 0.5 half: the value must be one or more numbers"),
        (words(pair, out, "--path", "0.5", "1.5"), "--path 1.5: every coefficient must be a number between 0 and 1"),
        (words(pair, out, "--path", "0.5", "nan"), "--path nan: every coefficient must be a number between 0 and 1"),
        (
            words(pair, out, "--path", "0.5", "0.50"),
            "--path has 0.5 twice, but each coefficient names a folder; give it once",
        ),
        (words(pair, out, "--path", "0.5", "--coefficient", "0.2"), "--path and --coefficient 0.2 are both given"),
        (words(pair, pair / "base"), f"--output {pair / 'base'} is not empty"),
        (words(pair, out, "--tuned", str(pair / "base")), "is the folder of --tuned"),
        (words(pair, out, "--ratio", "0.5"), "--ratio is an option of `hft-megatron half-reset`, not of this command"),
    ]
    for arguments, sentence in cases:
        assert main(["average", *arguments]) == EXIT_USAGE, sentence
        printed = capsys.readouterr()
        assert sentence in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
