"""The list of flags, its page, and what of them a run's log says. Run: pytest tests/cli/test_flags.py"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.cli.entry import commands
from hft_megatron.config.flags import flags_of
from hft_megatron.config.megatron_flags import ROWS
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.cli.conftest import Training

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def test_every_flag_is_a_line_with_its_state_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags"]) == EXIT_OK
    text = capsys.readouterr().out
    assert re.search(r"^  --lr +option .*\(at least 0; default: 1e-05\)$", text, re.MULTILINE)
    assert re.search(r"^  --log-interval +option .*\(at least 1; default: 1, Megatron-LM's 100\)$", text, re.MULTILINE)
    assert re.search(
        r"^  --loss-on +option .*\(one of assistant, all, last; default: assistant; only in sft, dpo, continual\)$",
        text,
        re.MULTILINE,
    )
    assert re.search(r"^  --learning-rate +refused +give --lr VALUE$", text, re.MULTILINE)
    assert re.search(r"^  --swiglu +accepted +the feed-forward layers are SwiGLU$", text, re.MULTILINE)
    assert re.search(r"^  --hidden-dropout +accepted +0.0 alone is accepted; nothing is dropped$", text, re.MULTILINE)
    assert re.search(r"^  --num-experts +refused +mixtures of experts are not built; ", text, re.MULTILINE)
    assert re.search(r"^  --encoder-num-layers +other name +--num-layers$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["sft", "dpo", "pretrain", "continual"])
def test_every_option_of_a_command_that_trains_is_listed_once_and_as_one_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["flags", "--format", "json"]) == EXIT_OK
    listed = [flag for flag in json.loads(capsys.readouterr().out) if flag["state"] == "option"]
    assert len({flag["flag"] for flag in listed}) == len(listed)
    commands_of = {flag["flag"]: re.findall(r"only in ([a-z, ]+)\)", flag["words"]) for flag in listed}
    listed_of_it = {flag for flag, few in commands_of.items() if not few or name in few[0].split(", ")}
    assert listed_of_it == {f"--{option}" for option in flags_of(commands()[name].options)}


def test_the_list_has_every_row_once_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "--format", "json"]) == EXIT_OK
    flags = json.loads(capsys.readouterr().out)
    assert [flag["flag"] for flag in flags if flag["state"] != "option"] == [f"--{name}" for name in ROWS]
    assert set(flags[0]) == {"section", "flag", "state", "words"}


def test_the_page_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "--format", "markdown"]) == EXIT_OK
    written = capsys.readouterr().out
    current = PAGE.read_text(encoding="utf-8") == written
    assert current, "docs/flags.md is old: hft-megatron flags --format markdown > docs/flags.md"


def test_listing_needs_no_torch() -> None:
    program = "import sys; from hft_megatron.cli import main; main(['flags']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_log_begins_with_flags_without_effect_on_rank_0(
    rank: str,
    model_folder: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    words = ["--load-hf", str(model_folder), "--train-data-path", "d.jsonl", "--swiglu", "--ckpt-format", "torch_dist"]
    assert main(["sft", *words]) == EXIT_OK
    lines = {"0": ["> accepted without effect here: --swiglu, --ckpt-format torch_dist"], "1": []}
    assert capsys.readouterr().out.splitlines() == lines[rank]
    assert len(training.calls) == 1


def test_several_refusals_are_one_error_with_a_line_for_each(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "--fp16", "--spec", "a", "b", "--lr", "1"]) == EXIT_USAGE
    assert capsys.readouterr().err.splitlines() == [
        "hft-megatron: error: 2 options are not valid:",
        "  --fp16: 16-bit training is in bf16; give --bf16.",
        "  --spec a b: layers are LLaMA's; leave it out.",
    ]
    assert training.calls == []
