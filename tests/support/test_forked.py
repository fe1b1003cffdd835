"""A program that starts by fork ends, speaks and trains as one that is really started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import forked
from tests.support.forked import clean_environment
from tests.support.runs import losses_in, make_inputs, run_cli, words_for

PROGRAM = """
import json, os, sys, threading
if "rank" in sys.argv:
    place = [os.environ["RANK"], os.getppid(), os.getpid() == os.getsid(0)]
    open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(json.dumps(place))
    print("rank", os.environ["RANK"], "speaks")
    sys.exit(int(os.environ["RANK"]) * 7)
print(sys.argv[1:], __name__, os.getcwd(), os.environ["MINE"], os.path.isdir(sys.path[0] + "/ends"), flush=True)
print("to the other stream", file=sys.stderr)
{end}
"""
THREAD = "threading.Thread(target=lambda: print('a thread is waited for')).start()\n"
ENDS = {
    "by itself": "",
    "with a number": "sys.exit(5)",
    "with a sentence": "sys.exit('no more')",
    "with a trace": "raise ValueError('oh')",
    "by a signal": "os.kill(os.getpid(), 9)",
    "as if interrupted": "raise KeyboardInterrupt",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_forked_program_has_the_words_streams_and_exit_code_of_a_started_one(end: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    (tmp_path / "ends").mkdir()
    program.write_text(PROGRAM.format(end=("" if end == "by a signal" else THREAD) + ENDS[end]))
    words, environment = [str(program), "one", "two words"], clean_environment(MINE="set")
    done = forked.run(words, tmp_path, environment=environment)
    started = subprocess.run(
        [sys.executable, *words], cwd=forked.REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (started.returncode, started.stdout)
    for said in (done.stderr, started.stderr):
        lines = said.splitlines()
        assert lines[0] == "to the other stream" or end == "by a signal"
        assert lines[-1:] == started.stderr.splitlines()[-1:]


def test_forked_ranks_are_torchrun_s_own_children_in_sessions_of_their_own(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(end=""))
    log = tmp_path / "log"
    launcher = forked.start([*forked.torchrun(2), str(program), str(tmp_path), "rank"], output=log)
    assert launcher.wait(60) == 1
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert ranks == [["0", launcher.pid, True], ["1", launcher.pid, True]]
    assert "exitcode  : 7" in log.read_text()
    assert "rank 0 speaks" in log.read_text()


def test_a_forked_program_that_is_killed_is_gone_and_a_time_out_is_raised(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time; time.sleep(600)")
    process = forked.start([str(program)], output=tmp_path / "log")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow(reason="two ranks and their torchrun import everything")
def test_ranks_with_hash_seeds_of_their_own_train_as_forked_ones_do(tmp_path: Path) -> None:
    """Orders that depend on hashes differ from rank to rank here, and from those of the forked run."""
    inputs = make_inputs(tmp_path)
    runs = {"forked": True, "started": False}
    for name, forks in runs.items():
        rounds = ["--hft-round-interval", 2, "--hft-moments", "carry", "--hft-frozen-moments", "host"]
        words = words_for(
            inputs, *rounds, "--save", tmp_path / name, "--save-interval", 3, "--save-hf", f"{tmp_path}/{name}-hf"
        )
        log = tmp_path / f"{name}.log"
        assert run_cli(words, ranks=2, log=log, forks=forks) == 0, log.read_text()[-4000:]
    assert len(losses_in(tmp_path / "forked")) == 6
    assert losses_in(tmp_path / "forked") == losses_in(tmp_path / "started")
    exported = [(tmp_path / f"{name}-hf" / "model.safetensors").read_bytes() for name in runs]
    assert exported[0] == exported[1]
