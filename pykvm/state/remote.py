"""The control socket: a running machine has an address, and answers there (docs/state.md has the commands).

Requests and answers are JSON objects, one a line: ``{"command": "status"}`` gives ``{"ok": true, ...}``, anything that is wrong
``{"ok": false, "error": "..."}``. Each client has a thread of its own: one that sends rubbish, stalls or goes away disturbs neither the
guest nor others.
"""

from __future__ import annotations

import json
import socket
from _thread import RLock
from threading import Event, Thread
from time import monotonic

from pykvm.errors import ConfigError, MigrationError, PykvmError
from pykvm.state.migrate import DOWNTIME, PATIENCE, Migration, check_not_handed_over
from pykvm.unixsocket import UnixListener, connect, path_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pykvm.machine import Machine

__all__ = ["COMMANDS", "ControlClient", "ControlServer"]

COMMANDS = {
    "status": "what the machine is and does",
    "pause": "the vCPUs leave the guest and wait",
    "resume": "they go on",
    "snapshot": "save it all in the directory ``dir``; the guest goes on",
    "migrate": "move the guest to the address ``to``, with the goal ``downtime`` in seconds; with ``wait``, progress and a report follow",
    "power": "press the power button (platform pc-test): the guest is asked to power off, or woken from S3",
    "cancel": "give a migration up, before it is committed",
    "quit": "end the run",
}
LONGEST_LINE = 64 << 10
MOST_CLIENTS = 16
SEND_PATIENCE = 5.0  # seconds for a client that does not read what it is told
INTERVAL = 0.2  # seconds between two lines of progress


