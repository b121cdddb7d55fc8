"""The only importer of the compiled module: ioctl(), structures with readable reprs, flexible arrays.

Structures keep the kernel's names: ``Struct`` wraps a cffi structure so that ``sregs.cs.selector`` reads and writes it, keeps
its owner alive, and prints its fields. Reference: Linux Documentation/virt/kvm/api.rst; names are those of <linux/kvm.h>.
"""

from __future__ import annotations

from pykvm.errors import ConfigError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

try:
    from pykvm._native import ffi, lib
except ImportError as missing:  # a checkout without its binding
    raise ImportError(
        f"pykvm's compiled binding cannot be imported ({missing}); build it with `make` in a checkout, or `pip install .`"
    ) from missing

__all__ = [
    "EAGAIN",
    "EBADF",
    "EBUSY",
    "EFAULT",
    "EINTR",
    "EIO",
    "NULL",
    "Array",
    "Struct",
    "capability",
    "enable_cap",
    "ffi",
    "flexible",
    "ioctl",
    "ioctl_value",
    "lib",
    "new",
]

NULL = ffi.NULL
EINTR, EIO, EBADF, EAGAIN, EFAULT, EBUSY = 4, 5, 9, 11, 14, 16  # errno.h; what KVM_RUN answers besides exits


def ioctl(fd: int, name: str, argument: Any = NULL, detail: str = "") -> int:
    """One ioctl by its kernel name, with a pointer argument. Returns its result; raises KvmError with name and errno."""
    request = getattr(lib, name)
    result: int = lib.pykvm_ioctl(fd, request, argument)
    while result == -EINTR and name != "KVM_RUN":  # a signal came; its handler has run, and may have raised
        result = lib.pykvm_ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(name, -result, detail)
    return result


def ioctl_value(fd: int, name: str, value: int = 0, detail: str = "") -> int:
    """One ioctl by its kernel name, with an integer argument. Returns its result; raises KvmError with name and errno."""
    request = getattr(lib, name)
    result: int = lib.pykvm_ioctl_value(fd, request, value)
    while result == -EINTR and name != "KVM_RUN":  # KVM_CREATE_VM waits for locks, and gives up for any signal
        result = lib.pykvm_ioctl_value(fd, request, value)
    if result < 0:
        raise KvmError(name, -result, detail)
    return result


def capability(name: str) -> int:
    """The number of a capability by its KVM_CAP_ name. Raises ConfigError with the nearest one."""
    try:
        number: int = getattr(lib, name)
    except AttributeError:
        from difflib import get_close_matches

        near = get_close_matches(name, [known for known in dir(lib) if known.startswith("KVM_CAP_")], 1)
        hint = f"did you mean {near[0]}?" if near else "pykvm knows those of x86"
        raise ConfigError(f"unknown capability {name!r}; {hint}") from None
    return number


def enable_cap(fd: int, cap: str, *args: int) -> None:
    """KVM_ENABLE_CAP (api.rst 4.37) on a VM or vCPU, with up to four arguments."""
    request = ffi.new("struct kvm_enable_cap *", {"cap": capability(cap), "args": args})
    ioctl(fd, "KVM_ENABLE_CAP", request, cap)


class Struct:
    """A kernel structure: attributes are its fields, nested structures come wrapped, ``repr`` shows all in hex."""

    __slots__ = ("_owner", "cdata")

    def __init__(self, cdata: Any, owner: Any = None) -> None:
        _set_cdata(self, cdata)
        _set_owner(self, cdata if owner is None else owner)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.cdata, name)
        return value if type(value) is int else _wrapped(value, self._owner)

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is not int:
            value = list(value.cdata) if isinstance(value, Array) else value._pointer()[0] if isinstance(value, Struct) else value
        setattr(self.cdata, name, value)

    def _pointer(self) -> Any:
        return self.cdata if ffi.typeof(self.cdata).kind == "pointer" else ffi.addressof(self.cdata)

    def fields(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of each field, nested structures wrapped."""
        kind = ffi.typeof(self.cdata)
        for name, _ in (kind.item if kind.kind == "pointer" else kind).fields:
            yield name, getattr(self, name)

    def to_bytes(self) -> bytes:
        """The structure as the kernel lays it out."""
        return bytes(ffi.buffer(self._pointer()))

    def copy(self) -> Struct:
        """An independent copy."""
        pointer = self._pointer()
        kind = ffi.typeof(pointer)
        new = ffi.new(kind)
        ffi.buffer(new)[:] = ffi.buffer(pointer)[:]
        return Struct(new)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Struct) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        from pykvm.debug.html import struct_html

        return struct_html(self)

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, int):
                return hex(value) if value > 9 else str(value)
            return f"<{len(value)} items>" if isinstance(value, Array) else repr(value)

        kind = ffi.typeof(self.cdata)
        name = (kind.item if kind.kind == "pointer" else kind).cname.removeprefix("struct ")
        return f"<{name} {' '.join(f'{field}={show(value)}' for field, value in self.fields() if field != 'padding')}>"


class Array:
    """An array inside a ``Struct``: indexed, assigned to by element, iterated; keeps the structure alive that it is part of."""

    __slots__ = ("_owner", "cdata")

    def __init__(self, cdata: Any, owner: Any) -> None:
        self.cdata, self._owner = cdata, owner

    def __len__(self) -> int:
        return len(self.cdata)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        value = self.cdata[range(len(self))[index]]
        return value if type(value) is int else _wrapped(value, self._owner)

    def __setitem__(self, index: int, value: Any) -> None:
        self.cdata[range(len(self))[index]] = value._pointer()[0] if isinstance(value, Struct) else value

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def to_bytes(self) -> bytes:
        """The array as it lies in memory."""
        return bytes(ffi.buffer(self.cdata))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{ffi.typeof(self.cdata).cname} {self.to_bytes()[:64].hex(' ', 8)}{' ...' if ffi.sizeof(self.cdata) > 64 else ''}>"


def _wrapped(value: Any, owner: Any) -> Any:
    """What is inside a structure belongs to it: it must not outlive ``owner``."""
    if not isinstance(value, _CData):
        return value
    kind = _typeof(value).kind
    return Struct(value, owner) if kind in _NESTED else Array(value, owner) if kind == "array" else value


# A start makes a dozen of these, each right after the kernel has emptied the caches: every lookup saved can be measured.
_set_cdata, _set_owner = Struct.cdata.__set__, Struct._owner.__set__  # type: ignore[attr-defined]
_CData, _typeof, _NESTED = ffi.CData, ffi.typeof, ("struct", "union")


def new(ctype: str) -> Struct:
    """A zeroed structure, e.g. ``new("struct kvm_regs")``."""
    return Struct(ffi.new(ctype + " *"))


def flexible(ctype: str, array: str, count: int) -> Any:
    """A zeroed structure that ends in the flexible member ``array``, with room for ``count``. Returns the cffi pointer."""
    return ffi.new(ctype + " *", {array: count})
