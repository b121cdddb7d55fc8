"""pykvm: a minimal KVM hypervisor driven from Python.

>>> import pykvm
>>> with pykvm.Machine("hello") as m:
...     r = m.run(timeout=5)
...     print(r.console, r.exits)

The layers, from the bottom: ``System`` (/dev/kvm), ``VM`` and ``VCPU`` are the bare fds with KVM's own ioctl names;
``GuestMemory`` is what the guest sees as RAM; exits are small classes made for ``match``; ``Machine`` wires them to
devices and an image. Names are loaded when they are first used: ``import pykvm`` itself costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.assemble import asm as asm
    from pykvm.bus import Bus as Bus
    from pykvm.bus import Native as Native
    from pykvm.errors import AsmError as AsmError
    from pykvm.errors import CapabilityError as CapabilityError
    from pykvm.errors import ConfigError as ConfigError
    from pykvm.errors import DeviceOverlapError as DeviceOverlapError
    from pykvm.errors import GuestCrash as GuestCrash
    from pykvm.errors import GuestImageError as GuestImageError
    from pykvm.errors import GuestMemoryError as GuestMemoryError
    from pykvm.errors import GuestNeedsError as GuestNeedsError
    from pykvm.errors import HostError as HostError
    from pykvm.errors import IncompatibleStateError as IncompatibleStateError
    from pykvm.errors import KvmError as KvmError
    from pykvm.errors import KvmUnavailableError as KvmUnavailableError
    from pykvm.errors import MemSlotError as MemSlotError
    from pykvm.errors import MigrationError as MigrationError
    from pykvm.errors import PykvmError as PykvmError
    from pykvm.errors import StateError as StateError
    from pykvm.exit_reason import ExitReason as ExitReason
    from pykvm.exits import ApResetHold as ApResetHold
    from pykvm.exits import BusLock as BusLock
    from pykvm.exits import Debug as Debug
    from pykvm.exits import DirtyRingFull as DirtyRingFull
    from pykvm.exits import Eagain as Eagain
    from pykvm.exits import ExceptionExit as ExceptionExit
    from pykvm.exits import Exit as Exit
    from pykvm.exits import FailEntry as FailEntry
    from pykvm.exits import Hlt as Hlt
    from pykvm.exits import Hypercall as Hypercall
    from pykvm.exits import Hyperv as Hyperv
    from pykvm.exits import InternalError as InternalError
    from pykvm.exits import Intr as Intr
    from pykvm.exits import IoapicEoi as IoapicEoi
    from pykvm.exits import IoIn as IoIn
    from pykvm.exits import IoOut as IoOut
    from pykvm.exits import IrqWindowOpen as IrqWindowOpen
    from pykvm.exits import MemoryFault as MemoryFault
    from pykvm.exits import MmioRead as MmioRead
    from pykvm.exits import MmioWrite as MmioWrite
    from pykvm.exits import Nmi as Nmi
    from pykvm.exits import Notify as Notify
    from pykvm.exits import RdMsr as RdMsr
    from pykvm.exits import SetTpr as SetTpr
    from pykvm.exits import Shutdown as Shutdown
    from pykvm.exits import SnpReqCerts as SnpReqCerts
    from pykvm.exits import SystemEvent as SystemEvent
    from pykvm.exits import Tdx as Tdx
    from pykvm.exits import TprAccess as TprAccess
    from pykvm.exits import UnknownExit as UnknownExit
    from pykvm.exits import UnknownHardwareExit as UnknownHardwareExit
    from pykvm.exits import WrMsr as WrMsr
    from pykvm.exits import Xen as Xen
    from pykvm.irq import EventFd as EventFd
    from pykvm.irq import IrqLine as IrqLine
    from pykvm.irq import Route as Route
    from pykvm.irq import default_routes as default_routes
    from pykvm.irq import msi_message as msi_message
    from pykvm.ledger import Ledger as Ledger
    from pykvm.machine import Machine as Machine
    from pykvm.memory import GuestMemory as GuestMemory
    from pykvm.memory import MemSlot as MemSlot
    from pykvm.result import Result as Result
    from pykvm.system import System as System
    from pykvm.turns import take_turns as take_turns
    from pykvm.vcpu import VCPU as VCPU
    from pykvm.vm import VM as VM
    from pykvm.x86.modes import mode_named as mode_named

__version__ = "0.1.0"

_HOME = {
    "pykvm.assemble": "asm",
    "pykvm.bus": "Bus Native",
    "pykvm.errors": "AsmError CapabilityError ConfigError DeviceOverlapError GuestCrash GuestImageError GuestMemoryError GuestNeedsError "
    "HostError IncompatibleStateError KvmError KvmUnavailableError MemSlotError MigrationError PykvmError StateError",
    "pykvm.exit_reason": "ExitReason",
    "pykvm.exits": "ApResetHold BusLock Debug DirtyRingFull Eagain ExceptionExit Exit FailEntry Hlt Hypercall Hyperv InternalError "
    "Intr IoIn IoOut IoapicEoi IrqWindowOpen MemoryFault MmioRead MmioWrite Nmi Notify RdMsr SetTpr Shutdown SnpReqCerts "
    "SystemEvent Tdx TprAccess UnknownExit UnknownHardwareExit WrMsr Xen",
    "pykvm.ledger": "Ledger",
    "pykvm.machine": "Machine",
    "pykvm.result": "Result",
    "pykvm.memory": "GuestMemory MemSlot",
    "pykvm.system": "System",
    "pykvm.irq": "EventFd IrqLine Route default_routes msi_message",
    "pykvm.turns": "take_turns",
    "pykvm.vcpu": "VCPU",
    "pykvm.vm": "VM",
    "pykvm.x86.modes": "mode_named",
}
_FROM = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = [*sorted(_FROM), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _FROM:
        value = globals()[name] = getattr(__import__(_FROM[name], fromlist=[name]), name)
        return value
    if name in ("hosts", "bench", "debug", "exits"):
        return __import__(f"pykvm.{name}", fromlist=["__name__"])
    raise AttributeError(f"module 'pykvm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
