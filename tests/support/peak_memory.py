"""Peak memory of a piece of code, for tests of code that must not hold a whole model."""

import ctypes
import threading
from pathlib import Path

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 16
"""Tensors of so many bytes have memory of their own from then on, which goes back to the system when they are freed."""


class PeakMemory:
    """Peak of the anonymous memory above the process's earlier one: the memory of a merge, without pages of mapped
    files, which the kernel drops when it needs room."""

    def __enter__(self) -> "PeakMemory":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc's: else what was freed before would be taken again, and not be seen
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.malloc_trim(0)
        self._before = self._peak = _anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._peak = max(self._peak, _anonymous_bytes())

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._peak = max(self._peak, _anonymous_bytes())

    @property
    def bytes(self) -> int:
        return self._peak - self._before


def _anonymous_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
