"""One small class for each kind of exit, and ``decode()``, which makes one from the vCPU's ``kvm_run`` (api.rst 5).

They are made for ``match``; every field is a plain value copied out of kvm_run, so an exit stays true after the next run:

>>> match vcpu.run():
...     case IoOut(port=0xF4, data=data):
...         print("exit code", data[0])
...     case Hlt():
...         print("halted")

The run loop makes them only for exits that no device claims; see pykvm/runner.py.
"""

from __future__ import annotations

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

__all__ = [
    "ApResetHold",
    "BusLock",
    "Debug",
    "DirtyRingFull",
    "Eagain",
    "ExceptionExit",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "Hyperv",
    "InternalError",
    "Intr",
    "IoIn",
    "IoOut",
    "IoapicEoi",
    "IrqWindowOpen",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "Nmi",
    "Notify",
    "RdMsr",
    "SetTpr",
    "Shutdown",
    "SnpReqCerts",
    "SystemEvent",
    "Tdx",
    "TprAccess",
    "UnknownExit",
    "UnknownHardwareExit",
    "WrMsr",
    "Xen",
    "decode",
]


class Exit:
    """Base of all exits. ``reason`` is the number of its KVM_EXIT_; fields differ by class."""

    __slots__: tuple[str, ...] = ()
    __match_args__: tuple[str, ...] = ()
    reason: ClassVar[int] = -1

    def __repr__(self) -> str:
        def show(name: str) -> str:
            value = getattr(self, name)
            plain = not isinstance(value, int) or isinstance(value, bool) or name in ("size", "count") or value < 10
            return f"{name}={value!r}" if plain else f"{name}={value:#x}"

        return f"{type(self).__name__}({', '.join(map(show, self.__match_args__))})"

    def _repr_html_(self) -> str:
        from pykvm.debug.html import exit_html

        return exit_html(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, n) == getattr(other, n) for n in self.__match_args__)

    __hash__ = None  # type: ignore[assignment]


class _Answerable(Exit):
    """An exit that the guest waits on: ``reply()`` stores the answer where the next KVM_RUN finds it."""

    __slots__ = ("_at", "_native", "count", "size")
    size: int
    count: int

    def __init__(self, native: Any, at: int, size: int, count: int) -> None:
        self._native, self._at, self.size, self.count = native, at, size, count

    def reply(self, answer: int | bytes) -> None:
        """Give the guest what it read: an integer (taken modulo the size; each element of a REP gets it), or exactly size * count bytes."""
        if isinstance(answer, int):
            answer = (answer & ((1 << 8 * self.size) - 1)).to_bytes(self.size, "little") * self.count
        if len(answer) != self.size * self.count:
            raise ValueError(f"{self!r} wants {self.size * self.count} bytes, not {len(answer)}")
        ffi.memmove(ffi.cast("char *", _open_run(self._native)) + self._at, answer, len(answer))


def _open_run(native: Any) -> Any:
    if not native.run:
        raise ConfigError("the vCPU of this exit is closed: nobody is left to answer")
    return native.run


class IoOut(Exit):
    """KVM_EXIT_IO, direction out: ``data`` holds ``count`` elements of ``size`` bytes (a REP OUTS has more than one)."""

    __slots__ = ("count", "data", "port", "size")
    __match_args__ = ("port", "size", "data", "count")
    reason = 2

    def __init__(self, port: int, size: int, data: bytes, count: int = 1) -> None:
        self.port, self.size, self.data, self.count = port, size, data, count

    @property
    def value(self) -> int:
        """The first element as an integer."""
        return int.from_bytes(self.data[: self.size], "little")


class IoIn(_Answerable):
    """KVM_EXIT_IO, direction in: answer it with ``reply()``, for all ``count`` elements of ``size`` bytes."""

    __slots__ = ("port",)
    __match_args__ = ("port", "size", "count")
    reason = 2

    def __init__(self, native: Any, at: int, port: int, size: int, count: int) -> None:
        super().__init__(native, at, size, count)
        self.port = port


class MmioWrite(Exit):
    """KVM_EXIT_MMIO: the guest wrote ``data`` (1 to 8 bytes) at ``gpa``, which no writable slot backs."""

    __slots__ = ("data", "gpa")
    __match_args__ = ("gpa", "data")
    reason = 6

    def __init__(self, gpa: int, data: bytes) -> None:
        self.gpa, self.data = gpa, data

    @property
    def value(self) -> int:
        """The data as an integer."""
        return int.from_bytes(self.data, "little")

    @property
    def size(self) -> int:
        """Bytes written."""
        return len(self.data)


