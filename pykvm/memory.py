"""Guest physical memory: slots of host memory at guest physical addresses, every access checked.

``GuestMemory`` needs no KVM: devices and loaders take it, unit tests build it from thin air, and ``VM.add_memory`` hands its
slots to KVM_SET_USER_MEMORY_REGION (api.rst 4.35). A gpa comes from the guest and is never trusted.
"""

from __future__ import annotations

import mmap
import os
from _bisect import bisect_right
from _weakref import ref

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError, GuestMemoryError, MemSlotError
from pykvm.lifetime import Closes
from pykvm.platform import MMIO_HOLE, MMIO_HOLE_END
from pykvm.units import MIB, PAGE_SIZE, format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    import numpy as np
    from numpy.typing import DTypeLike

    from pykvm.hostwrites import HostWrites

    Backing = Literal["anonymous", "memfd", "hugetlb"]
    Buffer = bytes | bytearray | memoryview

__all__ = ["GuestMemory", "MemSlot"]

MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; Python 3.11 names neither
MAP_HUGETLB = 0x40000
HUGE_PAGE = 2 << 20
GPA_LIMIT = 1 << 52


class MemSlot:
    """One memslot: ``size`` bytes of host memory at guest physical address ``gpa``.

    ``id`` numbers it within its GuestMemory, ``backing`` says where the bytes come from ("anonymous", "memfd", "hugetlb", "private"
    for copy-on-write of a saved or shared memory, or a path),
    ``readonly`` that a guest's write exits as MMIO (KVM_CAP_READONLY_MEM), ``hva`` its host virtual address, ``fd`` the memfd, which
    another process may map too, of "private" memory the file, else -1.
    """

    __slots__ = ("_closing", "_users", "backing", "fd", "gpa", "hva", "id", "map", "readonly", "size")

    def __init__(self, id: int, gpa: int, size: int, backing: str, readonly: bool, map: mmap.mmap, fd: int) -> None:
        self._users, self._closing = 0, False
        self.id, self.gpa, self.size = id, gpa, size
        self.backing, self.readonly, self.map, self.fd = backing, readonly, map, fd
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(map)))

    @property
    def file(self) -> int:
        """For native/state.c: the file that this is a private mapping of, or what else is known of its pages."""
        return self.fd if self.backing == "private" else lib.PYKVM_ANONYMOUS if self.backing == "anonymous" else lib.PYKVM_ALL

    def retain(self) -> None:
        """A VM has it: the mapping must stay."""
        self._users += 1

    def release(self) -> None:
        """A VM has let go of it."""
        self._users -= 1
        if self._closing:
            self.close()

    def close(self) -> None:
        """Unmap it, as soon as no VM and no numpy view uses it."""
        self._closing = True
        if self._users:
            return
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        try:
            self.map.close()
        except BufferError:
            pass  # a numpy view still uses it: the mapping goes with the last reference

    def __repr__(self) -> str:
        flags = " readonly" if self.readonly else ""
        return f"<MemSlot {self.id}: gpa {self.gpa:#x}-{self.gpa + self.size - 1:#x} {format_size(self.size)} {self.backing}{flags}>"


