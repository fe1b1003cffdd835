"""docs/continual.md: its command is one, and its list of tasks is read. Run: pytest tests/methods/continual"""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.forked import clean_environment, run
from tests.support.runs import make_inputs
from tests.support.sequences import write_rows

PAGE = (Path(__file__).parents[3] / "docs/continual.md").read_text(encoding="utf-8")


@pytest.mark.slow(reason="a process that imports everything")
def test_the_command_and_the_list_of_tasks_are_as_the_page_has_them(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "tasks.yaml").write_text(shown.replace("/data/", f"{tmp_path}/data/"))
    (tmp_path / "data").mkdir()
    for name in ("capitals", "rivers"):
        row = {"prompt": f"{name}?", "answer": "Paris"}
        write_rows(tmp_path / "data" / f"{name}.jsonl", [row])
        write_rows(tmp_path / "data" / f"{name}_test.jsonl", [{**row, "options": ["Paris", "Rome"]}])
    (command,) = re.findall(r"```bash\ntorchrun --nproc-per-node 2 (.*?)\n```", PAGE, re.DOTALL)
    for place, there in (("\\\n", ""), ("/models/Llama-2-7b-hf", f"{tmp_path}/model"), ("/runs/", f"{tmp_path}/runs/")):
        command = command.replace(place, there)
    words = shlex.split(command.replace("tasks.yaml", f"{tmp_path}/tasks.yaml"))
    done = run([*words, "--check"], tmp_path, environment=clean_environment(WORLD_SIZE="2"))
    assert done.returncode == 0, done.stderr
    assert "rivers: 1 examples to evaluate" in done.stdout
    assert not (tmp_path / "runs").exists()