class MmioRead(_Answerable):
    """KVM_EXIT_MMIO: the guest reads ``size`` bytes at ``gpa``; answer with ``reply()``."""

    __slots__ = ("gpa",)
    __match_args__ = ("gpa", "size")
    reason = 6

    def __init__(self, native: Any, at: int, gpa: int, size: int) -> None:
        super().__init__(native, at, size, 1)
        self.gpa = gpa


class Hlt(Exit):
    """KVM_EXIT_HLT: the guest executed HLT (without an in-kernel irqchip)."""

    reason = 5


class Shutdown(Exit):
    """KVM_EXIT_SHUTDOWN: a triple fault."""

    reason = 8


class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the CPU refused the guest state; ``hardware_reason`` is VMX's or SVM's own number."""

    __slots__ = ("cpu", "hardware_reason")
    __match_args__ = ("hardware_reason", "cpu")
    reason = 9

    def __init__(self, hardware_reason: int, cpu: int) -> None:
        self.hardware_reason, self.cpu = hardware_reason, cpu


class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR: ``suberror`` 1 is an emulation failure; ``data`` are KVM's words, ``insn`` the instruction if given."""

    __slots__ = ("data", "insn", "suberror")
    __match_args__ = ("suberror", "data", "insn")
    reason = 17

    def __init__(self, suberror: int, data: tuple[int, ...], insn: bytes = b"") -> None:
        self.suberror, self.data, self.insn = suberror, data, insn


class Intr(Exit):
    """KVM_EXIT_INTR, EINTR: a signal ended KVM_RUN.

    ``kicked``: by kick(); ``timed_out``: by the time limit; neither: by a signal of the application's own.
    """

    __slots__ = ("kicked", "timed_out")
    __match_args__ = ("kicked", "timed_out")
    reason = 10

    def __init__(self, kicked: bool = False, timed_out: bool = False) -> None:
        self.kicked, self.timed_out = kicked, timed_out


class Eagain(Exit):
    """EAGAIN of KVM_RUN: the vCPU was not ready to run (an AP between INIT and SIPI); run it again."""


class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT, and EFAULT of KVM_RUN: KVM could not reach the host memory behind [gpa, gpa + size)."""

    __slots__ = ("flags", "gpa", "size")
    __match_args__ = ("gpa", "size", "flags")
    reason = 39

    def __init__(self, gpa: int, size: int, flags: int) -> None:
        self.gpa, self.size, self.flags = gpa, size, flags


class Debug(Exit):
    """KVM_EXIT_DEBUG: a breakpoint, watchpoint or single step; ``pc`` is linear."""

    __slots__ = ("dr6", "dr7", "exception", "pc")
    __match_args__ = ("exception", "pc", "dr6", "dr7")
    reason = 4

    def __init__(self, exception: int, pc: int, dr6: int, dr7: int) -> None:
        self.exception, self.pc, self.dr6, self.dr7 = exception, pc, dr6, dr7


class Hypercall(Exit):
    """KVM_EXIT_HYPERCALL: hypercall ``nr`` with six ``args``; answer it with ``reply()`` (KVM_CAP_EXIT_HYPERCALL)."""

    __slots__ = ("_native", "args", "nr")
    __match_args__ = ("nr", "args")
    reason = 3

    def __init__(self, native: Any, nr: int, args: tuple[int, ...]) -> None:
        self._native, self.nr, self.args = native, nr, args

    def reply(self, value: int) -> None:
        """What the guest finds in RAX; 0 is success."""
        _open_run(self._native).hypercall.ret = value & 0xFFFFFFFFFFFFFFFF


class RdMsr(Exit):
    """KVM_EXIT_X86_RDMSR: the guest reads MSR ``index`` (KVM_CAP_X86_USER_SPACE_MSR); ``cause`` is KVM's reason for asking."""

    __slots__ = ("_native", "cause", "index")
    __match_args__ = ("index", "cause")
    reason = 29

    def __init__(self, native: Any, index: int, cause: int) -> None:
        self._native, self.index, self.cause = native, index, cause

    def reply(self, value: int | None) -> None:
        """The value the guest reads, or None: the guest gets #GP."""
        msr = _open_run(self._native).msr
        msr.error, msr.data = value is None, value or 0


