"""What --check says of a model folder that is read in part, and of options that aren't used. Run: pytest tests/cli"""

import json
from pathlib import Path

import pytest

from hft_megatron.cli import main
from tests.support.preferences import words_for_pairs, write_pairs
from tests.support.runs import make_inputs, words_for


def test_check_names_unknown_keys_and_files_that_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_inputs(tmp_path)
    model = tmp_path / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pretraining_tp": 2, "use_depth_scaling": True}))
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["sft", *words_for(tmp_path), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = f"{model}/config.json: unknown keys are ignored: use_depth_scaling ("
    assert [line for line in lines if line.startswith(start)]
    assert f"{model}: not read, because its files are missing: model.safetensors.index.json" in lines


def test_check_says_that_a_shared_reference_has_no_use_for_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(make_inputs(tmp_path) / "pairs.jsonl", 8)
    words = words_for_pairs(tmp_path, "--dpo-reference-cache", "c", "--check", kind="shared")
    assert main(["dpo", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "--dpo-reference-cache c is not used: --dpo-reference shared keeps no log-probabilities" in said
