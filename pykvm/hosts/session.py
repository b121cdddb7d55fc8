"""A booted host: commands, files, and an end that always comes.

The emulator runs under a small shell that kills it when our end of a pipe closes, so it goes when pykvm goes, however that happens; and
when both are gone, a second shell removes the session's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from pykvm.errors import ConfigError, HostError
from pykvm.hosts import wire
from pykvm.hosts.debian import fetch
from pykvm.hosts.emulators import Plan, model_named
from pykvm.hosts.image import compile_folder, initramfs, root_image
from pykvm.units import MIB, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["Completed", "Host", "boot"]

EXCHANGE = 1 << 30
LEAST_MEMORY = 256 * MIB
CYLINDER = 16 * 63 * 512
# Skylake-X in Bochs: Linux turns XSAVE off ("XSAVE consistency problem") unless it does not see XSAVEC and XSAVES.
BOCHS_OPTIONS = "clearcpuid=321,323"
BASE_OPTIONS = "console=ttyS0 panic=-1 quiet random.trust_cpu=on nokaslr"
# Our pipe is its stdin. Either the emulator ends, or the pipe does and everything in this process group is killed. (A shell gives
# background commands /dev/null for stdin, hence fd 3.)
_SUPERVISOR = 'exec 3<&0; (cat <&3 >/dev/null; kill -9 0) & "$@"; status=$?; kill $! 2>/dev/null; exit $status'
# Its stdin is a pipe that we, the supervisor and the emulator hold: it ends when all of them have, so nobody writes to the folder then.
_SWEEPER = 'read -r nothing; rm -rf -- "$1"'


class Completed:
    """A command that ran in a host: ``returncode``, ``stdout`` and ``stderr`` as text."""

    def __init__(self, command: list[str], returncode: int, stdout: bytes, stderr: bytes) -> None:
        self.command, self.returncode = command, returncode
        self.stdout, self.stderr = stdout.decode(errors="replace"), stderr.decode(errors="replace")

    def __repr__(self) -> str:
        return f"<Completed {self.command!r} status {self.returncode}>"


@contextlib.contextmanager
def boot(
    cpu: str = "intel",
    *,
    paging: str = "on",
    memory: int | str = "1536M",
    cpus: int = 1,
    append: str = "",
    timeout: float = 600,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Host]:
    """Boot an emulated host and wait until it takes commands.

    ``cpu``: "amd", "intel" or a model (`pykvm host list`). ``paging``: EPT/NPT "on" or "off". ``memory``: bytes or "1536M". ``append``:
    further kernel options. ``timeout``: seconds for the boot. ``progress`` is told what happens. Raises HostError.
    """
    if paging not in ("on", "off"):
        raise ConfigError(f"paging={paging!r}: use on or off")
    size = parse_size(memory)
    if size < LEAST_MEMORY:
        raise ConfigError(f"{memory} is too little for a host: Linux, Python and a guest need {LEAST_MEMORY // MIB}M")
    host = Host(cpu, paging, size, cpus, append, progress or (lambda text: None))
    try:
        host.start(timeout)
        yield host
    finally:
        host.close()


class Host:
    """See ``boot()``, which makes and ends one."""

    def __init__(self, cpu: str, paging: str, memory: int, cpus: int, append: str, progress: Callable[[str], None]) -> None:
        self.cpu, self.paging, self.progress = cpu, paging, progress
        self.emulator, self.model = model_named(cpu)
        self._memory, self._cpus, self._append = memory, cpus, append
        self.folder = Path(tempfile.mkdtemp(prefix="pykvm-host-")).absolute()
        end, self._held = os.pipe()
        self._sweeper = subprocess.Popen(["sh", "-c", _SWEEPER, "sh", str(self.folder)], stdin=end, start_new_session=True)
        os.close(end)
        self._token = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._decoder = wire.Decoder()
        self._frames: list[tuple[int, bytes]] = []

    # --- boot --------------------------------------------------------------------------------------------------------

    def start(self, timeout: float) -> None:
        """Prepare, boot, wait for the agent, send pykvm over."""
        self.progress("kernel")
        kernel = fetch()
        self.progress("root image")
        root, initrd = root_image(), initramfs(kernel)
        exchange = self.folder / "exchange.img"
        with open(exchange, "wb") as disk:
            disk.write(wire.exchange_header(self._token))
            disk.truncate(-(-EXCHANGE // CYLINDER) * CYLINDER)
        extra = BOCHS_OPTIONS if self.emulator.name == "Bochs" else ""
        # Bochs' CD is cached by the options, so they hold nothing that differs each time.
        options = " ".join(f"{BASE_OPTIONS} pykvm.paging={self.paging} {extra} {self._append}".split())
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(16)
            plan = Plan(self.folder, kernel, initrd, root, exchange, options, self._memory, self._cpus, listener.getsockname()[1])
            command = self.emulator.command(self.model, plan)
            self.progress(f"starting {self.emulator.name}, model {self.model}")
            self._launch(command)
            self.progress("booting")
            self.kernel = self._await_agent(listener, time.monotonic() + timeout)
        self.progress(f"Linux {self.kernel} is up")
        self._send_pykvm()

    def _launch(self, command: list[str]) -> None:
        stay, self._pipe = os.pipe()
        try:
            with open(self.folder / "emulator.log", "wb") as log:
                self._process = subprocess.Popen(
                    ["sh", "-c", _SUPERVISOR, "sh", *command],
                    stdin=stay,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[self._held],
                    env={**os.environ, "TMPDIR": str(self.folder)},  # QEMU would leave its snapshot file elsewhere when it is killed
                )
        finally:
            os.close(stay)

    def _await_agent(self, listener: socket.socket, deadline: float) -> str:
        """Until a connection shows the token in its READY: that one is the line. Returns the host's kernel.

        Every user of this machine can connect to the port. Whoever does not know the token is closed, or never listened to.
        """
        strangers: dict[socket.socket, wire.Decoder] = {}
        try:
            while True:
                ready, _, _ = select.select([listener, *strangers], [], [], 0.2)
                if not ready or ready == [listener]:
                    self._check_alive(deadline)
                for connection in ready:
                    if connection is listener:
                        strangers[listener.accept()[0]] = wire.Decoder()
                        continue
                    kernel = self._introduction(connection, strangers[connection])
                    if kernel is None:
                        continue
                    decoder = strangers.pop(connection)
                    if kernel:
                        self._line, self._decoder = connection, decoder
                        return kernel
                    connection.close()
        finally:
            for connection in strangers:
                connection.close()

    def _introduction(self, connection: socket.socket, decoder: wire.Decoder) -> str | None:
        """The kernel's version from a READY with the token; "" for a stranger or a closed connection; None if there is no frame yet."""
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            return ""
        for kind, payload in decoder.feed(data):
            ready = wire.decode_json(payload)
            if kind == wire.READY and secrets.compare_digest(str(ready.get("token")).encode(), self._token.encode()):
                return str(ready.get("kernel"))
            return ""
        return None

    def _send_pykvm(self) -> None:
        """This very pykvm, so that what is tested is what is here; compiled, since an emulated CPU takes seconds for that."""
        package = self.folder / "pykvm"
        shutil.copytree(Path(__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
        compile_folder(package)
        self._put_tar(lambda archive: archive.add(package, "pykvm"))

    # --- the line ----------------------------------------------------------------------------------------------------

    def _next_frame(self, deadline: float) -> tuple[int, bytes]:
        assert self._line is not None
        self._line.settimeout(0.2)
        while not self._frames:
            self._check_alive(deadline)
            try:
                data = self._line.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                time.sleep(0.2)  # let the emulator's own end be the error that is told
                self._check_alive(deadline)
                raise self._error("the emulator closed the serial line")
            self._frames.extend(self._decoder.feed(data))
        return self._frames.pop(0)

    def _check_alive(self, deadline: float) -> None:
        assert self._process is not None
        console = self.console()
        for sign, why in (
            ("Kernel panic", "the host's kernel panicked"),
            ("pykvm-host: ", "the host could not be set up: " + console.partition("pykvm-host: ")[2].partition("\n")[0].strip()),
        ):
            if sign in console:
                raise self._error(why)
        if self._process.poll() is not None:
            raise self._error(f"{self.emulator.name} ended with status {self._process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError

    def console(self, lines: int = 0) -> str:
        """What the host's kernel has printed; the last ``lines`` if given."""
        try:
            text = (self.folder / "console.log").read_text(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:]) if lines else text

    def _error(self, why: str) -> HostError:
        try:
            said = (self.folder / "emulator.log").read_text(errors="replace").splitlines()[-5:]
        except FileNotFoundError:
            said = []
        return HostError(f"{self.cpu} host: {why}", "\n".join([self.console(20), *said]).strip())

    def _send(self, frame: bytes) -> None:
        assert self._line is not None
        self._line.settimeout(60)
        try:
            self._line.sendall(frame)
        except OSError as error:
            raise self._error(f"the serial line broke: {error}") from None

    def _request(self, request: dict[str, Any], timeout: float, on_output: Callable[[int, bytes], None] | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        self._send(wire.encode_json(wire.COMMAND, request))
        while True:
            kind, payload = self._next_frame(deadline)
            if kind == wire.RESULT:
                answer = wire.decode_json(payload)
                if "error" in answer:
                    raise self._error(str(answer["error"]))
                return answer
            if kind in (wire.STDOUT, wire.STDERR) and on_output is not None:
                on_output(kind, payload)

    # --- what it is for ----------------------------------------------------------------------------------------------

    def run(
        self,
        command: list[str],
        *,
        timeout: float = 600,
        env: dict[str, str] | None = None,
        on_output: Callable[[bytes, bool], None] | None = None,
    ) -> Completed:
        """Run a command in the host, below /host. ``on_output(data, is_stderr)`` streams.

        When ``timeout`` seconds pass the command is killed and TimeoutError raised. Its own failure is not an error: see returncode.
        """
        out = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}

        def take(kind: int, data: bytes) -> None:
            out[kind] += data
            if on_output is not None:
                on_output(data, kind == wire.STDERR)

        request = {"op": "run", "command": command, "env": env or {}}
        try:
            answer = self._request(request, timeout, take)
        except TimeoutError:
            self._send(wire.encode(wire.KILL, b""))
            with contextlib.suppress(TimeoutError):
                while self._next_frame(time.monotonic() + 60)[0] != wire.RESULT:
                    pass
            raise TimeoutError(f"{' '.join(command)} was still running after {timeout:g} s in the {self.cpu} host") from None
        return Completed(command, int(answer["status"]), bytes(out[wire.STDOUT]), bytes(out[wire.STDERR]))

    def put(self, path: str | os.PathLike[str], name: str | None = None, *, bytecode: bool = False) -> None:
        """Copy a file or folder to /host/``name`` (by default its own name); __pycache__ folders too if ``bytecode``."""
        source = Path(path)
        if not source.exists():
            raise HostError(f"{source} does not exist")
        self._put_tar(lambda archive: archive.add(source, name or source.resolve().name, filter=None if bytecode else _no_caches))

    def _put_tar(self, fill: Callable[[tarfile.TarFile], None]) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            fill(archive)
        data = packed.getvalue()
        if len(data) > (room := wire.OUTBOX - wire.INBOX):
            raise HostError(f"{len(data)} bytes do not fit on the exchange disk, which takes {room} at a time")
        try:
            with open(self.folder / "exchange.img", "r+b") as disk:
                disk.seek(wire.INBOX)
                disk.write(data)
        except OSError as error:
            raise HostError(f"the exchange disk cannot be written: {error.strerror}: is {self.folder.parent} full?") from None
        self._answered({"op": "put", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}, "copying files in")

    def get(self, path: str, target: str | os.PathLike[str] = ".") -> None:
        """Copy a file or folder from the host (relative to /host) into the folder ``target``."""
        answer = self._answered({"op": "get", "path": path}, f"copying {path} out")
        with open(self.folder / "exchange.img", "rb") as disk:
            disk.seek(wire.OUTBOX)
            data = disk.read(int(answer["size"]))
        if hashlib.sha256(data).hexdigest() != answer["sha256"]:
            raise self._error(f"{path} came over damaged (checksum)")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(target, filter="data")

    def _answered(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        try:
            return self._request(request, 300)
        except TimeoutError:
            raise self._error(f"no answer for 300 s while {what}") from None

    def reload(self, paging: str) -> None:
        """Load the vendor module again with EPT/NPT "on" or "off"."""
        done = self.run(["pykvm-load-kvm", paging])
        if done.returncode:
            raise self._error(f"the vendor module does not load with paging {paging}: {done.stderr.strip()}")
        self.paging = paging

    def close(self) -> None:
        """Switch it off."""
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._pipe)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._sweeper.kill()
        self._sweeper.wait()
        os.close(self._held)

    def __repr__(self) -> str:
        return f"<Host {self.cpu} ({self.emulator.name}, {self.model}), paging {self.paging}, {self._memory // MIB}M>"


def _no_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member
