"""The note that makes an image self-describing: an ELF note of name "pykvm" whose content is lines "key=value".

guests/guest.inc lists the keys. Unknown ones are kept: a newer image is not an error. Values that choose how the guest
starts (mode, memory) are checked here.
"""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.units import PAGE_SIZE, parse_address, parse_size

__all__ = ["NAME", "TYPE", "parse"]

NAME = b"pykvm\0"
TYPE = 1
_LIMIT = 4096
_MODES = ("real", "protected", "long", "user")


def parse(content: bytes, path: str, offset: int) -> dict[str, str]:
    """The note's lines as a dictionary; later lines win. Raises GuestImageError for what is not text of that form."""
    if len(content) > _LIMIT:
        raise GuestImageError(path, offset, f"its pykvm note has {len(content)} bytes, more than {_LIMIT}")
    try:
        text = content.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise GuestImageError(path, offset, "its pykvm note is not UTF-8 text") from None
    note: dict[str, str] = {}
    for line in text.replace("\0", "\n").splitlines():
        if not line.strip():
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise GuestImageError(path, offset, f"its pykvm note has a line that is not key=value: {line[:40]!r}")
        note[key.strip()] = value.strip()
    if note.get("mode", "long") not in _MODES:
        why = f"its pykvm note asks for mode {note['mode']!r}: use one of {', '.join(_MODES)}"
        raise GuestImageError(path, offset, why)
    for key, default in (("memory", "16M"), ("rom", "0:4K")):
        text = note.get(key, default)
        gpa, _, size = text.partition(":") if key == "rom" else ("0", "", text)
        try:
            length = parse_size(size)
            if not length or length % PAGE_SIZE or parse_address(gpa) % PAGE_SIZE:
                raise ConfigError(f"{text!r} is not made of whole pages ({PAGE_SIZE} bytes)")
        except ConfigError as bad:
            raise GuestImageError(path, offset, f"{key} in its pykvm note: {bad}") from None
    return note
