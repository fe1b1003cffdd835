"""An option that was renamed, under its former name. Run: pytest tests/config/test_former_names.py"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.loading import load_options, options_of, read_resolved, stages_of_file, write_resolved
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_identity import RunIdentity, check_same_run
from hft_megatron.errors import UserError
from tests.config.test_run_identity import changed, identity

KEPT = RunConfig(hft=HFTConfig(hft_frozen_moments="host"))
NOTE = "> --hft-resting-moments is now --hft-frozen-moments; the old name is accepted until version 1.0"


@dataclass(frozen=True, kw_only=True)
class Options:
    """As a command declares them."""

    config: str | None = None
    run: RunConfig = field(default_factory=RunConfig)


def load(*words: str) -> tuple[RunConfig, list[str]]:
    """The options and the lines for the log."""
    said: list[str] = []
    return load_options(Options, words, said.append).run, said


def test_the_new_name_is_all_that_a_log_does_not_mention() -> None:
    assert load("--hft-frozen-moments", "host") == (KEPT, [])


@pytest.mark.parametrize(
    "words",
    [
        "--hft-resting-moments host",
        "--hft_resting_moments=host",
        "--hft-frozen-moments drop --hft-resting-moments host",
    ],
)
def test_a_command_line_may_have_the_former_name(words: str) -> None:
    assert load(*words.split()) == (KEPT, [NOTE])


@pytest.mark.parametrize("text", ["hft-resting-moments: host\n", "hft:\n  hft_resting_moments: host\n"])
def test_a_file_may_have_the_former_name_and_the_command_line_overrides_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert load("--config", str(file)) == (KEPT, [NOTE])
    assert load("--config", str(file), "--hft-frozen-moments", "drop") == (RunConfig(), [])
    file.write_text("hft_frozen_moments: drop\n")
    assert load("--config", str(file), "--hft-resting-moments", "host") == (KEPT, [NOTE])


def test_a_file_has_one_of_the_two_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("hft_frozen_moments: host\nhft_resting_moments: host\n")
    with pytest.raises(UserError, match=r"run.yaml:2: hft_resting_moments is set twice, first at .*run.yaml:1: hft_f"):
        load("--config", str(file))


def test_a_wrong_value_is_named_as_it_was_written() -> None:
    with pytest.raises(UserError) as error:
        load("--hft-resting-moments", "gpu")
    assert str(error.value) == "--hft-resting-moments gpu: the value must be one of drop, host."


def test_a_call_and_a_stage_may_have_the_former_name(tmp_path: Path) -> None:
    said: list[str] = []
    assert options_of(RunConfig, {"hft_resting_moments": "host"}, said.append) == KEPT
    (tmp_path / "stages.yaml").write_text("- method: sft\n  hft-resting-moments: host\n- method: dpo\n")
    stages = stages_of_file(tmp_path / "stages.yaml", RunConfig(), said.append)
    assert [config for _, _, config in stages] == [KEPT, RunConfig()]
    assert said == [NOTE, NOTE]


def test_a_resolved_config_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "resolved_config.yaml"
    write_resolved(KEPT, path)
    written = path.read_text()
    path.write_text(written.replace("hft_frozen_moments: host", "hft_resting_moments: host"))
    assert path.read_text() != written
    assert read_resolved(path) == KEPT
    assert load("--config", str(path)) == (KEPT, [NOTE])


def test_a_run_of_an_earlier_version_is_the_same_run() -> None:
    saved = changed(hft_frozen_moments="host").to_dict()
    assert saved["hft_resting_moments"] == "host"
    assert "hft_frozen_moments" not in saved
    read = RunIdentity.from_dict(json.loads(json.dumps(saved)))
    assert read.options["hft_frozen_moments"] == "host"
    check_same_run(read, changed(hft_frozen_moments="host"), "runs/a")
    with pytest.raises(UserError, match="--hft-frozen-moments"):
        check_same_run(read, identity(), "runs/a")