class GuestMemory(Closes):
    """The guest's physical memory, a context manager.

    >>> ram = GuestMemory.of_size("16M")           # a slot at 0, and one above 4 GiB when it reaches the MMIO hole
    >>> ram.write_u32(0x1000, 0xdeadbeef)
    >>> ram.view(0x1000, 1, "u4")                  # numpy, no copy
    array([3735928559], dtype=uint32)

    Reads and writes may cross from one slot into the next when they touch. Every method that takes a gpa raises
    GuestMemoryError when any byte of the access has no slot.
    """

    def __init__(self) -> None:
        self._slots: list[MemSlot] = []
        self._starts: list[int] = []
        self._views: dict[int, tuple[ref[Any], MemSlot, int, int]] = {}  # that are alive, and what each covers
        self._log: HostWrites | None = None
        self._log_yields = False

    @classmethod
    def of_size(cls, size: int | str, backing: Backing = "anonymous") -> GuestMemory:
        """RAM from gpa 0: ``size`` in bytes or as "16M"; what passes 3 GiB continues at 4 GiB, as on a PC."""
        total = parse_size(size)
        _check_host_has(total)
        memory = cls()
        try:
            memory.add(0, min(total, MMIO_HOLE), backing)
            if total > MMIO_HOLE:
                memory.add(MMIO_HOLE_END, total - MMIO_HOLE, backing)
        except BaseException:
            memory.close()
            raise
        return memory

    # --- slots -------------------------------------------------------------------------------------------------------

    def add(
        self,
        gpa: int,
        size: int,
        backing: Backing | os.PathLike[str] = "anonymous",
        *,
        shared: bool = False,
        readonly: bool = False,
        offset: int = 0,
    ) -> MemSlot:
        """Map ``size`` bytes at ``gpa``.

        ``backing``: "anonymous", "memfd" (shared: the slot's ``fd`` can be passed to another process), "hugetlb" (2 MiB pages, which the
        administrator has to reserve) or the path of a file, from byte ``offset``: copy-on-write, or written through with
        ``shared=True``. ``readonly``: the guest cannot write. Raises MemSlotError (not page aligned, overlap) and
        ConfigError (more than the host has, no such file).
        """
        if size <= 0:
            raise MemSlotError(f"a memory slot of {size} bytes cannot be: give at least one page, such as 16M")
        if gpa % PAGE_SIZE or size % PAGE_SIZE or gpa < 0:
            raise MemSlotError(f"gpa {gpa:#x} and size {size:#x} must be multiples of the page size ({PAGE_SIZE})")
        if gpa + size > GPA_LIMIT:
            raise MemSlotError(f"gpa {gpa:#x} + {format_size(size)} is beyond 52 bits, the most a guest physical address has")
        taken = set()
        for other in self._slots:
            taken.add(other.id)
            if gpa < other.gpa + other.size and other.gpa < gpa + size:
                raise MemSlotError(f"gpa {gpa:#x}-{gpa + size - 1:#x} overlaps {other!r}: move one of the two, or make it smaller")
        mapping, fd = _map(size, backing, shared, readonly, offset)
        number = 0
        while number in taken:
            number += 1
        slot = MemSlot(number, gpa, size, os.fspath(backing), readonly, mapping, fd)
        at = bisect_right(self._starts, gpa)
        self._slots.insert(at, slot)
        self._starts.insert(at, gpa)
        return slot

    def remove(self, slot: MemSlot) -> None:
        """Unmap a slot. VMs that have it (VM.remove_slot takes it away) and views into it keep its bytes alive."""
        at = self._slots.index(slot)
        del self._slots[at], self._starts[at]
        slot.close()

    def add_private(self, gpa: int, size: int, fd: int, *, readonly: bool = False) -> MemSlot:
        """A slot whose bytes are those of the file ``fd`` until one side writes: copy-on-write. The fd is the caller's."""
        slot = self.add(gpa, size, readonly=readonly)
        self.make_private(slot, fd)
        return slot

    def make_private(self, slot: MemSlot, fd: int) -> None:
        """The content of the file ``fd`` in place of the slot's own, at the same address, copy-on-write."""
        error = lib.pykvm_remap_private(slot.hva, slot.size, fd)
        if error:
            raise ConfigError(f"{slot!r} cannot be mapped: {os.strerror(-error)}")
        slot.backing = "private"
        if slot.fd >= 0:
            os.close(slot.fd)
        slot.fd = os.dup(fd)

    def replace(self, slot: MemSlot) -> MemSlot:
        """Other host memory with the same content for an anonymous or memfd ``slot``: same id, gpa and size, another hva.

        Views of the old memory see the guest no more. KVM has to be told (Machine.move_slot).
        """
        if slot.backing not in ("anonymous", "memfd", "hugetlb", "private"):
            raise ConfigError(f"{slot!r} is a mapped file: its content belongs where it is")
        backing = "anonymous" if slot.backing == "private" else slot.backing
        mapping, fd = _map(slot.size, backing, False, slot.readonly, 0)
        mapping[:] = slot.map[:]
        new = MemSlot(slot.id, slot.gpa, slot.size, backing, slot.readonly, mapping, fd)
        self._slots[self._slots.index(slot)] = new
        slot.close()
        return new

    @property
    def slots(self) -> tuple[MemSlot, ...]:
        """The slots by rising gpa."""
        return tuple(self._slots)

    @property
    def size(self) -> int:
        """Bytes in all slots."""
        return sum(slot.size for slot in self._slots)

    @property
    def ram_size(self) -> int:
        """Bytes in the slots that the guest can write."""
        return sum(slot.size for slot in self._slots if not slot.readonly)

    def find(self, gpa: int) -> MemSlot | None:
        """The slot that backs the byte at ``gpa``."""
        at = bisect_right(self._starts, gpa) - 1
        if at < 0:
            return None
        slot = self._slots[at]
        return slot if gpa - slot.gpa < slot.size else None

    def contains(self, gpa: int, size: int) -> bool:
        """Whether slots back all of [gpa, gpa + size)."""
        if size < 0:
            return False
        while size > 0:
            slot = self.find(gpa)
            if slot is None:
                return False
            step = slot.gpa + slot.size - gpa
            gpa, size = gpa + step, size - step
        return True

    def is_writable(self, gpa: int, size: int) -> bool:
        """Whether the guest could write all of [gpa, gpa + size): what a device does for it has to ask."""
        return self.contains(gpa, size) and not any(slot.readonly for slot, _, _ in self._pieces(gpa, size))

    # --- bytes and integers ------------------------------------------------------------------------------------------

    def _locate(self, gpa: int, size: int) -> tuple[MemSlot, int]:
        """The slot that backs all of the access, and the offset in it."""
        slot = self.find(gpa)
        if slot is None or size < 0:
            raise GuestMemoryError(gpa, size, self._why(gpa, size))
        offset = gpa - slot.gpa
        if size > slot.size - offset:
            raise GuestMemoryError(gpa, size, self._why(gpa, size))
        return slot, offset

    def _why(self, gpa: int, size: int) -> str:
        if size < 0:
            return "a negative size"
        slot = self.find(gpa)
        if slot is not None:
            return f"it leaves {slot!r} after {slot.gpa + slot.size - gpa} bytes"
        have = ", ".join(f"{s.gpa:#x}-{s.gpa + s.size - 1:#x}" for s in self._slots) or "none"
        return f"no memory slot backs it (slots: {have})"

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes from ``gpa``."""
        slot = self.find(gpa)
        if slot is not None and 0 <= size <= slot.size - (gpa - slot.gpa):
            offset = gpa - slot.gpa
            return slot.map[offset : offset + size]
        if size < 0 or not self.contains(gpa, size):
            raise GuestMemoryError(gpa, size, self._why(gpa, size))
        return b"".join(s.map[o : o + n] for s, o, n in self._pieces(gpa, size))

    def write(self, gpa: int, data: Buffer) -> None:
        """Write ``data`` at ``gpa``: all of it or, on an error, nothing."""
        if type(data) is not bytes:
            data = memoryview(data).cast("B")
        size = len(data)
        slot = self.find(gpa)
        if slot is not None and size <= slot.size - (gpa - slot.gpa):
            offset = gpa - slot.gpa
            if slot.readonly:
                _check_writable(slot, gpa, size)
            slot.map[offset : offset + size] = data
            if self._log is not None:
                self._written(slot, offset, size)
            return
        if not self.contains(gpa, size):
            raise GuestMemoryError(gpa, size, self._why(gpa, size))
        done = 0
        pieces = self._pieces(gpa, size)
        for slot, _, _ in pieces:
            _check_writable(slot, gpa, size)
        for slot, offset, n in pieces:
            slot.map[offset : offset + n] = data[done : done + n]
            done += n
            self._written(slot, offset, n)

    def _pieces(self, gpa: int, size: int) -> list[tuple[MemSlot, int, int]]:
        pieces = []
        while size:
            slot = self.find(gpa)
            assert slot is not None  # the caller has checked
            offset = gpa - slot.gpa
            n = min(size, slot.size - offset)
            pieces.append((slot, offset, n))
            gpa, size = gpa + n, size - n
        return pieces

    def read_u8(self, gpa: int) -> int:
        """The byte at ``gpa``."""
        return self.read(gpa, 1)[0]

    def read_u16(self, gpa: int) -> int:
        """The little-endian 16-bit integer at ``gpa``."""
        return int.from_bytes(self.read(gpa, 2), "little")

    def read_u32(self, gpa: int) -> int:
        """The little-endian 32-bit integer at ``gpa``."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int) -> int:
        """The little-endian 64-bit integer at ``gpa``."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u8(self, gpa: int, value: int) -> None:
        """Write a byte; the value is taken modulo 2**8."""
        self.write(gpa, (value & 0xFF).to_bytes(1, "little"))

    def write_u16(self, gpa: int, value: int) -> None:
        """Write a little-endian 16-bit integer; the value is taken modulo 2**16."""
        self.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    def write_u32(self, gpa: int, value: int) -> None:
        """Write a little-endian 32-bit integer; the value is taken modulo 2**32."""
        self.write(gpa, (value & 0xFFFFFFFF).to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        """Write a little-endian 64-bit integer; the value is taken modulo 2**64."""
        self.write(gpa, (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"))

    def clear(self, gpa: int, size: int) -> None:
        """Make ``size`` bytes from ``gpa`` zero. Whole pages of anonymous memory are given back to the host rather than written."""
        if not self.contains(gpa, size):
            raise GuestMemoryError(gpa, size, self._why(gpa, size))
        for slot, offset, n in self._pieces(gpa, size):
            _check_writable(slot, gpa, size)
            self._clear(slot, offset, n)
            self._written(slot, offset, n)

    def _clear(self, slot: MemSlot, offset: int, n: int) -> None:
        first, last = -(-offset // PAGE_SIZE) * PAGE_SIZE, (offset + n) // PAGE_SIZE * PAGE_SIZE
        if slot.backing != "anonymous" or first >= last:
            _fill_zeros(slot.map, offset, n)
            return
        _fill_zeros(slot.map, offset, first - offset)
        slot.map.madvise(mmap.MADV_DONTNEED, first, last - first)
        _fill_zeros(slot.map, last, offset + n - last)

    # --- what the host writes ----------------------------------------------------------------------------------------

    def log_writes(self, *, yields: bool = False) -> HostWrites:
        """Note from now on which pages the host writes (hostwrites.py), until stop_log(). One log at a time; one that ``yields`` ends when
        another begins. Raises ConfigError."""
        from pykvm.hostwrites import HostWrites

        if self._log is not None and not self._log_yields:
            raise ConfigError("the memory is being logged already: a migration is under way, or the machine has a checkpoint")
        self._log, self._log_yields = HostWrites(self.slots), yields
        return self._log

    def unwritten(self, log: HostWrites) -> bool:
        """Whether ``log`` is the one that is kept, and the host has written nothing since it began."""
        return self._log is log and not log and not self._views

    def stop_log(self) -> None:
        """No more of log_writes()."""
        self._log = None

    def mark_written(self, gpa: int, size: int) -> None:
        """For who has written through an hva."""
        for slot, offset, n in self._pieces(gpa, size):
            self._written(slot, offset, n)

    def mark_views(self) -> None:
        """All that a numpy view that is alive may have written counts as written."""
        for _, slot, offset, size in self._views.copy().values():
            self._written(slot, offset, size)

    @property
    def viewed(self) -> int:
        """Bytes that numpy views which are alive may write."""
        return sum(size for _, _, _, size in self._views.copy().values())

    def _written(self, slot: MemSlot, offset: int, size: int) -> None:
        log = self._log
        if log is not None:
            log.mark(slot, offset, size)

    def _watch(self, array: np.ndarray[Any, Any], slot: MemSlot, offset: int) -> None:
        """``array`` is made from the mapping, not from another array: numpy's views of it keep it alive."""
        key, size = id(array), array.nbytes

        def gone(_: object) -> None:
            del self._views[key]
            self._written(slot, offset, size)

        self._views[key] = (ref(array, gone), slot, offset, size)

    def flush_page(self, gpa: int) -> None:
        """KVM forgets how it has mapped the page of ``gpa``: the guest's next access goes by its page tables. What is there stays.

        It does so when the host's own mapping changes (an MMU notifier); mapped executable and back, the page is never out of reach.
        """
        slot = self.find(gpa)
        if slot is not None and not memoryview(slot.map).readonly:
            page = ffi.cast("void *", slot.hva + (gpa - slot.gpa) // PAGE_SIZE * PAGE_SIZE)
            for protection in (mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, mmap.PROT_READ | mmap.PROT_WRITE):
                lib.mprotect(page, PAGE_SIZE, protection)

    # --- numpy -------------------------------------------------------------------------------------------------------

    def view(self, gpa: int, shape: int | tuple[int, ...], dtype: DTypeLike = "u1") -> np.ndarray[Any, Any]:
        """A numpy array of ``shape`` and ``dtype`` over guest memory at ``gpa``, without a copy.

        It must lie in one slot. Writes through it reach the guest (a file mapped readonly gives a readonly array). The
        array keeps the mapping alive, also after the VM is closed.
        """
        import numpy as np

        kind = np.dtype(dtype)
        if kind.hasobject:
            raise ConfigError(f"dtype {kind} holds Python objects; guest memory is bytes")
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        count = 1
        for n in dims:
            if n < 0:
                raise ConfigError(f"shape {shape} has a negative dimension")
            count *= n
        slot, offset = self._locate(gpa, count * kind.itemsize)
        if not count:
            return np.empty(dims, kind)
        array = np.frombuffer(slot.map, kind, count, offset)
        if array.flags.writeable:
            self._watch(array, slot, offset)
        return array.reshape(dims)

    def view_slot(self, slot: MemSlot, dtype: DTypeLike = "u1") -> np.ndarray[Any, Any]:
        """A whole slot as a one-dimensional array."""
        import numpy as np

        return self.view(slot.gpa, slot.size // np.dtype(dtype).itemsize, dtype)

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap all slots; those that numpy views still use go when the last view goes."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._starts.clear()

    def _repr_html_(self) -> str:
        from pykvm.debug.html import memory_html

        return memory_html(self)

    def __repr__(self) -> str:
        return f"<GuestMemory {format_size(self.size)} in {len(self._slots)} slot{'s' * (len(self._slots) != 1)}>"


def _fill_zeros(mapping: mmap.mmap, offset: int, size: int) -> None:
    """In pieces: a large bss must not become a large bytes object. Zeros that are there already stay untouched."""
    piece = bytes(min(size, MIB))
    while size:
        n = min(size, len(piece))
        if mapping[offset : offset + n] != piece[:n]:
            mapping[offset : offset + n] = piece[:n]
        offset, size = offset + n, size - n


def _check_writable(slot: MemSlot, gpa: int, size: int) -> None:
    """The host may fill a readonly slot that is its own; a file mapped readonly cannot be written by anybody."""
    if slot.readonly and memoryview(slot.map).readonly:
        raise GuestMemoryError(gpa, size, f"{slot!r} is a file mapped readonly: nobody can write it")


def host_memory() -> int:
    """Bytes of RAM this host has."""
    global _host_memory
    if not _host_memory:
        _host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _host_memory


_host_memory = 0  # asked once: two system calls for each new slot would be seen in the cost of a start


def _check_host_has(size: int) -> None:
    if size > (_host_memory or host_memory()):
        raise ConfigError(f"{format_size(size)} of guest memory is more than this host has ({host_memory() >> 20}M): use less")


def _map(size: int, backing: str | os.PathLike[str], shared: bool, readonly: bool, offset: int) -> tuple[mmap.mmap, int]:
    """The mapping, and the fd of a memfd, which stays open, else -1."""
    named = isinstance(backing, str)
    if named and backing not in ("anonymous", "memfd", "hugetlb"):
        raise ConfigError(f"unknown backing {backing!r}: use anonymous, memfd, hugetlb, or pathlib.Path(...) for a file")
    if named:
        _check_host_has(size)
    try:
        if backing == "anonymous":
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), -1
        if backing == "hugetlb":
            if size % HUGE_PAGE:
                raise MemSlotError(f"{format_size(size)} is not a multiple of 2M, the size of a huge page")
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB), -1
        if backing == "memfd":
            fd = os.memfd_create("pykvm", os.MFD_CLOEXEC)
            os.truncate(fd, size)
        else:
            fd = os.open(backing, os.O_RDWR | os.O_CLOEXEC if shared and not readonly else os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if backing == "hugetlb":
            raise ConfigError(
                f"no {size // HUGE_PAGE} free huge pages ({error.strerror}): as root, echo {size // HUGE_PAGE} > /proc/sys/vm/nr_hugepages"
            ) from error
        raise ConfigError(f"cannot back {format_size(size)} of guest memory with {os.fspath(backing)}: {error.strerror}") from error
    try:
        length = os.fstat(fd).st_size
        if offset % PAGE_SIZE or offset < 0 or offset + size > length:
            raise ConfigError(
                f"{os.fspath(backing)} has {length} bytes: it cannot back {size} from offset {offset} "
                "(the offset must be page aligned and the file long enough)"
            )
        if backing == "memfd" or (shared and not readonly):
            access = mmap.ACCESS_WRITE
        else:
            access = mmap.ACCESS_READ if readonly else mmap.ACCESS_COPY
        mapping = mmap.mmap(fd, size, access=access, offset=offset)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"{os.fspath(backing)} cannot be mapped: {error.strerror}; is it a file?") from error
    except BaseException:
        os.close(fd)
        raise
    if backing != "memfd":
        os.close(fd)
        fd = -1
    return mapping, fd
