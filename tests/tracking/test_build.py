import importlib.machinery
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.errors import UserError
from hft_megatron.tracking import trackers
from hft_megatron.tracking.tracker import CompositeTracker
from hft_megatron.tracking.trackers import build_tracker


def build_for(logging: LoggingConfig, *, save: Path | None = None, is_writer: bool = True) -> CompositeTracker:
    return build_tracker(
        logging,
        save=None if save is None else str(save),
        train_iters=10,
        start_iteration=0,
        kept_until=0,
        resolved_config={"optimizer": {"lr": 1e-5}},
        is_writer=is_writer,
    )


def test_a_rank_that_does_not_write_touches_nothing(tmp_path: Path) -> None:
    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "tb"), wandb_project="p")
    tracker = build_for(logging, save=tmp_path / "run", is_writer=False)
    tracker.log(1, {"lm loss": 1.0})
    tracker.close()
    assert tracker.trackers == ()
    assert list(tmp_path.iterdir()) == []


def test_with_nothing_asked_the_writer_has_only_the_console() -> None:
    tracker = build_for(LoggingConfig())
    assert [type(one).__name__ for one in tracker.trackers] == ["ConsoleTracker"]


def test_the_save_folder_gets_metrics_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = build_for(LoggingConfig(), save=tmp_path / "run")
    tracker.log(1, {"lm loss": 1.0})
    tracker.close()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"iteration": 1, "lm loss": 1.0}
    assert "lm loss: 1.000000E+00" in capsys.readouterr().out


@pytest.mark.parametrize("is_writer", [True, False])
@pytest.mark.parametrize(
    ("logging", "message"),
    [
        (LoggingConfig(wandb_project="p"), "--wandb-project p needs the package wandb; run `pip install wandb`."),
        (LoggingConfig(tensorboard_dir="t"), "--tensorboard-dir t needs .* run `pip install tensorboard`."),
    ],
)
def test_a_missing_package_is_one_sentence_on_every_rank(
    logging: LoggingConfig, message: str, is_writer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_nothing(name: str) -> importlib.machinery.ModuleSpec | None:
        return None

    monkeypatch.setattr(trackers, "find_spec", find_nothing)
    with pytest.raises(UserError, match=message):
        build_for(logging, is_writer=is_writer)


def test_importing_the_trackers_imports_neither_wandb_nor_tensorboard_nor_tqdm() -> None:
    code = (
        "import sys, hft_megatron.tracking.trackers; "
        "print([name for name in ('wandb', 'tensorboard', 'tqdm', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


class Recorder:
    is_dashboard = False

    def __init__(self, journal: list[str], name: str) -> None:
        self._journal, self._name = journal, name

    def log(self, step: int, metrics: object) -> None:
        self._journal.append(f"{self._name} {step} {metrics}")

    def close(self) -> None:
        self._journal.append(f"{self._name} closed")


def test_a_composite_passes_everything_to_each_tracker_and_closes_in_reverse() -> None:
    journal: list[str] = []
    tracker = CompositeTracker(trackers=(Recorder(journal, "a"), Recorder(journal, "b")))
    tracker.log(3, {"x": 1})
    tracker.close()
    assert journal == ["a 3 {'x': 1}", "b 3 {'x': 1}", "b closed", "a closed"]
