"""Stand-ins for Slurm's and Apptainer's commands, which note their words and can run what they are given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.ranks import REPOSITORY

BATCH_FILE = REPOSITORY / "examples" / "slurm" / "train_llama_hft.sbatch"
NODES = ("n7", "n8")
STAND_IN = """#!{python}
import json, os, pathlib, subprocess, sys
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps({{"command": name, "words": words, "environment": dict(os.environ)}}) + "\\n")

def split(flags):
    "Options with their values, and the command after them."
    options, rest = {{}}, list(words)
    while rest and rest[0].startswith("--"):
        option, _, value = rest.pop(0).partition("=")
        options[option] = value if value or option in flags else rest.pop(0)
    return options, rest

if name == "sbatch":
    options, (file, *rest) = split(("--parsable",))
    output = f"{{os.environ['SLURM_JOB_NAME']}}-{{os.environ['SLURM_JOB_ID']}}.out"
    with open(output, "a") as said:
        sys.exit(subprocess.run(["bash", file, *rest], stdout=said, stderr=said).returncode)
if name == "scontrol":
    print("\\n".join({nodes!r}) if "hostnames" in words else "NodeName=n7 NodeAddr=10.0.0.7 NodeHostName=n7")
if name == "srun" and "STAND_IN_CODE" not in os.environ:
    options, command = split(("--label",))
    codes = []
    for number in range(len({nodes!r})):
        place = {{**os.environ, "SLURM_NODEID": str(number)}}
        done = subprocess.run(command, env=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        file = options["--output"].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%n", str(number))
        with open(file, "a") as log:
            log.writelines(f"{{number}}: {{line}}" for line in done.stdout.splitlines(keepends=True))
        codes.append(done.returncode)
    sys.exit(max(codes))
if name == "srun":
    sys.exit(int(os.environ["STAND_IN_CODE"]))
if name == "apptainer":
    options, (image, *command) = split(("--nv",)) if words.pop(0) == "exec" else ({{}}, words)
    # bash -c WORDS bash FILE ...: the file is the image's.
    assert command[4].startswith("/opt/hft_megatron/examples/")
    command[4] = {examples!r} + "/" + pathlib.Path(command[4]).name
    os.execvp(command[0], command)
"""


class Job:
    """The batch file as a job on two nodes would run it; ``folder`` is the working folder and the repository."""

    def __init__(self, folder: Path, *, examples: Path) -> None:
        self.folder = folder
        self._log = folder / "calls"
        self._commands = folder / "commands"
        self._commands.mkdir()
        for name in ("sbatch", "srun", "scontrol", "apptainer"):
            text = STAND_IN.format(python=sys.executable, log=str(self._log), nodes=NODES, examples=str(examples))
            (self._commands / name).write_text(text)
            (self._commands / name).chmod(0o755)
        (folder / "examples").symlink_to(examples)

    def run(self, *words: str, **settings: str) -> int:
        """Submits the batch file with ``words``, and waits; its exit code. A setting of "" is left out."""
        given = {"MODEL": "/models/m", "DATA": "/data/d.jsonl", "SLURM_JOB_ID": "41234", "SLURM_JOB_NAME": "name"}
        given |= {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96"}
        given |= {"SLURM_SUBMIT_DIR": str(self.folder), "SLURM_GPUS_ON_NODE": "8", **settings}
        environment = {"PATH": f"{self._commands}:{os.environ['PATH']}", **{k: v for k, v in given.items() if v != ""}}
        command = ["sbatch", "--nodes", "2", str(BATCH_FILE), *words]
        return subprocess.run(command, env=environment, cwd=self.folder, check=False, timeout=60).returncode

    def calls(self, command: str) -> list[dict[str, Any]]:
        """``words`` and ``environment`` of every call of one of the commands."""
        calls = [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []
        return [call for call in calls if call["command"] == command]

    def step(self) -> tuple[list[str], dict[str, str]]:
        """Words and environment of the last srun."""
        call = self.calls("srun")[-1]
        return call["words"], call["environment"]

    def said(self) -> str:
        """The job's own output."""
        return (self.folder / "name-41234.out").read_text()
