"""docs/evaluation.md: its commands run, and its measures are those there are."""

import re
import shlex
from pathlib import Path

import pytest

from hft_megatron.errors import EXIT_OK
from hft_megatron.evaluation.kinds import KINDS
from tests.support.data_files import write_rows
from tests.support.evaluations import results_of
from tests.support.forked import run, torchrun
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")


def test_every_measure_has_its_row_under_its_kind() -> None:
    table = PAGE.split("| measure |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE)
    assert sorted(rows) == sorted((name, kind) for kind, each in KINDS.items() for name in each.metrics())


FILES = re.compile(r"(?<![\w./-])(my_tasks|tasks\.yaml|results\.json|harness\.json|tp2\.json)\b")
"""Those that the page names without a folder."""


def within(folder: Path, command: str) -> str:
    """The command with the page's places in ``folder``."""
    for place, there in (("/models/Llama-2-7b-hf", "base"), ("/runs/", "runs/")):
        command = command.replace(place, f"{folder}/{there}")
    return FILES.sub(f"{folder}/\\1", command)


@pytest.mark.slow(reason="each command is a process or two")
def test_the_commands_run(ranks: RankPools, tmp_path: Path) -> None:
    make_inputs(tmp_path, max_position_embeddings=1024)
    (tmp_path / "model").rename(tmp_path / "base")
    saves = ["--load-hf", tmp_path / "base", "--train-iters", 4, "--save", tmp_path / "runs/sft", "--save-interval", 2]
    ranks(2).run(run_sft_words, words=words_for(tmp_path, *saves))
    write_tasks_of_the_page(tmp_path)
    write_runs_and_a_task_of_the_harness(tmp_path)
    said = []
    for command in shell_commands():
        program, *words = shlex.split(within(tmp_path, command))
        if program == "torchrun":
            assert words[:2] == ["--nproc-per-node", "2"]
            words = [*torchrun(2), *words[2:]]
        else:
            words = ["-m", "hft_megatron", *words]
        done = run(words, tmp_path)
        assert done.returncode == EXIT_OK, (command, done.stderr)
        said.append(done.stdout)
    assert [len(model["tasks"]) for model in results_of(tmp_path / "results.json")["models"]] == [4, 4, 4]
    assert "articles: 1 examples" in said[2]
    assert "capitals" not in said[2]
    # A note about the brackets is the last line.
    compared = [line.split()[0] for line in said[3].splitlines()[1:-1]]
    assert set(compared) == {"capitals", "capitals_mc", "articles", "politeness"}
    assert "kl_base_tuned (nats)" in said[4]
    assert "lm loss validation/new" in said[5]
    assert "my_task" in said[6]


def shell_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def write_tasks_of_the_page(folder: Path) -> None:
    """``tasks.yaml`` and its files."""
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "tasks.yaml").write_text(shown, encoding="utf-8")
    (folder / "articles").mkdir()
    write_rows(folder / "capitals.jsonl", [{"country": "France", "capital": ["Paris"]}])
    (folder / "capitals_mc.csv").write_text("country,A,B,C,answer\nFrance,Nice,Paris,Brest,B\n")
    write_rows(folder / "articles/a.jsonl", [{"text": "Paris is a city."}])
    write_rows(folder / "pairs.jsonl", [{"prompt": "Paris?", "chosen": "Yes.", "rejected": "No."}])


def write_runs_and_a_task_of_the_harness(folder: Path) -> None:
    """Metrics of the runs that the frontier is of, and ``my_tasks``."""
    for number, name in enumerate(("half_1e-5", "half_3e-5", "full_1e-5", "full_3e-5")):
        losses = [(0, 3.0, 2.0), (10, 2.5 - number / 10, 2.2 + number / 10)]
        records = [
            {"iteration": step, "lm loss validation/new": new, "lm loss validation/old": old}
            for step, new, old in losses
        ]
        (folder / "runs" / name).mkdir()
        write_rows(folder / "runs" / name / "metrics.jsonl", records)
    (folder / "my_tasks").mkdir()
    write_rows(folder / "my_tasks/test.jsonl", [{"question": "Is Paris a city?", "choices": ["Yes", "No"], "gold": 0}])
    (folder / "my_tasks/my_task.yaml").write_text(
        "task: my_task\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/my_tasks/test.jsonl}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{gold}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
