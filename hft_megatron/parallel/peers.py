"""The other ranks of a command: when they meet, on which hosts they are, and that none of those is lost in silence."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from hft_megatron.config.schema import ParallelConfig
from hft_megatron.parallel.groups import host_name, start_backend
from hft_megatron.parallel.hosts import Host, hosts_of
from hft_megatron.parallel.meeting import Meeting, did_not_meet, meet
from hft_megatron.parallel.watchdog import OnLoss, Watchdog


@contextlib.contextmanager
def peers(minutes: int, on_loss: OnLoss) -> Iterator["Peers"]:
    """Meets the other ranks, for which ``minutes`` are waited; an error within ends this rank's watch.

    ``on_loss`` gets the sentence about a lost host, on another thread, and the process ends after it. Raises PeersLost.
    """
    company = Peers(None if dist.is_initialized() else meet(minutes), on_loss)
    try:
        yield company
    except BaseException:
        company.abandon()
        raise


class Peers:
    """What ``peers`` yields."""

    def __init__(self, meeting: Meeting | None, on_loss: OnLoss) -> None:
        """``meeting`` is None where the default process group exists already: it is then not ours to watch over."""
        self.hosts: tuple[Host, ...] = ()
        """Known after ``join``."""
        self._meeting, self._on_loss = meeting, on_loss
        self._watchdog: Watchdog | None = None

    def join(self, parallel: ParallelConfig) -> None:
        """Makes the default process group and begins to watch; collective. A second call does nothing.

        Raises UserError where a rank can't have a device, PeersLost where not all ranks come.
        """
        if self.hosts:
            return
        minutes = parallel.distributed_timeout_minutes
        try:
            start_backend(parallel, self._meeting)
            places = [("", "")] * dist.get_world_size()
            dist.all_gather_object(places, (host_name(), os.environ.get("GROUP_RANK", "")))
            self.hosts = hosts_of(places)
            if self._meeting is not None and len(self.hosts) > 1:
                watchdog = Watchdog(self._meeting, self.hosts, self._on_loss)
                watchdog.connect()
                # Every host must have counted once before any rank looks at them.
                dist.barrier()
                watchdog.start()
                self._watchdog = watchdog
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise did_not_meet(minutes, str(error).strip().partition("\n")[0]) from error

    def leave(self) -> None:
        """Ends the watch when all ranks have come here, at the end of their work."""
        if self._watchdog is not None:
            self._watchdog.leave()

    def abandon(self) -> None:
        """Ends the watch on this rank; where it is about to name a host it has lost, this does not return."""
        if self._watchdog is not None:
            self._watchdog.abandon()
