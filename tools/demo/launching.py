"""Starts the demo's trainings as a person would, on the CPU, and shows their progress; a log file gets everything."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LAST_LINES = 15
SHOWN = (">", " [20", "hft-megatron: error")
"""Beginnings of the lines to show: training and its progress, not the libraries' warnings."""
SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_")


class DemoError(Exception):
    """The demo cannot continue; the message is one sentence, perhaps with the last lines of a log."""


def cpu_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without a GPU and without what a surrounding torchrun set, plus ``additions``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_TORCHRUN)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **additions}


def run_logged(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    inherit: Sequence[int] = (),
    shows: bool = True,
) -> None:
    """Run ``command`` in ``folder``, append its output to ``log``, and print its progress lines.

    ``inherit`` are file descriptors the command keeps open; without ``shows`` nothing is printed. Raises DemoError with
    the log's end when it fails.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=tuple(inherit),
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if shows and line.startswith(SHOWN):
                    print(f"    {line.strip()}", flush=True)
    if process.returncode != 0:
        end = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-LAST_LINES:])
        raise DemoError(f"{command[0]} ended with exit code {process.returncode}; the end of {log}:\n{end}")


def exit_code_of(program: Callable[[], object]) -> int:
    """Run one of the demo's programs: 0, 1 after a DemoError, which is told without a trace, 130 after Ctrl-C."""
    try:
        program()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
