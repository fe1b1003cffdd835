"""A Docker engine of the tests' own. Its images and its build cache stay for the next session, in ``KEPT``.

BuildKit compares digests of all that a build takes in: a step is run again when its instruction, its base or one of its
files has changed.
"""

import contextlib
import fcntl
import functools
import http.server
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemons import Daemon, skip_without
from tests.support.ranks import REPOSITORY

CLIENT = "/usr/bin/docker"
"""Debian's client, which speaks the engine's protocol; another one may be first on PATH."""
KEPT = Path.home() / ".cache" / "hft_megatron" / "docker-tests"
"""Folder of data that the next session reuses; it may be removed at any time between two sessions."""
CACHE_LIMIT = "3gb"
"""Limit of the build cache; the CPU image needs 1.5 GB of it, and every change of the code as much again."""
NETWORK_OFF = ("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none")


class Engine:
    """A running engine without containers. ``close`` ends it."""

    def __init__(self) -> None:
        skip_without("dockerd", "debootstrap", CLIENT)
        self.folder = Path(tempfile.mkdtemp(prefix="hft-engine-"))
        KEPT.mkdir(parents=True, exist_ok=True)
        self._lock = (KEPT / "lock").open("w")
        self.kept = KEPT
        """Folder where builds' inputs may stay as well."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Two engines cannot share it: another session uses this one, and everything is made anew.
            self.kept = self.folder
        reason = self._start()
        if reason and self.data.exists():
            # The kept data may be damaged, which must not disable the tests for ever.
            shutil.rmtree(self.data)
            reason = self._start()
        if reason:
            self.close()
            pytest.skip(f"a Docker engine does not start here: {reason}")
        # Left by a killed session: names would be taken, and compose would resume its run.
        self._remove_containers()
        for kind in ("network", "volume", "image"):
            self.docker(kind, "prune", "--force")

    def _start(self) -> str:
        """Reason why the engine did not start, or an empty text."""
        words = ["dockerd", "--data-root", str(self.data), "--exec-root", f"{self.folder}/exec"]
        words += ["--pidfile", f"{self.folder}/pid", "--host", self.address, "--oom-score-adjust", "0", *NETWORK_OFF]
        self._daemon = Daemon(words, log=self.folder / "log")
        try:
            self._daemon.wait_for(lambda: self.docker("version", check=False).returncode == 0, 60)
        except AssertionError as reason:
            self._daemon.end()
            return str(reason)
        return ""

    @property
    def data(self) -> Path:
        """Folder with all layers, files written in containers, the build cache, configurations and logs."""
        return self.kept / "data"

    @property
    def address(self) -> str:
        return f"unix://{self.folder}/socket"

    def docker(self, *words: str, check: bool = True, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        """Runs ``docker WORDS``; with ``check`` a failure is shown with all that the command said."""
        environment = {**os.environ, "DOCKER_HOST": self.address, "DOCKER_BUILDKIT": "1"}
        command = [CLIENT, *words]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
        said = f"{' '.join(words)}:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        assert not check or done.returncode == 0, f"docker {said}"
        return done

    def build(self, *words: str, file: str, tag: str, wheels: Path, context: Path) -> None:
        """Builds ``context/docker/file``; pip in it finds the files in ``wheels`` and nothing else."""
        settings = self.folder / "pip.conf"
        command = ["build", "--network", "host", "--progress", "plain", "--file", f"{context}/docker/{file}", *words]
        with served(wheels) as url:
            settings.write_text(f"[global]\nno-index = true\nfind-links = {url}\n")
            secret = ("--secret", f"id=pip.conf,src={settings}")
            self.docker(*command, *secret, "--tag", tag, str(context), timeout=900)

    def has(self, image: str) -> bool:
        return self.docker("image", "inspect", image, check=False).returncode == 0

    def _remove_containers(self) -> None:
        containers = self.docker("ps", "--all", "--quiet", check=False).stdout.split()
        if containers:
            self.docker("rm", "--force", *containers, check=False)

    def close(self) -> None:
        self._remove_containers()
        # Layers that a newer build has taken the name from.
        self.docker("image", "prune", "--force", check=False)
        self.docker("builder", "prune", "--force", "--keep-storage", CACHE_LIMIT, check=False)
        self._daemon.end()
        # The engine leaves the mount of its network namespace behind.
        for line in Path("/proc/mounts").read_text().splitlines():
            mount_point = line.split()[1]
            if mount_point.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", mount_point], check=True)
        shutil.rmtree(self.folder)
        self._lock.close()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address on this machine's loopback interface, where a build with the host's network finds it."""
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
