"""Kernel structures as plain data, dictionaries of integers by the kernel's field names, and back; and what hostile data must look like.

A *shape* checks a value and says where it is wrong: ``Int(8)``, ``Hex(4096)``, ``List(Int(64), most=16)``, ``Fields({"rip": Int(64)})``,
``Kernel("struct kvm_regs")``. All raise StateError with the path of the field.
"""

from __future__ import annotations

from pykvm.abi import Struct, ffi
from pykvm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Shape(Protocol):
        """What a value has to look like."""

        def check(self, value: Any, path: str) -> None:
            """Raise StateError when it does not."""


__all__ = ["Bool", "Fields", "Hex", "Int", "Kernel", "List", "Optional", "Row", "Text", "plain", "struct"]

_KINDS: dict[str, tuple[tuple[str, bool], ...]] = {}


def plain(value: Struct) -> dict[str, Any]:
    """A structure as dictionaries, lists and integers; padding is left out."""
    cdata = value.cdata
    kind = ffi.typeof(cdata)
    return _plain(cdata, kind.item if kind.kind == "pointer" else kind)


def _plain(cdata: Any, kind: Any) -> dict[str, Any]:
    fields = _KINDS.get(kind.cname)
    if fields is None:
        fields = _KINDS[kind.cname] = tuple(
            (name, field.type.kind == "primitive") for name, field in kind.fields if not name.startswith(("padding", "reserved"))
        )
    result: dict[str, Any] = {}
    for name, is_number in fields:
        value = getattr(cdata, name)
        if not is_number:
            of = ffi.typeof(value)
            if of.kind == "array":
                value = list(value) if of.item.kind == "primitive" else [_plain(item, of.item) for item in value]
            else:
                value = _plain(value, of)
        result[name] = value
    return result


def struct(ctype: str, data: dict[str, Any]) -> Struct:
    """A structure made of what plain() gave and a shape has checked."""
    return Struct(ffi.new(ctype + " *", data))


class Int:
    """An integer of so many bits."""

    __slots__ = ("least", "most")

    def __init__(self, bits: int, signed: bool = False) -> None:
        self.least, self.most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def check(self, value: Any, path: str) -> None:
        """In range."""
        if type(value) is not int or not self.least <= value <= self.most:
            raise StateError(path, f"{_short(value)} is no integer from {self.least} to {self.most:#x}")


class Bool:
    """True or false."""

    def check(self, value: Any, path: str) -> None:
        """One of the two."""
        if type(value) is not bool:
            raise StateError(path, f"{_short(value)} is neither true nor false")


class Text:
    """Text of at most so many characters."""

    __slots__ = ("most",)

    def __init__(self, most: int) -> None:
        self.most = most

    def check(self, value: Any, path: str) -> None:
        """Text, and not too much."""
        if type(value) is not str or len(value) > self.most:
            raise StateError(path, f"{_short(value)} is no text of up to {self.most} characters")


class Hex:
    """Up to ``most`` bytes, written in hex."""

    __slots__ = ("most",)

    def __init__(self, most: int) -> None:
        self.most = most

    def check(self, value: Any, path: str) -> None:
        """Hex digits, two a byte."""
        try:
            size = len(bytes.fromhex(value))
        except (TypeError, ValueError):
            raise StateError(path, f"{_short(value)} is no text of hex digits") from None
        if size > self.most:
            raise StateError(path, f"it has {size} bytes, {self.most} are the most")


class List:
    """A list of at most ``most`` values of one shape, or of exactly ``count``."""

    __slots__ = ("count", "most", "shape")

    def __init__(self, shape: Shape, most: int = 1 << 16, count: int | None = None) -> None:
        self.shape, self.most, self.count = shape, most, count

    def check(self, value: Any, path: str) -> None:
        """Its length, and each."""
        if type(value) is not list or len(value) > self.most or (self.count is not None and len(value) != self.count):
            raise StateError(path, f"{_short(value)} is no list of {self.count if self.count is not None else f'up to {self.most}'} values")
        shape = self.shape
        if type(shape) is Int and value and set(map(type, value)) == {int} and shape.least <= min(value) and max(value) <= shape.most:
            return  # each on its own would take several times as long, and a state has a thousand numbers
        for i, item in enumerate(value):
            shape.check(item, f"{path}[{i}]")


class Row:
    """A list of one value of each shape."""

    __slots__ = ("shapes",)

    def __init__(self, *shapes: Shape) -> None:
        self.shapes = shapes

    def check(self, value: Any, path: str) -> None:
        """Each."""
        if type(value) is not list or len(value) != len(self.shapes):
            raise StateError(path, f"{_short(value)} is no list of {len(self.shapes)} values")
        for i, shape in enumerate(self.shapes):
            shape.check(value[i], f"{path}[{i}]")


class Optional:
    """A value, or null."""

    __slots__ = ("shape",)

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def check(self, value: Any, path: str) -> None:
        """Of the shape, where there is one."""
        if value is not None:
            self.shape.check(value, path)


class Fields:
    """Fields by name: all of these and no others."""

    __slots__ = ("shapes",)

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.shapes = shapes

    def check(self, value: Any, path: str) -> None:
        """Each."""
        if type(value) is not dict:
            raise StateError(path, f"{_short(value)} has no fields")
        if value.keys() != self.shapes.keys():
            missing, more = self.shapes.keys() - value.keys(), value.keys() - self.shapes.keys()
            wrong = f"{min(missing)} is missing" if missing else f"{_short(min(more))} is no field that belongs there"
            raise StateError(path, wrong)
        for name, shape in self.shapes.items():
            item = value[name]
            if type(shape) is Int and type(item) is int and shape.least <= item <= shape.most:
                continue
            shape.check(item, f"{path}.{name}")


class Kernel:
    """What plain() makes of a kernel structure."""

    __slots__ = ("_ctype", "_shape")

    def __init__(self, ctype: str) -> None:
        self._ctype = ctype
        self._shape: Shape | None = None

    def check(self, value: Any, path: str) -> None:
        """Each field has its bits."""
        if self._shape is None:
            self._shape = _shape_of(ffi.typeof(self._ctype))
        self._shape.check(value, path)


def _shape_of(kind: Any) -> Any:
    if kind.kind == "primitive":
        return Int(8 * ffi.sizeof(kind), signed=int(ffi.cast(kind, -1)) < 0)
    if kind.kind == "array":
        return List(_shape_of(kind.item), count=kind.length)
    return Fields({name: _shape_of(field.type) for name, field in kind.fields if not name.startswith(("padding", "reserved"))})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
