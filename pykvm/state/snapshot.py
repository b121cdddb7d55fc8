"""Snapshot files: a machine's state and memory in a directory.

| file                  |                                                                                                  |
|-----------------------|--------------------------------------------------------------------------------------------------|
| state.json            | a line that says format, length and CRC-32C of the next; then the state and the memory's checksums |
| memory-0, memory-1 ...  | each memory slot, byte for byte, sparse: zero pages take no room                                |

**Writing** goes to a directory of another name beside it; all is fsynced, then the two names change places (RENAME_EXCHANGE) and the old
one is deleted. Whoever dies at any moment leaves the old snapshot or the new one; what is left over is deleted by the next who saves there.

**Reading** maps the memory files copy-on-write: what the guest does not touch is never read. ``verify`` reads them all first and compares
the checksums, one for each MiB: a flipped bit is refused before the guest runs. Without it, only sizes and state.json are checked. While a
machine restored from it lives, a memory file must not be written to; deleting or replacing the snapshot is all right.
"""

from __future__ import annotations

import os

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError, PykvmError, StateError
from pykvm.memory import GuestMemory
from pykvm.state.machinestate import LARGEST, MachineState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.memory import MemSlot

__all__ = ["FORMAT", "open_snapshot", "read_state", "write_snapshot"]

FORMAT = 1
STATE = "state.json"
_SAVING = ".saving-"
# Who restores one snapshot again and again, for grading or fuzzing, has its text checked once: a MachineState is not changed.
_last: tuple[str, bytes, MachineState, list[bytes]] | None = None
_KEPT = 1 << 20  # bytes of text, at most; consoles can be long


# --- writing ---------------------------------------------------------------------------------------------------------


def write_snapshot(machine: Machine, directory: str | os.PathLike[str]) -> MachineState:
    """Save a machine that stands still in ``directory``, which is made, or replaced if it is a snapshot. Returns the state.

    Raises ConfigError for a directory that is something else, StateError when it cannot be written; an old snapshot is whole then.
    """
    target = os.path.abspath(directory)
    if os.path.lexists(target) and not os.path.isfile(os.path.join(target, STATE)):
        raise ConfigError(f"{directory} is there, and no snapshot: name a directory that is one, or not there yet")
    state = machine.save()
    parent, name = os.path.split(target)
    try:
        _clear_leftovers(parent, name)
        temporary = _make_temporary(parent, name)
        holds = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock(holds)
            _write(temporary, state, machine.memory.slots)
            os.fsync(holds)
            _put_in_place(temporary, target)
            _sync(parent)
            _delete(temporary)
        except BaseException:
            _delete(temporary)
            raise
        finally:
            os.close(holds)
    except OSError as error:
        if isinstance(error, PykvmError):
            raise
        raise StateError(os.fspath(directory), f"the snapshot cannot be written: {error.strerror}") from error
    return state


