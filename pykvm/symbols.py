"""Symbols of an ELF image, on demand, with pyelftools."""

from __future__ import annotations

from bisect import bisect_right
from struct import iter_unpack

from pykvm.errors import GuestImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Symbols"]

_NAMED = (0, 1, 2)  # STT_NOTYPE (labels in assembly), STT_OBJECT, STT_FUNC
_SHN_UNDEF, _SHN_LORESERVE = 0, 0xFF00
_NAME_LIMIT = 512


class Symbols:
    """Names for addresses and back. An image without symbols gives an empty table."""

    def __init__(self, table: dict[str, int]) -> None:
        self._by_name = table
        self._sorted = sorted((address, name) for name, address in table.items())

    @classmethod
    def from_elf(cls, data: bytes, path: str = "image") -> Symbols:
        """Read .symtab: pyelftools finds it, struct decodes it (a kernel has 100 000 symbols).

        Constants (SHN_ABS), files and sections are left out. Raises GuestImageError when the file makes no sense.
        """
        from io import BytesIO

        from elftools.elf.elffile import ELFFile

        try:
            file = ELFFile(BytesIO(data))
            if file.num_sections() * file["e_shentsize"] > len(data) or not file["e_shentsize"]:
                return cls(_no_sections(file, path))
            for section in file.iter_sections():
                if section["sh_type"] == "SHT_SYMTAB":
                    names = file.get_section(section["sh_link"])
                    return cls(_decode(_content(data, section), _content(data, names), file.elfclass))
        except GuestImageError:
            raise
        except Exception as error:  # pyelftools raises whatever a broken table leads it to
            why = f"its symbol table cannot be read ({error or type(error).__name__})"
            raise GuestImageError(path, None, why) from None
        return cls({})

    def address(self, name: str) -> int | None:
        """The address of a symbol, or None."""
        return self._by_name.get(name)

    def lookup(self, address: int) -> tuple[str, int] | None:
        """(name, offset) of the nearest symbol at or below ``address``, within 64 KiB, or None."""
        i = bisect_right(self._sorted, (address, "\U0010ffff")) - 1
        if i < 0 or address - self._sorted[i][0] > 0xFFFF:
            return None
        return self._sorted[i][1], address - self._sorted[i][0]

    def name(self, address: int) -> str:
        """``"main+0x4"``, or an empty string."""
        found = self.lookup(address)
        return "" if found is None else found[0] + (f"+{found[1]:#x}" if found[1] else "")

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"<Symbols {len(self)}>"


def _no_sections(file: Any, path: str) -> dict[str, int]:
    """The empty table of an image without section headers. Raises GuestImageError when it claims to have some."""
    if file.num_sections():
        why = "its symbol table cannot be read (the section headers pass the end of the file)"
        raise GuestImageError(path, None, why)
    return {}


def _content(data: bytes, section: Any) -> bytes:
    start, size = int(section["sh_offset"]), int(section["sh_size"])
    if start + size > len(data):
        raise ValueError("a section passes the end of the file")
    return data[start : start + size]


def _decode(table: bytes, names: bytes, elfclass: int) -> dict[str, int]:
    """Elf32_Sym and Elf64_Sym (System V ABI, chapter 4)."""
    size, layout = (16, "<IIIBBH") if elfclass == 32 else (24, "<IBBHQQ")
    found: dict[str, int] = {}
    for fields in iter_unpack(layout, table[: len(table) // size * size]):
        if elfclass == 32:
            name, value, _, info, _, where = fields
        else:
            name, info, _, where, value, _ = fields
        if info & 0xF not in _NAMED or not _SHN_UNDEF < where < _SHN_LORESERVE or not 0 < name < len(names):
            continue
        end = names.find(b"\0", name, name + _NAME_LIMIT)
        text = names[name : end if end >= 0 else name + _NAME_LIMIT].decode("utf-8", "replace")
        if text:
            found[text] = value
    return found