class WrMsr(Exit):
    """KVM_EXIT_X86_WRMSR: the guest writes ``value`` to MSR ``index``; accepted unless refused."""

    __slots__ = ("_native", "cause", "index", "value")
    __match_args__ = ("index", "value", "cause")
    reason = 30

    def __init__(self, native: Any, index: int, value: int, cause: int) -> None:
        self._native, self.index, self.value, self.cause = native, index, value, cause

    def refuse(self) -> None:
        """The guest gets #GP."""
        _open_run(self._native).msr.error = 1


class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: ``type`` is shutdown, reset, crash ...; ``data`` its words."""

    __slots__ = ("data", "type")
    __match_args__ = ("type", "data")
    reason = 24

    def __init__(self, type: int, data: tuple[int, ...]) -> None:
        self.type, self.data = type, data


class IoapicEoi(Exit):
    """KVM_EXIT_IOAPIC_EOI: the guest ended interrupt ``vector`` (split irqchip)."""

    __slots__ = ("vector",)
    __match_args__ = ("vector",)
    reason = 26

    def __init__(self, vector: int) -> None:
        self.vector = vector


class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: ``vector`` with ``error_code``."""

    __slots__ = ("error_code", "vector")
    __match_args__ = ("vector", "error_code")
    reason = 1

    def __init__(self, vector: int, error_code: int) -> None:
        self.vector, self.error_code = vector, error_code


class UnknownHardwareExit(Exit):
    """KVM_EXIT_UNKNOWN: the CPU left the guest for a reason that KVM does not know; ``hardware_reason`` is the CPU's."""

    __slots__ = ("hardware_reason",)
    __match_args__ = ("hardware_reason",)
    reason = 0

    def __init__(self, hardware_reason: int) -> None:
        self.hardware_reason = hardware_reason


class TprAccess(Exit):
    """KVM_EXIT_TPR_ACCESS: the guest touched the task priority register at ``rip``."""

    __slots__ = ("is_write", "rip")
    __match_args__ = ("rip", "is_write")
    reason = 12

    def __init__(self, rip: int, is_write: bool) -> None:
        self.rip, self.is_write = rip, is_write


class Hyperv(Exit):
    """KVM_EXIT_HYPERV: ``type`` is synic, hypercall or debugger."""

    __slots__ = ("type",)
    __match_args__ = ("type",)
    reason = 27

    def __init__(self, type: int) -> None:
        self.type = type


class Xen(Exit):
    """KVM_EXIT_XEN: ``type`` is the kind of Xen exit."""

    __slots__ = ("type",)
    __match_args__ = ("type",)
    reason = 34

    def __init__(self, type: int) -> None:
        self.type = type


class Notify(Exit):
    """KVM_EXIT_NOTIFY: no VM exit for a whole notify window (KVM_CAP_X86_NOTIFY_VMEXIT)."""

    __slots__ = ("flags",)
    __match_args__ = ("flags",)
    reason = 37

    def __init__(self, flags: int) -> None:
        self.flags = flags


class IrqWindowOpen(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: the guest can now take the interrupt that was asked for."""

    reason = 7


class SetTpr(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered CR8."""

    reason = 11


class Nmi(Exit):
    """KVM_EXIT_NMI: an NMI of the host's."""

    reason = 16


class DirtyRingFull(Exit):
    """KVM_EXIT_DIRTY_RING_FULL: collect the ring before running on."""

    reason = 31


class ApResetHold(Exit):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES AP waits for its reset."""

    reason = 32


class BusLock(Exit):
    """KVM_EXIT_X86_BUS_LOCK: the guest took a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT)."""

    reason = 33


class Tdx(Exit):
    """KVM_EXIT_TDX: a TDX guest made the GHCI call ``nr`` that KVM leaves to user space; ``data`` are its words."""

    __slots__ = ("data", "flags", "nr")
    __match_args__ = ("nr", "data", "flags")
    reason = 40

    def __init__(self, nr: int, data: tuple[int, ...], flags: int) -> None:
        self.nr, self.data, self.flags = nr, data, flags


class SnpReqCerts(Exit):
    """KVM_EXIT_SNP_REQ_CERTS: an SEV-SNP guest wants certificates in ``npages`` pages at ``gpa``."""

    __slots__ = ("gpa", "npages")
    __match_args__ = ("gpa", "npages")
    reason = 43

    def __init__(self, gpa: int, npages: int) -> None:
        self.gpa, self.npages = gpa, npages


class UnknownExit(Exit):
    """An exit reason that pykvm has no class for; ``number`` is KVM's."""

    __slots__ = ("number",)
    __match_args__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def _io(native: Any) -> Exit:
    run = native.run
    io = run.io
    length = io.size * io.count
    if io.data_offset + length > native.run_size:  # never seen; the kernel is trusted less than it could be
        return UnknownExit(2)
    if io.direction == lib.KVM_EXIT_IO_OUT:
        data = bytes(ffi.buffer(ffi.cast("char *", run) + io.data_offset, length))
        return IoOut(io.port, io.size, data, io.count)
    return IoIn(native, io.data_offset, io.port, io.size, io.count)


