"""The exceptions of pykvm: one tree, each carrying its data, each message saying what to do next.

Library code never prints and never exits; the command line maps these to exit statuses (see ``cli``).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.result import Result

__all__ = [
    "AsmError",
    "CapabilityError",
    "ConfigError",
    "DeviceOverlapError",
    "GuestCrash",
    "GuestImageError",
    "GuestMemoryError",
    "HostError",
    "IncompatibleStateError",
    "KvmError",
    "KvmUnavailableError",
    "MemSlotError",
    "MigrationError",
    "PykvmError",
    "StateError",
]


class PykvmError(Exception):
    """Base of everything pykvm raises on its own."""


class KvmError(PykvmError, OSError):
    """An ioctl failed: ``ioctl`` is its name, ``errno`` the kernel's answer, ``detail`` what the caller tried."""

    def __init__(self, ioctl: str, errno: int, detail: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.ioctl = ioctl
        self.detail = detail

    def __str__(self) -> str:
        tried = f" ({self.detail})" if self.detail else ""
        return f"{self.ioctl}: {self.strerror}{tried}"


class KvmUnavailableError(PykvmError):
    """There is no usable /dev/kvm: missing, no permission, wrong architecture or API version. ``path`` names it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why


class CapabilityError(PykvmError):
    """The host's KVM lacks a capability; ``cap`` is its KVM_CAP_ name."""

    def __init__(self, cap: str, what: str) -> None:
        super().__init__(f"{what} needs {cap}, which this host's KVM does not have (see `pykvm doctor`)")
        self.cap = cap


class GuestNeedsError(PykvmError):
    """The image says that it needs something of the host that is not there (needs.py); ``path`` and ``why``."""

    exit_status = 69

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} cannot run on this host: {why}; an emulated one may have it (pykvm host run --cpu intel, or amd)")
        self.path, self.why = path, why


class ConfigError(PykvmError, ValueError):
    """The caller asked for something that cannot be: a memory size of 0, an entry outside RAM, an unknown mode."""


class MemSlotError(ConfigError):
    """A memory slot cannot be placed; the message names the slot, or both overlapping slots."""


class DeviceOverlapError(ConfigError):
    """Two devices claim the same ports or addresses; the message names both ranges."""


class GuestMemoryError(PykvmError):
    """An access to guest physical memory that no slot backs; ``gpa`` and ``size`` in bytes."""

    def __init__(self, gpa: int, size: int, why: str = "no memory slot backs it") -> None:
        super().__init__(f"gpa {gpa:#x}, {size} bytes: {why}")
        self.gpa = gpa
        self.size = size
        self.why = why


class GuestImageError(PykvmError):
    """An image file is not what it says; ``offset`` is the file offset of the offence, or None."""

    def __init__(self, path: str, offset: int | None, why: str) -> None:
        at = f" at file offset {offset:#x}" if offset is not None else ""
        super().__init__(f"{path}{at}: {why}")
        self.path = path
        self.offset = offset
        self.why = why


class StateError(PykvmError):
    """A saved state cannot be made, or is none: truncated, damaged, of a later version, or not what it says. ``where`` names the file
    or the field."""

    exit_status = 65

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where, self.why = where, why


class IncompatibleStateError(StateError):
    """A saved state uses what this host has not; ``problems`` are the state.compat.Problem that stand in its way."""

    exit_status = 69

    def __init__(self, problems: list[Any], advice: str) -> None:
        super().__init__("this host cannot run it", "; ".join(str(problem) for problem in problems) + advice)
        self.problems = problems


class AsmError(PykvmError):
    """GNU as (or ld) refused the source; ``line`` is the 1-based line in it, or None, ``source`` that line's text."""

    def __init__(self, message: str, line: int | None = None, source: str = "") -> None:
        at = f"line {line}: " if line is not None else ""
        text = f"\n    {source.strip()}" if source.strip() else ""
        super().__init__(f"{at}{message}{text}")
        self.line = line
        self.source = source


class GuestCrash(PykvmError):
    """The guest cannot go on: triple fault, emulation failure, FAIL_ENTRY, an unhandled exception.

    ``explanation`` is the explainer's full text (its first line is the likely cause); ``result`` holds what the
    run had produced until then (console, exits).
    """

    def __init__(self, explanation: str, result: Result | None = None) -> None:
        super().__init__(explanation.splitlines()[0] if explanation else "the guest crashed")
        self.explanation = explanation
        self.result = result


class MigrationError(PykvmError):
    """A live migration failed before it was committed: the guest goes on at its source, and nowhere else. With ``uncertain`` it was
    committed and no answer came: it runs at the destination or nowhere, and is paused at its source."""

    exit_status = 75

    def __init__(self, why: str, *, uncertain: bool = False) -> None:
        super().__init__(why)
        self.uncertain = uncertain


class HostError(PykvmError):
    """An emulated host failed: ``console`` holds its last console lines."""

    def __init__(self, why: str, console: str = "") -> None:
        super().__init__(why)
        self.console = console
