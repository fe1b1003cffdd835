"""A connection between a client and a server on this machine that can be held up, and cut."""

import contextlib
import socket
import threading


class Relay:
    """Listens on ``port`` and passes on what comes to and from ``target``."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while some := source.recv(1 << 16):
                self._flows.wait()
                sink.sendall(some)
            sink.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Stops all delivery from now on, like a pulled cable."""
        self._flows.clear()

    def let_go(self) -> None:
        """Delivers the data that was held."""
        self._flows.set()

    def drop(self) -> None:
        """Ends all connections; new ones may be made."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def close(self) -> None:
        """Ends all connections and refuses new ones; a second call does nothing."""
        # shutdown, because close alone does not wake the thread that accepts, and the port would stay open.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.let_go()
        self.drop()
