"""TensorBoard, under the keys Megatron writes there (``lm loss``, ``learning-rate``, ``grad-norm`` ...)."""

from hft_megatron.tracking.tracker import Metrics, dashboard_metrics


class TensorBoardTracker:
    """Writes every number of a record as a scalar; text (the plan digest) has no curve and is left out."""

    def __init__(self, folder: str, *, start_iteration: int) -> None:
        """Write event files into ``folder``; a resumed run hides the events of iterations it does again."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only when asked for

        purge_step = start_iteration + 1 if start_iteration > 0 else None
        self._writer = SummaryWriter(log_dir=folder, purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one scalar per number."""
        for name, value in dashboard_metrics(metrics).items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
