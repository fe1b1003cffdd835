"""``hft-megatron ties`` from its words to its exit code."""

import json
from pathlib import Path

import pytest
import torch

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.support.pairs import change_config, make_pair, read_weights, same_bits


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


def words(pair: Path, output: Path, *options: object) -> list[str]:
    given = ["--tuned", pair / "tuned", "--base", pair / "base", "--output", output, *options]
    return [str(word) for word in given]


def test_several_models_become_one_folder_with_a_record_of_them(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path / "second")
    other = tmp_path / "second" / "tuned"
    assert main(["ties", *words(pair, tmp_path / "out", "--others", other, "--density", 1)]) == EXIT_OK
    assert "has the base's weights and the largest 1 of the changes of 2 models" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "ties.json").read_text())
    assert (record["density"], record["coefficient"], record["others"][0]["folder"]) == (1.0, 1.0, str(other))
    # Both models changed alike, so that their mean is either.
    tuned, merged = read_weights(pair / "tuned"), read_weights(tmp_path / "out")
    assert all(float((merged[name] - tuned[name]).abs().max()) < 1e-6 for name in tuned)
    assert main(["ties", *words(pair, tmp_path / "none", "--coefficient", 0)]) == EXIT_OK
    assert all(
        same_bits(one, read_weights(pair / "base")[name]) for name, one in read_weights(tmp_path / "none").items()
    )


def test_notes_and_data_types_of_the_others_are_said_too(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path, dtype=torch.float16)
    other = tmp_path / "tuned"
    change_config(other, rms_norm_eps=1e-3, of_another_program=1)
    assert main(["ties", *words(pair, tmp_path / "out", "--others", other)]) == EXIT_OK
    said = capsys.readouterr().out
    assert f"config.json has rms_norm_eps 0.001 in --others {other} and " in said
    assert "of_another_program" in said
    assert f"tensors have another data type in --others {other} (model.embed_tokens.weight: torch.float16) than" in said


def test_mistakes_end_with_one_sentence_and_exit_code_2(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, wide = tmp_path / "out", tmp_path / "wide"
    make_pair(wide)
    change_config(wide / "tuned", vocab_size=97)
    capsys.readouterr()
    cases = [
        (["--output", str(out)], "--tuned is missing"),
        (words(pair, out, "--density", "0"), "--density 0.0: must be a number above 0 and at most 1"),
        (words(pair, out, "--coefficient", "-1"), "--coefficient -1.0: must be a number of at least 0"),
        (words(pair, out, "--others", pair / "tuned"), "is given twice, or is the same as --tuned"),
        (words(pair, out, "--others", pair / "base"), "is the folder of --others; name the model that the tuned one"),
        (words(pair, out, "--others", wide / "tuned"), f"but --others {wide / 'tuned' / 'config.json'} has 97;"),
        (words(pair, out, "--others", tmp_path / "none"), f"--others {tmp_path / 'none'}: there is no such folder"),
        (words(pair, pair), f"--output {pair} is not empty"),
    ]
    for arguments, sentence in cases:
        assert main(["ties", *arguments]) == EXIT_USAGE, sentence
        printed = capsys.readouterr()
        assert sentence in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert not out.exists()
