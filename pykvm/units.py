"""Sizes and addresses as people write them: "16M" -> bytes and back."""

from __future__ import annotations

from pykvm.errors import ConfigError

PAGE_SIZE = 4096
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SUFFIX = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes of ``"4096"``, ``"0x1000"``, ``"64K"``, ``"16M"``, ``"1.5G"``, ``"16MiB"``. Raises ConfigError.

    A final B is bytes, but after 0x, where it is a digit: ``"0x10KB"`` has both.
    """
    if isinstance(text, int):
        return text
    body = text.strip().upper()
    if not body.lstrip("+-").startswith("0X") or body.endswith(("KB", "MB", "GB", "TB", "IB")):
        body = body.removesuffix("B").removesuffix("I")
    suffix = body[-1:] if body[-1:] in "KMGT" else ""
    number = body.removesuffix(suffix) if suffix else body
    try:
        value = int(number, 0) if "." not in number else float(number)
    except ValueError:
        raise ConfigError(f"{text!r} is not a size: write bytes, or a number with K, M, G or T, as in 16M") from None
    size = value * _SUFFIX[suffix]
    if not 0 <= size < float("inf") or size != int(size):
        raise ConfigError(f"{text!r} is not a whole, positive number of bytes")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds: ``"10ms"``, ``"0.5s"``, ``"2"``. Raises ConfigError."""
    number, unit = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        raise ConfigError(f"{text!r} is not a time: write it as 10ms or 0.5s") from None
    if not 0 < value < 1e9:
        raise ConfigError(f"{text} is out of range: give a positive time, such as 10ms")
    return value


def parse_address(text: str | int) -> int:
    """A guest physical address, ``"0x7c00"`` or decimal. Raises ConfigError."""
    if isinstance(text, int):
        return text
    try:
        value = int(text, 0)
    except ValueError:
        raise ConfigError(f"{text!r} is not an address: write it as 0x7c00 or 31744") from None
    if not 0 <= value < 1 << 64:
        raise ConfigError(f"{text!r} is not a 64-bit address")
    return value


def format_size(size: int) -> str:
    """``16777216`` -> ``"16M"``; sizes that no suffix divides stay in bytes."""
    for suffix in "TGMK":
        unit = _SUFFIX[suffix]
        if size >= unit and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
