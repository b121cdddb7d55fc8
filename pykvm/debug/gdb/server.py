"""Serves a machine to gdb: connections one at a time, each a Session, on the thread that runs the guest.

Two threads more: one accepts connections, one reads from the client, so that its Ctrl-C is seen while the guest runs.
"""

from __future__ import annotations

from queue import Empty, Full, Queue
from threading import Condition, Event, Lock, Thread
from time import sleep

from pykvm.debug.gdb.packets import PacketReader, frame
from pykvm.debug.gdb.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from pykvm.debug.control import Control
    from pykvm.debug.gdb.listen import Listener
    from pykvm.debug.stepping import Stopped

__all__ = ["Connection", "Server"]

_WAITING = 64  # packets that a client may send ahead
_PATIENCE = 0.5  # seconds that a second client waits for the first one to go
_SEND_LIMIT = 30.0  # seconds for a client to take what it is sent


class Connection:
    """The packets of a client. ``gone`` is set when it has closed its end, or cannot be written to."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.gone = Event()
        self.session: Session | None = None
        self._packets: Queue[bytes] = Queue(_WAITING)
        self._lock = Lock()
        self._last = b""
        self._received = self._handled = 0
        self._handling = False
        client.settimeout(_SEND_LIMIT)
        self._thread = Thread(target=self._read, name="gdb", daemon=True)

    def start(self, session: Session) -> None:
        """Read from now on."""
        self.session = session
        self._thread.start()

    def _read(self) -> None:
        reader = PacketReader()
        assert self.session is not None
        session = self.session
        try:
            while not self.gone.is_set():
                try:
                    data = self.client.recv(4096)
                except TimeoutError:
                    continue
                if not data:
                    break
                for kind, packet in reader.feed(data):
                    if kind == "packet":
                        if not session.no_ack:
                            self._send(b"+")
                        self._put(packet)
                    elif kind == "bad" and not session.no_ack:
                        self._send(b"-")
                    elif kind == "nak" and not session.no_ack:
                        self._send(self._last)
                    elif kind == "interrupt":
                        self._interrupt()
        except OSError:
            pass
        self.gone.set()
        while self._handling and not self._stops_guest():
            sleep(1e-4)

    def _interrupt(self) -> None:
        """Ctrl-C is for the packet before it, which lets the guest run, or is about to; when that has its answer it comes too late."""
        while self._handled != self._received and not self.gone.is_set() and not self._stops_guest():
            sleep(1e-4)

    def _stops_guest(self) -> bool:
        assert self.session is not None
        return self.session.running and self.session.control.interrupt()

    def _put(self, packet: bytes) -> None:
        self._received += 1
        while not self.gone.is_set():
            try:
                self._packets.put(packet, timeout=0.2)
            except Full:
                continue
            return

    def next(self) -> bytes | None:
        """The next packet; None when the client is gone."""
        while True:
            try:
                packet = self._packets.get(timeout=0.2)
            except Empty:
                if self.gone.is_set():
                    return None
                continue
            self._handling = True
            return None if self.gone.is_set() else packet  # what nobody waits for any more is not begun

    def handled(self) -> None:
        """What next() gave has been carried out."""
        self._handled += 1
        self._handling = False

    def send(self, data: bytes) -> None:
        """A packet. A client that does not take it is gone."""
        self._last = frame(data)
        self._send(self._last)

    def _send(self, data: bytes) -> None:
        try:
            with self._lock:
                self.client.sendall(data)
        except OSError:
            self.gone.set()

    def close(self) -> None:
        """Hang up."""
        import socket

        self.gone.set()
        self._handling = False
        try:
            self.client.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if self._thread.ident is not None:
            self._thread.join()
        self.client.close()


class Server:
    """``control`` for whoever connects to ``listener``; ``timeout``: seconds that the guest may run at a time."""

    def __init__(self, control: Control, listener: Listener, timeout: float | None = None) -> None:
        self.control, self.listener, self.timeout = control, listener, timeout
        self._free = False  # the guest runs, and nobody is connected
        self._changed = Condition()
        self._client: socket.socket | None = None  # who has come and is not served yet
        self._occupied = False  # by that one, or by the one that is
        self._served: socket.socket | None = None  # whoever it is
        self._closed = False

    def serve(self, *, wait: bool) -> Stopped | None:
        """Until the guest has ended; None when gdb has killed it. ``wait``: it does not start before gdb says so.

        A client that goes without a word leaves the guest standing for the next one; one that detaches, or never said anything, lets it run
        if it ran.
        """
        acceptor = Thread(target=self._accept, name="gdb listener", daemon=True)
        acceptor.start()
        try:
            free = not wait
            while True:
                stopped = self._run_free() if free else None
                if stopped is not None:
                    return stopped
                session, heard = self._serve(self._next_client())
                self.control.detach()
                if session.over == "killed":
                    return None
                if session.over == "ended":
                    return session.stopped
                free = session.over == "detached" if heard else free
        finally:
            self._closed = True
            self.listener.close()

    def _run_free(self) -> Stopped | None:
        """Until it ends, or somebody connects: None."""
        self._free = True
        try:
            if self._client is not None:
                return None
            stopped = self.control.cont(self.timeout)
            return None if stopped.reason == "interrupted" and self._client is not None else stopped
        finally:
            self._free = False

    def _accept(self) -> None:
        """One client at a time; another waits for a moment, in which the first may be about to hang up, or until one that has is gone."""
        while not self._closed:
            try:
                client, _ = self.listener.socket.accept()
            except OSError:
                return
            with self._changed:
                while not self._changed.wait_for(lambda: not self._occupied, _PATIENCE) and _has_hung_up(self._served):
                    pass
                if self._occupied:
                    client.close()
                    continue
                self._occupied, self._client, self._served = True, client, client
                self._changed.notify_all()
            while self._free and self._client is not None and not self.control.interrupt():
                sleep(1e-4)

    def _next_client(self) -> socket.socket:
        with self._changed:
            while self._client is None:
                self._changed.wait(0.5)  # between two, Python's signal handlers run
            client, self._client = self._client, None
            return client

    def _serve(self, client: socket.socket) -> tuple[Session, bool]:
        """The session, and whether the client has said anything."""
        connection = Connection(client)
        session = Session(self.control, connection.send, self.timeout)
        connection.start(session)
        heard = False
        try:
            while not session.over:
                packet = connection.next()
                if packet is None:
                    break
                heard = True
                reply = session.handle(packet)
                connection.handled()
                connection.send(reply)
        finally:
            connection.close()
            with self._changed:
                self._occupied = False
                self._changed.notify_all()
        return session, heard


def _has_hung_up(client: socket.socket | None) -> bool:
    """Whether it has closed its end, though not all that it sent may have been read."""
    from select import POLLRDHUP, poll

    if client is None or client.fileno() < 0:
        return True
    watched = poll()
    watched.register(client, POLLRDHUP)
    return bool(watched.poll(0))
