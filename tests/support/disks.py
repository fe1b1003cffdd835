"""A small disk for tests: a tmpfs in a mount namespace of its own, so that nothing outside sees or keeps it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """A mounted small disk. Only processes on the file systems of ``holder`` see it at ``mount_point``."""

    def __init__(self, mount_point: Path, holder: int) -> None:
        self.mount_point = mount_point
        self.holder = holder
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self._enter = ["nsenter", "--target", str(holder), "--mount", *user]

    def seen(self, path: Path) -> Path:
        """The same path seen from outside."""
        return Path(f"/proc/{self.holder}/root{path}")

    def remount(self, options: str) -> None:
        """Remounts with options such as ``size=1m`` or ``ro``."""
        subprocess.run([*self._enter, "mount", "-o", f"remount,{options}", str(self.mount_point)], check=True)

    def become_read_only(self, folder: Path) -> None:
        """Forbids opening files for writing from now on; a plain remount is refused while a file is open."""
        for words in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
            subprocess.run([*self._enter, "mount", *words], check=True)

    def leave_free(self, size: int) -> None:
        """Shrinks or grows the disk so that ``size`` bytes (of whole pages of 4,096) are free.

        Nobody may write meanwhile: a disk cannot become smaller than its content.
        """
        used = os.statvfs(self.seen(self.mount_point))
        pages = used.f_blocks - used.f_bfree + -(-size // used.f_frsize)
        self.remount(f"size={pages * used.f_frsize}")


@contextlib.contextmanager
def small_disk(mount_point: Path, size: str = "256m") -> Iterator[Disk]:
    """Makes ``mount_point`` and mounts a disk there; the test skips where this user may not mount anything."""
    mount_point.mkdir()
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    script = f"mount -t tmpfs -o size={size} tmpfs '{mount_point}' && echo mounted && exec cat"
    with subprocess.Popen(
        [*namespace, "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        said = holder.stdout.readline().strip()
        try:
            if said != "mounted":
                pytest.skip(f"no disk can be mounted here: {said}")
            yield Disk(mount_point, holder.pid)
        finally:
            holder.stdin.close()