def _write(directory: str, state: MachineState, slots: tuple[MemSlot, ...]) -> None:
    from json import dumps

    sums = []
    for number, slot in enumerate(slots):
        fd = os.open(os.path.join(directory, f"memory-{number}"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(fd, slot.size)
            chunks = ffi.new("uint32_t[]", -(-slot.size // lib.PYKVM_CHUNK))
            done = lib.pykvm_save_pages(fd, ffi.cast("uint8_t *", slot.hva), slot.size, chunks, slot.file)
            if done < 0:
                raise OSError(-done, os.strerror(-done))
            os.fsync(fd)
        finally:
            os.close(fd)
        sums.append(bytes(ffi.buffer(chunks)).hex())
    body = b'{"memory":' + dumps(sums).encode() + b',"state":' + state.to_json().encode() + b"}"
    head = dumps({"pykvm snapshot": FORMAT, "bytes": len(body), "crc32c": lib.pykvm_crc32c(0, body, len(body))}).encode()
    fd = os.open(os.path.join(directory, STATE), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(head + b"\n" + body)
        file.flush()
        os.fsync(fd)


def _make_temporary(parent: str, name: str) -> str:
    from tempfile import mkdtemp

    return mkdtemp(prefix=f".{name}{_SAVING}", dir=parent)


def _lock(fd: int, *, wait: bool = True) -> bool:
    """Who writes a temporary directory holds it: another who saves there leaves it alone."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _put_in_place(temporary: str, target: str) -> None:
    if not os.path.lexists(target):
        os.rename(temporary, target)
        return
    error = lib.pykvm_exchange(os.fsencode(temporary), os.fsencode(target))
    if error:
        raise OSError(-error, f"this file system cannot exchange two directories ({os.strerror(-error)}): name one that is not there yet")


def _delete(directory: str) -> None:
    from shutil import rmtree

    rmtree(directory, ignore_errors=True)


def _clear_leftovers(parent: str, name: str) -> None:
    """What saves that were killed have left."""
    for entry in os.listdir(parent):
        if entry.startswith(f".{name}{_SAVING}"):
            path = os.path.join(parent, entry)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if _lock(fd, wait=False):
                    _delete(path)
            finally:
                os.close(fd)


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_state(directory: str | os.PathLike[str]) -> tuple[MachineState, list[bytes]]:
    """(state, checksums of each slot's memory). Raises StateError with the reason."""
    path = os.path.join(directory, STATE)
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.read(min(os.fstat(file.fileno()).st_size, LARGEST) + 1) or b""
    except OSError as error:
        raise StateError(os.fspath(directory), f"it is no snapshot: {STATE} cannot be read ({error.strerror})") from None
    global _last
    last = _last
    if last is None or last[0] != path or last[1] != text:
        last = (path, text, *_parsed(path, text))
        if len(text) <= _KEPT:
            _last = last
    return last[2], last[3]


def _parsed(path: str, text: bytes) -> tuple[MachineState, list[bytes]]:
    from json import loads

    head, _, body = text.partition(b"\n")
    try:
        about = loads(head)
        format, size, crc = (int(about[key]) for key in ("pykvm snapshot", "bytes", "crc32c"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StateError(path, "its first line is not that of a snapshot") from None
    if format != FORMAT:
        raise StateError(path, f"it has format {format}, this pykvm knows {FORMAT}: use the pykvm that made it, or a newer one")
    if size != len(body):
        raise StateError(path, f"it should have {size} bytes after its first line, and has {len(body)}: it is truncated, or damaged")
    if crc != lib.pykvm_crc32c(0, body, len(body)):
        raise StateError(path, "its checksum is wrong: it is damaged")
    try:
        tree = loads(body)
        sums = [bytes.fromhex(text) for text in tree["memory"]]
        state = MachineState.of_json_tree(tree["state"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StateError(path, "it is not what a snapshot has") from None
    if len(sums) != len(state.slots) or any(
        len(chunks) != 4 * -(-slot["size"] // lib.PYKVM_CHUNK) for chunks, slot in zip(sums, state.slots, strict=True)
    ):
        raise StateError(path, "its checksums are not those of its memory slots")
    return state, sums


def open_snapshot(directory: str | os.PathLike[str], *, verify: bool = True) -> tuple[MachineState, GuestMemory]:
    """The state and its memory, mapped copy-on-write. ``verify``: read all of the memory and compare its checksums.

    Raises StateError: no snapshot, truncated, damaged, of a later format.
    """
    state, sums = read_state(directory)
    memory = GuestMemory()
    try:
        for number, (slot, chunks) in enumerate(zip(state.slots, sums, strict=True)):
            path = os.path.join(directory, f"memory-{number}")
            fd = _checked_file(path, slot["size"], chunks if verify else None)
            try:
                memory.add_private(slot["gpa"], slot["size"], fd, readonly=slot["readonly"])
            finally:
                os.close(fd)
    except BaseException as error:
        memory.close()
        if isinstance(error, ConfigError):
            raise StateError(os.fspath(directory), str(error)) from None
        raise
    return state, memory


def _checked_file(path: str, size: int, sums: bytes | None) -> int:
    """A memory file, open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(path, f"it cannot be read: {error.strerror}") from None
    try:
        have = os.fstat(fd).st_size
        if have != size:
            raise StateError(path, f"it should have {size} bytes, and has {have}: it is truncated, or not of this snapshot")
        if sums is not None:
            bad = lib.pykvm_check_pages(fd, size, ffi.from_buffer("uint32_t[]", sums))
            if bad >= 0:
                at = bad * lib.PYKVM_CHUNK
                raise StateError(path, f"the checksum of the MiB from byte {at:#x} is wrong: it is damaged")
            if bad < -1:
                raise StateError(path, f"it cannot be read: {os.strerror(-bad - 1)}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def describe(state: MachineState) -> dict[str, Any]:
    """What a snapshot is of, for people and scripts."""
    m = state.machine
    return {
        "image": m["image"],
        "cpus": m["cpus"],
        "irqchip": m["irqchip"],
        "platform": m["platform"],
        "memory": sum(slot["size"] for slot in state.slots),
        "rip": [vcpu["regs"]["rip"] for vcpu in state.vcpus],
        "console_bytes": len(state.console["data"]) // 2,
        "host": state.host["vendor"],
    }