def _mmio(native: Any) -> Exit:
    run = native.run
    mmio = run.mmio
    size = min(mmio.len, 8)
    if mmio.is_write:
        return MmioWrite(mmio.phys_addr, bytes(ffi.buffer(mmio.data, size)))
    at = int(ffi.cast("uintptr_t", mmio.data)) - int(ffi.cast("uintptr_t", run))
    return MmioRead(native, at, mmio.phys_addr, size)


def _internal(native: Any) -> Exit:
    error = native.run.internal
    data = tuple(error.data[0 : min(error.ndata, 16)])
    insn = b""
    if error.suberror == lib.KVM_INTERNAL_ERROR_EMULATION and len(data) >= 4 and data[0] & 1:
        # data[0] bit 0 says that the instruction's bytes follow: a size byte and up to 15 bytes (api.rst 5, emulation_failure).
        raw = b"".join(word.to_bytes(8, "little") for word in data[1:])
        insn = raw[1 : 1 + min(raw[0], 15)]
    return InternalError(error.suberror, data, insn)


def _debug(native: Any) -> Exit:
    arch = native.run.debug.arch
    return Debug(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _memory_fault(native: Any) -> Exit:
    fault = lib.pykvm_memory_fault(native.run)
    return MemoryFault(fault.gpa, fault.size, fault.flags)


def _tdx(native: Any) -> Exit:
    call = lib.pykvm_tdx(native.run)
    return Tdx(call.nr, tuple(call.data), call.flags)


def _snp_req_certs(native: Any) -> Exit:
    wanted = lib.pykvm_snp_certs(native.run)
    return SnpReqCerts(wanted.gpa, wanted.npages)


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    0: lambda n: UnknownHardwareExit(n.run.hw.hardware_exit_reason),
    1: lambda n: ExceptionExit(n.run.ex.exception, n.run.ex.error_code),
    2: _io,
    3: lambda n: Hypercall(n, n.run.hypercall.nr, tuple(n.run.hypercall.args)),
    4: _debug,
    5: lambda n: Hlt(),
    6: _mmio,
    7: lambda n: IrqWindowOpen(),
    8: lambda n: Shutdown(),
    9: lambda n: FailEntry(n.run.fail_entry.hardware_entry_failure_reason, n.run.fail_entry.cpu),
    10: lambda n: Intr(),
    11: lambda n: SetTpr(),
    12: lambda n: TprAccess(n.run.tpr_access.rip, bool(n.run.tpr_access.is_write)),
    16: lambda n: Nmi(),
    17: _internal,
    24: lambda n: SystemEvent(n.run.system_event.type, tuple(n.run.system_event.data[0 : min(n.run.system_event.ndata, 16)])),
    26: lambda n: IoapicEoi(n.run.eoi.vector),
    27: lambda n: Hyperv(n.run.hyperv.type),
    29: lambda n: RdMsr(n, n.run.msr.index, n.run.msr.reason),
    30: lambda n: WrMsr(n, n.run.msr.index, n.run.msr.data, n.run.msr.reason),
    31: lambda n: DirtyRingFull(),
    32: lambda n: ApResetHold(),
    33: lambda n: BusLock(),
    34: lambda n: Xen(n.run.xen.type),
    37: lambda n: Notify(n.run.notify.flags),
    39: _memory_fault,
    40: _tdx,
    43: _snp_req_certs,
}


def decode(native: Any) -> Exit:
    """The exit that a ``struct pykvm_vcpu *`` just came back with; UnknownExit for a reason without a class."""
    reason = native.run.exit_reason
    decoder = _DECODERS.get(reason)
    return UnknownExit(reason) if decoder is None else decoder(native)
