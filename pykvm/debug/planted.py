"""Breakpoints planted in guest memory, only while the guest runs: INT3 where KVM makes a DEBUG exit of it, else OUT DX, EAX.

OUT is the instruction of one byte that exits to user space on every host: from CPL0 always, from CPL3 where the guest has given it all
ports. Of the accesses that KVM's own devices take, one of four bytes (two in 16-bit code) meets none but the PIT at port 0x40.
Whose it is tells the place it came from: RIP, which is at the instruction or past it by a probed property. The port it went to
never hears of it. Setting RIP and the byte back cancels it.
"""

from __future__ import annotations

from pykvm.bus import Bus
from pykvm.errors import ConfigError, GuestMemoryError
from pykvm.probe import breakpoints, out_leaves_rip_past
from pykvm.units import PAGE_SIZE
from pykvm.x86.view import CpuView

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.machine import Machine
    from pykvm.runner import Runner

__all__ = ["Planted", "WatchedBus", "probed_mode"]

INT3, OUT = 0xCC, 0xEF
_ALL_PORTS = b"\0" * (0x10000 // 8)
_PAST_EVERYWHERE = 0x7E  # KVM_X86_QUIRK_OUT_7E_INC_RIP


def probed_mode(view: CpuView) -> str:
    """The mode whose probes tell about this one."""
    if view.cpl == 3 and view.bits == 64:
        return "user"
    return view.mode if view.mode in ("real", "long") else "protected"


def has_all_ports(view: CpuView) -> bool:
    """Whether CPL3 could use any port: IOPL 3, or an I/O bitmap of zeros in the TSS; each where this host implements it."""
    from pykvm.probe import cpl3_ports

    if view.regs.rflags >> 12 & 3 == 3 and cpl3_ports("iopl"):
        return True
    tr = view.sregs.tr
    start = int.from_bytes(view.read(tr.base + 102, 2), "little")
    if not cpl3_ports("bitmap") or tr.limit < 103 or start + len(_ALL_PORTS) > tr.limit:
        return False
    return view.read(tr.base + start, len(_ALL_PORTS)) == _ALL_PORTS


class Planted:
    """The bytes that are planted now."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.memory = machine, machine.memory
        self.byte = INT3 if breakpoints("software") else OUT
        self._before: dict[int, int] = {}  # gpa -> what was there

    def insert(self, view: CpuView, gvas: Iterable[int]) -> list[int]:
        """Plant at those addresses that are mapped to memory for ``view``; returns the others."""
        left = []
        pages: dict[int, int | None] = {}  # many handlers share a page: one walk is enough
        for gva in gvas:
            page = gva & ~(PAGE_SIZE - 1)
            if page not in pages:
                pages[page] = view.walk(page).gpa
            base = pages[page]
            gpa = None if base is None else base + gva - page
            try:
                if gpa is None:
                    left.append(gva)
                elif gpa not in self._before:
                    before = self.memory.read_u8(gpa)
                    self.memory.write_u8(gpa, self.byte)
                    self._before[gpa] = before
            except GuestMemoryError:
                left.append(gva)
        return left

    def check(self, view: CpuView, gva: int, user: bool) -> None:
        """Raises ConfigError where none can be planted: no memory, or CPL3 (``user``) without ports where OUT is what there is."""
        found = view.walk(gva)
        if found.gpa is None or not self.memory.contains(found.gpa, 1):
            why = found.fault or f"gpa {found.gpa:#x} has no memory"
            raise ConfigError(f"no breakpoint can be planted at {gva:#x}: {why}")
        if self.byte == OUT and user and found.user and not has_all_ports(view):
            raise ConfigError(
                f"no breakpoint at {gva:#x}: on this host one at CPL3 is an OUT, and this guest does not let CPL3 use every port"
            )

    def remove(self) -> None:
        """Put back what was there, but for bytes that the guest has written since."""
        for gpa, before in self._before.items():
            if self.memory.read_u8(gpa) == self.byte:
                self.memory.write_u8(gpa, before)
        self._before.clear()

    def is_at(self, view: CpuView, gva: int) -> bool:
        """Whether the byte at ``gva`` is a planted one."""
        return view.walk(gva).gpa in self._before

    def out_by(self, view: CpuView, port: int) -> int | None:
        """The planted address that this OUT to ``port`` came from, a linear address; None: it is the guest's own."""
        if self.byte != OUT:
            return None
        past = port == _PAST_EVERYWHERE or out_leaves_rip_past(probed_mode(view))
        at = view.rip - 1 if past else view.rip
        return at if self.is_at(view, at) else None


class WatchedBus(Bus):
    """What a runner has for its bus while OUTs are planted: every port access comes here and is looked at before a device sees it.

    ``hit``: where a planted one was met. Another vCPU may have had the run stopped for a reason of its own at that moment.
    """

    def __init__(self, real: Bus, runner: Runner, planted: Planted) -> None:
        super().__init__()
        self.real, self.runner, self.planted = real, runner, planted
        self.hit: int | None = None
        self.mmio = real.mmio  # as it was; of ports none is claimed, so that the run loop asks here

    def out(self, port: int, size: int, data: bytes, count: int = 1) -> None:
        """A planted OUT ends the run; all others reach their device."""
        if size != 1 and count == 1:
            view = CpuView(self.runner.vcpu, self.planted.memory)
            self.hit = self.planted.out_by(view, port)
            if self.hit is not None:
                self.runner.stop("breakpoint")
                return
        self.real.out(port, size, data, count)

    def in_(self, port: int, size: int, count: int = 1) -> bytes:
        """As ever."""
        return self.real.in_(port, size, count)

    def read(self, space: str, at: int, size: int) -> int:
        """As ever."""
        return self.real.read("pio" if space == "pio" else "mmio", at, size)

    def write(self, space: str, at: int, size: int, value: int) -> None:
        """As ever."""
        self.real.write("pio" if space == "pio" else "mmio", at, size, value)
