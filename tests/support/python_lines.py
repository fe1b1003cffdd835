"""Lines of this package that a piece of code executes, counted: work of the host that no operator shows."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "hft_megatron"


class PythonLines:
    """``lines``: how often lines ran, by file and function (``optimizer/traffic.py:count``); every turn of a loop is
    one more, also of a comprehension. Of this thread alone, where a backward pass on a CPU runs as well."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self._files: dict[str, str | None] = {}
        """Below the package; None for those of others."""

    def __enter__(self) -> "PythonLines":
        self._before = sys.gettrace()
        sys.settrace(self._enter_function)
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.settrace(self._before)

    def _enter_function(self, frame: FrameType, event: str, argument: Any) -> Any:
        return None if self._file_of(frame) is None else self._note

    def _note(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines[f"{self._file_of(frame)}:{frame.f_code.co_name}"] += 1
        return self._note

    def _file_of(self, frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        if file not in self._files:
            path = Path(file)
            self._files[file] = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None
        return self._files[file]
