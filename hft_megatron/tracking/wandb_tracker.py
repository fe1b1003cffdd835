"""Weights & Biases, online or offline (``WANDB_MODE=offline``), under the keys Megatron writes there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hft_megatron.errors import UserError
from hft_megatron.tracking.tracker import Metrics, dashboard_metrics


class WandbTracker:
    """One wandb run. It gets the resolved options and the records; no source, no diff, no terminal output."""

    def __init__(self, *, project: str, name: str | None, folder: str | None, config: Mapping[str, Any]) -> None:
        """Start a run of ``project``; its files go to ``folder``/wandb (./wandb when None).

        Raises ``UserError`` when wandb refuses, which online it does without a login or a connection.
        """
        import wandb  # starts threads on import: only when asked for

        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        # Left on, wandb uploads a git diff of the working tree and copies of the terminal, which may hold secrets.
        settings = wandb.Settings(console="off", disable_git=True, save_code=False)
        try:
            self._run = wandb.init(project=project, name=name, dir=folder, config=dict(config), settings=settings)
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"--wandb-project {project}: wandb does not start ({reason}): "
                "run `wandb login`, or set WANDB_MODE=offline."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        """Add the record to the run's history at ``step``."""
        self._run.log(dashboard_metrics(metrics), step=step)

    def close(self) -> None:
        """Finish the run; online, wait until it is uploaded."""
        self._run.finish()
