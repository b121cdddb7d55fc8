"""Runs inside an emulated host as its only process of note: takes commands from the second serial port, sends back what they do.

Standard library and wire.py only; started by the initramfs (image.py) as ``python agent.py TTY DISK``.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import termios
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.hosts import wire
else:
    import wire  # it lies beside this file there

BLKFLSBUF = 0x1261  # <linux/fs.h>: forget what the page cache holds of a block device
HOME = "/host"


class Agent:
    """The loop: one command at a time."""

    def __init__(self, line: int, disk: str) -> None:
        self.line, self.disk = line, disk
        self.decoder = wire.Decoder()

    def send(self, frame: bytes) -> None:
        """All of it."""
        while frame:
            frame = frame[os.write(self.line, frame) :]

    def serve(self) -> None:
        """Until the machine is switched off."""
        while True:
            for kind, payload in self.decoder.feed(os.read(self.line, 4096)):
                if kind == wire.COMMAND:
                    self.carry_out(wire.decode_json(payload))

    def carry_out(self, request: dict[str, object]) -> None:
        """One request, one RESULT."""
        try:
            operation = {"run": self.run, "put": self.put, "get": self.get}[str(request.get("op"))]
            answer = operation(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.send(wire.encode_json(wire.RESULT, answer))

    def run(self, request: dict[str, object]) -> dict[str, object]:
        """A command, its output streamed, its status in the result (128 + n for signal n)."""
        environment = {**os.environ, **request.get("env", {})}  # type: ignore[dict-item]
        try:
            process = subprocess.Popen(
                request["command"],  # type: ignore[call-overload]
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=HOME,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self.send(wire.encode(wire.STDERR, f"{error}\n".encode()))
            return {"status": 127 if isinstance(error, FileNotFoundError) else 126}
        kinds = {process.stdout.fileno(): wire.STDOUT, process.stderr.fileno(): wire.STDERR}
        killed = False
        while kinds:
            ready, _, _ = select.select([*kinds, self.line], [], [])
            for fd in ready:
                if fd == self.line:
                    for kind, _ in self.decoder.feed(os.read(fd, 4096)):
                        if kind == wire.KILL:
                            killed = True
                            os.killpg(process.pid, signal.SIGKILL)
                    continue
                data = os.read(fd, 16384)
                if data:
                    self.send(wire.encode(kinds[fd], data))
                else:
                    del kinds[fd]
        code = process.wait()
        return {"status": 128 - code if code < 0 else code, "killed": killed}

    def put(self, request: dict[str, object]) -> dict[str, object]:
        """A tar from the exchange disk is unpacked below HOME."""
        with open(self.disk, "rb", buffering=0) as disk:
            fcntl.ioctl(disk, BLKFLSBUF)
            disk.seek(wire.INBOX)
            data = self._read(disk, int(request["size"]))  # type: ignore[call-overload]
        if hashlib.sha256(data).hexdigest() != request["sha256"]:
            return {"error": "the files came over damaged (checksum)"}
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(HOME, filter="data")
        return {"status": 0}

    def get(self, request: dict[str, object]) -> dict[str, object]:
        """A file or folder goes as a tar to the outbox on the exchange disk."""
        path = os.path.join(HOME, str(request["path"]))
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(path, arcname=os.path.basename(path.rstrip("/")))
        data = packed.getvalue()
        with open(self.disk, "r+b", buffering=0) as disk:
            if wire.OUTBOX + len(data) > disk.seek(0, os.SEEK_END):
                return {"error": f"{path} has {len(data)} bytes: the exchange disk is full"}
            disk.seek(wire.OUTBOX)
            padded = data + bytes(-len(data) % 4096)
            while padded:
                padded = padded[disk.write(padded) :]
            os.fsync(disk.fileno())
        return {"status": 0, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    @staticmethod
    def _read(disk: io.RawIOBase, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = disk.read(min(1 << 20, -(-(size - len(data)) // 4096) * 4096))
            if not piece:
                raise OSError("the exchange disk ends early")
            data += piece
        return bytes(data[:size])


def main() -> None:
    """Open the line, say READY, serve."""
    device, disk = sys.argv[1:3]
    with open(disk, "rb", buffering=0) as exchange:
        token = wire.token_of(exchange.read(4096))
    line = os.open(device, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    attributes = termios.tcgetattr(line)
    attributes[4] = attributes[5] = termios.B115200
    termios.tcsetattr(line, termios.TCSANOW, attributes)
    os.makedirs(HOME, exist_ok=True)
    agent = Agent(line, disk)
    agent.send(wire.encode(wire.READY, json.dumps({"token": token, "kernel": os.uname().release}).encode()))
    agent.serve()


if __name__ == "__main__":
    main()
