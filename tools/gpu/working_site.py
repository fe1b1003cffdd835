"""The environment of a check: its folder, its ranks, and whether it is a toy. Imports neither torch nor the product."""

import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class CheckFailed(Exception):
    """A measurement is wrong; the message is a sentence."""


def expect(holds: bool, otherwise: str) -> None:
    """Raises CheckFailed with the sentence ``otherwise`` unless the condition holds."""
    if not holds:
        raise CheckFailed(otherwise)


@dataclass(kw_only=True)
class Site:
    """The argument of every check function."""

    folder: Path
    """Folder for files of the checks; the same for all ranks, which are on one machine."""
    toy: bool
    """On CPU, with small shapes and without floors for speed."""
    ranks: int = 1
    """Number of ranks of the runs."""
    processes: int = 1
    """Processes of this worker: one per rank, or only this one, which starts the ranks itself."""
    rank: int = 0
    _meetings: int = field(default=0, init=False)
    _names: int = field(default=0, init=False)

    @property
    def tolerance(self) -> float:
        """Tolerance of a loss after 20 steps in fp32, relative to the reference."""
        return 1e-5 if self.toy else 1e-4

    def new_folder(self, name: str) -> Path:
        """A new path, the same on all ranks, which call this in the same order."""
        self._names += 1
        return self.folder / f"{self._names:03d}-{name}"

    def meet(self) -> None:
        """Returns when every process has arrived; uses files, because it is called between process groups."""
        if self.processes == 1:
            return
        self._meetings += 1
        place = self.folder / "meetings" / str(self._meetings)
        place.mkdir(parents=True, exist_ok=True)
        (place / str(self.rank)).touch()
        while len(list(place.iterdir())) < self.processes:
            time.sleep(0.01)
