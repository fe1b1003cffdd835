"""``hft-megatron doctor`` on real ranks. Run: pytest tests/cli/test_doctor.py"""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron import errors
from hft_megatron.cli import main
from hft_megatron.cli.doctor import diagnosis_text
from hft_megatron.doctor.findings import Diagnosis, Finding, Row
from tests.support import forked
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs


def run_doctor(words: list[str], other_version_on: int | None = None) -> dict[str, Any]:
    """Runs the command on this rank of a pool: exit code and output. The pool's process group lives on.

    The rank ``other_version_on`` has another torch, as far as its package says.
    """
    from hft_megatron.doctor import examination, machine

    original = machine._with_builds

    def version(name: str) -> str:
        is_other = name == "torch" and int(os.environ["RANK"]) == other_version_on
        return "0.0.1" if is_other else original(name)

    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(examination, "stop_groups", lambda: None),
        patch.object(machine, "_with_builds", version),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(["doctor", *words])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def checks(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["what"]: check for check in json.loads(answer["out"])["checks"]}


def test_rank_0_shows_what_all_ranks_found_and_all_end_well(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = ["--load-hf", inputs / "model", "--train-data-path", inputs / "data.jsonl", "--seq-length", 96]
    words += ["--tensor-model-parallel-size", 2, "--save", tmp_path / "run", "--train-iters", 10, "--json"]
    first, second = ranks(2).run(run_doctor, words=[str(word) for word in words])
    assert (first["code"], second["code"], second["out"]) == (0, 0, "")
    report = json.loads(first["out"])
    assert report["ok"]
    assert (report["world_size"], report["tensor_model_parallel_size"], report["data_parallel_size"]) == (2, 2, 1)
    found = checks(first)
    assert found["all-reduce, tensor"]["value"].startswith("16.8 MB among 2 ranks in ")
    assert "all-reduce, data" not in found
    assert {"torch", "shared memory", "device", "model", "tokenizer", "weights", "run", "space to save"} <= found.keys()
    assert not (tmp_path / "run").exists()


def test_a_rank_with_another_torch_is_named_and_the_command_fails(ranks: RankPools) -> None:
    first, second = ranks(2).run(run_doctor, words=["--json"], other_version_on=1)
    assert (first["code"], second["code"]) == (errors.EXIT_FAILURE, errors.EXIT_FAILURE)
    assert first["err"] == "hft-megatron: error: preflight checks failed: torch; the report shows the fixes.\n"
    [odd] = [check for check in json.loads(first["out"])["checks"] if check["status"] == "wrong"]
    assert (odd["what"], odd["value"]) == ("torch", "0.0.1")
    assert odd["where"].startswith("rank 1 on ")


MISTAKES = [
    (["--tensor-model-parallel-size", "2"], "does not divide this run's world size 1"),
    (["--tensor-parallel", "2"], "is not an option"),
    (["--distributed-timeout-minutes", "0"], "must be a number above 0"),
    (["--context-parallel-size", "2"], "is not built yet"),
    (["--train-data-path", "data.jsonl"], "No model is given"),
    (["--load-hf", "model", "--data-path", "corpus"], "add --method pretrain"),
    (["--load-hf", "model", "--num-layers", "2"], "cannot be given with --load-hf"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_a_mistake_in_the_options_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == errors.EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_the_table_has_the_fix_below_what_is_not_ok() -> None:
    rows = (
        Row(finding=Finding(what="torch", value="2.13")),
        Row(finding=Finding(what="disk", value="full", status="wrong", fix="Make room."), where="rank 1 on b"),
    )
    assert diagnosis_text(Diagnosis(setting="TP 1", rows=rows)).splitlines() == [
        "TP 1",
        "",
        "ok     torch  2.13",
        "wrong  disk   full (rank 1 on b)",
        "              Make room.",
        "",
        "Of 2 preflight checks 1 is wrong and none has a warning; the fix is below each.",
    ]


def test_alone_it_looks_at_the_machine_and_shows_no_secret(tmp_path: Path) -> None:
    secrets = forked.clean_environment(WANDB_API_KEY="s3cret", NCCL_DEBUG="s3cret")
    done = forked.run(["-m", "hft_megatron", "doctor", "--json"], tmp_path, environment=secrets)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["what"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["all-reduce"]["value"] == "every group has one rank: nothing is sent"
    assert "NCCL_DEBUG" in found["settings"]["value"]
    assert "s3cret" not in done.stdout + done.stderr


RANK_1_HANGS = """
import os, sys, threading
from hft_megatron.cli import main
from hft_megatron.doctor import examination, findings as time_limit
if os.environ["RANK"] == "1":
    examination.device_finding = lambda device, backend: threading.Event().wait()
short = time_limit.TimeLimit
examination.TimeLimit = lambda seconds, on_expiry: short(seconds=10.0, on_expiry=on_expiry)
sys.exit(main(["doctor", "--json"]))
"""


@pytest.mark.slow
def test_under_torchrun_every_kind_of_group_is_timed_and_only_rank_0_speaks(tmp_path: Path) -> None:
    words = ["-m", "hft_megatron", "doctor", "--pipeline-model-parallel-size", "2", "--json"]
    done = forked.run([*forked.torchrun(2), *words], tmp_path)
    assert done.returncode == 0, done.stderr
    found = {check["what"] for check in json.loads(done.stdout)["checks"]}
    assert "all-reduce, pipeline" in found


@pytest.mark.slow(reason="the time limit, and the time that rank 0 then leaves to the others")
def test_a_rank_that_hangs_is_named_and_the_others_do_not_wait_for_ever(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(RANK_1_HANGS)
    done = forked.run([*forked.torchrun(2), str(tmp_path / "hangs.py")], tmp_path)
    assert done.returncode == 1
    assert "rank 1 on " in done.stderr
    assert ": device: did not return in " in done.stderr
    report = json.loads(done.stdout)
    assert not report["ok"]
    assert [check["status"] for check in report["checks"] if "did not return" in check["value"]] == ["wrong"]
