"""A Docker engine of the tests' own: all that it keeps is in one folder, which goes with it."""

import contextlib
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
NETWORK_OFF = ("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none")


class Engine:
    """A running engine. ``close`` ends it and removes all that it kept."""

    def __init__(self) -> None:
        skip_without("dockerd", "debootstrap", CLIENT)
        self.folder = Path(tempfile.mkdtemp(prefix="hft-engine-"))
        words = ["dockerd", "--data-root", str(self.data), "--exec-root", f"{self.folder}/exec"]
        words += ["--pidfile", f"{self.folder}/pid", "--host", self.address, "--oom-score-adjust", "0", *NETWORK_OFF]
        self._daemon = Daemon(words, log=self.folder / "log")
        try:
            self._daemon.wait_for(lambda: self.docker("version", check=False).returncode == 0, 60)
        except AssertionError as reason:
            self.close()
            pytest.skip(f"a Docker engine does not start here: {reason}")

    @property
    def data(self) -> Path:
        """Every layer, every file written in a container, the build cache, all configurations and logs."""
        return self.folder / "data"

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
            self.docker(*command, *secret, "--tag", tag, str(context), timeout=400)

    def close(self) -> None:
        containers = self.docker("ps", "--all", "--quiet", check=False).stdout.split()
        if containers:
            self.docker("rm", "--force", *containers, check=False)
        self._daemon.end()
        # The engine leaves the mount of its network namespace behind.
        for line in Path("/proc/mounts").read_text().splitlines():
            mount_point = line.split()[1]
            if mount_point.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", mount_point], check=True)
        shutil.rmtree(self.folder)


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
