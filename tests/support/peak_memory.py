"""Peak memory of a piece of code, for tests of code that must not hold a whole model."""

import ctypes
import threading
from pathlib import Path

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 16
"""Tensors of so many bytes have memory of their own from then on, which goes back to the system when they are freed."""
_IS_MMAPPED = 2
"""Bit of the size that glibc keeps before a piece of memory."""


class PeakMemory:
    """Peak of the anonymous memory above the process's earlier one: the memory of a merge, without pages of mapped
    files, which the kernel drops when it needs room."""

    def __enter__(self) -> "PeakMemory":
        self._gaps = _Gaps()
        self._before = self._peak = _anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._peak = max(self._peak, _anonymous_bytes())
        self._gaps.free()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._peak = max(self._peak, _anonymous_bytes())

    @property
    def bytes(self) -> int:
        return self._peak - self._before


class _Gaps:
    """The large gaps between what earlier tests left in glibc's heap, taken without being touched.

    Tensors would be put into them, whose memory glibc keeps when they are freed: it would count until the end. Of
    another C library nothing is taken.
    """

    def __init__(self) -> None:
        self._taken: list[int] = []
        self._libc = ctypes.CDLL(None)
        if not hasattr(self._libc, "mallopt"):
            return
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        self._libc.malloc_trim(0)
        is_gap = True
        while is_gap:
            self._taken.append(self._libc.malloc(ctypes.c_size_t(_LARGE)))
            size_before = ctypes.c_size_t.from_address(self._taken[-1] - ctypes.sizeof(ctypes.c_size_t))
            is_gap = not size_before.value & _IS_MMAPPED

    def free(self) -> None:
        for address in self._taken:
            self._libc.free(ctypes.c_void_p(address))


def _anonymous_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