class ControlServer:
    """Answers at ``path`` for ``machine`` until close(); a context manager. Nobody but the owner of this process may connect.

    ``say(text)`` is told when a migration has failed. Raises ConfigError: it cannot listen.
    """

    def __init__(
        self,
        machine: Machine,
        path: str,
        *,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.machine, self._say = machine, say
        self._lock = RLock()  # around what changes the machine's course
        self._clients: dict[socket.socket, Thread] = {}
        self._migration: Migration | None = None
        self._outcome: dict[str, Any] = {}
        self._settled = Event()  # no migration is on its way
        self._settled.set()
        self._closing = False
        self._began = monotonic()
        try:
            self._listener = UnixListener(path, MOST_CLIENTS)
        except OSError as error:
            raise ConfigError(f"cannot listen on unix:{path}: {error.strerror or error}") from None
        self._thread = Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more. A migration that is not committed is given up; one that is gets its answer first, or none."""
        self._closing = True
        with self._lock:
            if self._migration is not None:
                self._migration.cancel("the guest has ended")
        self._settled.wait()
        for sock in (self._listener.socket, *self._clients.copy()):
            try:
                sock.shutdown(socket.SHUT_RD)  # wakes the thread that waits for it; what is being answered still goes out
            except OSError:
                pass
        self._thread.join()
        self._listener.close()
        for thread in self._clients.copy().values():
            thread.join()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- clients -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.socket.accept()
            except OSError:
                if self._closing:
                    return
                self._settled.wait(0.1)  # no more fds: others may be closed soon
                continue
            if len(self._clients) >= MOST_CLIENTS:
                _answer(sock, {"ok": False, "error": f"{MOST_CLIENTS} clients are connected already"})
                sock.close()
                continue
            thread = Thread(target=self._serve, args=(sock,), name="control client", daemon=True)
            self._clients[sock] = thread
            try:
                thread.start()
            except RuntimeError:  # there are no more threads to be had
                del self._clients[sock]
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            for line in _lines(sock):
                if line is None:
                    _answer(sock, {"ok": False, "error": f"a line has at most {LONGEST_LINE} bytes"})
                    _hang_up(sock)
                    return
                for answer in self._answers(line):
                    if not _answer(sock, answer):
                        return
        except OSError:
            pass  # it has gone
        finally:
            sock.close()
            self._clients.pop(sock, None)

    def _answers(self, line: bytes) -> Iterator[dict[str, Any]]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or not isinstance(request.get("command"), str):
                raise ConfigError('a request is a JSON object such as {"command": "status"}')
            name = request.pop("command")
            if name not in COMMANDS:
                raise ConfigError(f"unknown command {name[:40]!r}: use one of {', '.join(COMMANDS)}")
            yield from getattr(self, f"_{name}_command")(**_arguments(name, request))
        except (ValueError, RecursionError, PykvmError) as error:
            said = error if isinstance(error, PykvmError) else f"the line is no JSON: {error}"
            yield {"ok": False, "error": str(said)}
        except Exception as error:  # a device's, or a mistake of ours: the client hears of it, and the guest runs on
            yield {"ok": False, "error": f"{type(error).__name__}: {error}"}

    # --- commands ----------------------------------------------------------------------------------------------------

    def _status_command(self) -> Iterator[dict[str, Any]]:
        machine = self.machine
        moved = machine.moved_to is not None
        phase = "ended" if moved else "paused" if machine.group.paused else "running" if machine.group.running else "not running"
        answer: dict[str, Any] = {
            "ok": True, "status": phase, "image": machine.info.path, "cpus": machine.cpus, "memory": machine.memory.size,
            "seconds": monotonic() - self._began, "exits": sum(machine.exit_counts().values()), "console": len(machine.console.data),
        }  # fmt: skip
        if self._migration is not None:
            answer["migration"] = {"to": self._migration.to, **self._migration.progress.as_dict(), **self._outcome}
        yield answer

    def _pause_command(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            self._check_settled()
            self.machine.pause()
        yield {"ok": True, "status": "paused"}

    def _resume_command(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            self._check_settled()
            self.machine.resume()
        yield {"ok": True, "status": "running"}

    def _power_command(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            self._check_settled()
            press, runner = self.machine.pc.power_button, self.machine.runner
            runner.post(lambda: runner.holding(press))
        yield {"ok": True}

    def _quit_command(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            if self._migration is not None and not self._settled.is_set() and not self._migration.cancel("the machine was told to quit"):
                raise ConfigError("the guest is being handed over: wait for how it ends")
            self.machine.stop("quit")
        yield {"ok": True}

    def _snapshot_command(self, dir: str) -> Iterator[dict[str, Any]]:
        with self._lock:
            self._check_settled()
            before = self.machine.group.paused
            self.machine.pause()
            try:
                self.machine.snapshot(dir)
            finally:
                if not before:
                    self.machine.resume()
        yield {"ok": True, "dir": dir}

    def _cancel_command(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            if self._migration is None or self._settled.is_set():
                raise ConfigError("no migration is on its way")
            if not self._migration.cancel():
                raise ConfigError("it is too late: the guest is being handed over")
        self._settled.wait()
        yield {"ok": True}

    def _migrate_command(
        self, to: str, downtime: float = DOWNTIME, patience: float = PATIENCE, wait: bool = False
    ) -> Iterator[dict[str, Any]]:
        if not 0 < downtime < 1e6 or not 0 < patience < 1e6:
            raise ConfigError("downtime and patience are seconds, and positive")
        path = path_of(to, "to")
        with self._lock:
            self._check_settled()
            check_not_handed_over(self.machine)
            try:
                sock = connect(path)
            except OSError as error:
                raise MigrationError(
                    f"nobody receives at {to} ({error.strerror or error}): start `pykvm receive {to}` there first"
                ) from None
            migration = self._migration = Migration(self.machine, sock, to, downtime=downtime, patience=patience)
            self._outcome = {}
            self._settled.clear()
            Thread(target=self._migrate, args=(migration,), name="migration", daemon=True).start()
        if not wait:
            yield {"ok": True, "to": to}
            return
        while not self._settled.wait(INTERVAL):
            yield {"progress": migration.progress.as_dict()}
        yield {"ok": "report" in self._outcome, **self._outcome}

    def _migrate(self, migration: Migration) -> None:
        try:
            self._outcome = {"report": migration.run()}
        except MigrationError as error:
            self._outcome = {"error": str(error), "uncertain": error.uncertain}
        except BaseException as error:
            self._outcome = {"error": f"{type(error).__name__}: {error}", "uncertain": migration.progress.phase == "uncertain"}
        finally:
            if "error" in self._outcome:
                self._say(self._outcome["error"] if self._outcome["uncertain"] else f"no migration: {self._outcome['error']}")
            self._settled.set()

    def _check_settled(self) -> None:
        if self._closing:
            raise ConfigError("the machine has ended")
        if not self._settled.is_set():
            raise ConfigError("the guest is on its way to somewhere else: cancel that first, or wait")
        if self.machine.moved_to is not None:
            raise ConfigError(f"the guest has moved to {self.machine.moved_to}")


_ARGUMENTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "snapshot": {"dir": str},
    "migrate": {"to": str, "downtime": (int, float), "patience": (int, float), "wait": bool},
}
_NEEDED = {"snapshot": "dir", "migrate": "to"}


def _arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a command may be given, checked."""
    known = _ARGUMENTS.get(name, {})
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{name} takes no {key[:40]!r}: {', '.join(known) or 'it takes nothing'}")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            raise ConfigError(f"{name}: {key} has the wrong type")
    if name in _NEEDED and _NEEDED[name] not in given:
        raise ConfigError(f"{name} needs {_NEEDED[name]!r}")
    return given


def _lines(sock: socket.socket) -> Iterator[bytes | None]:
    """Lines as they come; None for one that is too long, and then no more."""
    waiting = bytearray()
    while True:
        data = sock.recv(4096)
        if not data:
            return
        waiting += data
        while (end := waiting.find(b"\n")) >= 0:
            line = bytes(waiting[:end])
            del waiting[: end + 1]
            if line.strip():
                yield line
        if len(waiting) > LONGEST_LINE:
            yield None
            return


def _hang_up(sock: socket.socket) -> None:
    """Say no more, and read for a moment what still comes: to a client that is still sending, the answer would be lost else."""
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(1.0)
    for _ in range(64):
        if not sock.recv(65536):
            return


def _answer(sock: socket.socket, answer: dict[str, Any]) -> bool:
    """Send one; False: the client has gone, or does not read."""
    try:
        sock.settimeout(SEND_PATIENCE)
        sock.sendall(json.dumps(answer).encode() + b"\n")
        sock.settimeout(None)
    except OSError:
        return False
    return True


class ControlClient:
    """The other end: ``client.ask("status")`` gives the answer. A context manager. Raises ConfigError: nobody listens there."""

    def __init__(self, where: str) -> None:
        path = where.removeprefix("unix:")
        try:
            self._sock = connect(path)
        except OSError as error:
            raise ConfigError(
                f"no machine answers at {where} ({error.strerror or error}): was it started with --control unix:{path}?"
            ) from None
        self._sock.settimeout(None)
        self._file = self._sock.makefile("rb")

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One request, one answer. Raises ConfigError with the machine's own words where it refuses."""
        self.send(command, **arguments)
        return self.answer()

    def send(self, command: str, **arguments: Any) -> None:
        """A request, whose answers answer() gives."""
        try:
            self._sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"the machine has gone: {error.strerror or error}") from None

    def answer(self) -> dict[str, Any]:
        """The next line, which must not be a refusal."""
        answer = self.line()
        if answer.get("ok") is False:
            raise ConfigError(str(answer.get("error")))
        return answer

    def line(self) -> dict[str, Any]:
        """The next line. Raises ConfigError: the machine has gone."""
        try:
            line = self._file.readline()
            answer = json.loads(line) if line else None
        except (OSError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            raise ConfigError("the machine has gone")
        return answer

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._sock.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
