"""QEMU's firmware configuration device: named blobs that firmware and test kernels read, through a byte-wide port or by DMA.

| offset | port  | width      |                                                              |
|--------|-------|------------|--------------------------------------------------------------|
| 0      | 0x510 | 16, write  | selects an item; its first byte is next                      |
| 0, 1   | 0x511 | 8, read    | the next byte; 0 behind the end                              |
| 4      | 0x514 | 32 or 64   | the gpa of an access structure, big-endian; high half first  |
| 8      | 0x518 | 32         | its low half: starts the access. Reads give "QEMU CFG"       |

The structure is {u32 control, u32 length, u64 address}, big-endian; control comes back as 0, or with the error bit. Items are read only.
Source: QEMU docs/specs/fw_cfg.rst.
"""

from __future__ import annotations

from pykvm.devices.saved import Saved
from pykvm.errors import ConfigError, GuestMemoryError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from pykvm.memory import GuestMemory

__all__ = ["FwCfg"]

LENGTH = 12
SIGNATURE, ID, RAM_SIZE, NOGRAPHIC, NB_CPUS, BOOT_MENU, MAX_CPUS = 0x00, 0x01, 0x03, 0x04, 0x05, 0x0E, 0x0F
FILE_DIRECTORY, FIRST_FILE = 0x19, 0x20
IRQ0_OVERRIDE = 0x8002
ID_TRADITIONAL, ID_DMA = 1, 2
DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = 1, 2, 4, 8, 16
DMA_SIGNATURE = b"QEMU CFG"
NAME_SIZE = 56  # with its NUL
MAX_FILES = 0x1000
MAX_CONTENT = 16 << 20  # bytes of an item in a saved state
WRITABLE = 0x4000  # a bit of the selector from the time when the data port could be written


class FwCfg:
    """``memory`` is where DMA goes. ``items`` are bytes by selector, ``files`` names to selectors."""

    name = "fw_cfg"
    register_names: ClassVar = {0: ("data", "selector"), 1: "data", 4: "DMA address, high", 8: "DMA address, low"}

    def __init__(self, memory: GuestMemory, cpus: int = 1) -> None:
        self.memory = memory
        self.selected, self.offset = 0, 0
        self.address = 0  # the half of the DMA address that is there already
        self.items: dict[int, bytes] = {SIGNATURE: b"QEMU"}
        self.files: dict[str, int] = {}
        for selector, size, value in (
            (ID, 4, ID_TRADITIONAL | ID_DMA),
            (RAM_SIZE, 8, memory.ram_size),
            (NOGRAPHIC, 2, 1),
            (NB_CPUS, 2, cpus),
            (MAX_CPUS, 2, cpus),
            (BOOT_MENU, 2, 0),
            (IRQ0_OVERRIDE, 4, 1),  # ISA IRQ 0 is at the IOAPIC's pin 2
        ):
            self.items[selector] = value.to_bytes(size, "little")
        self._list_files()

    def add_file(self, name: str, content: bytes | bytearray) -> None:
        """A named file, or another content for it; before the guest looks into the directory. Raises ConfigError for a name too long."""
        label = name.encode("ascii", "replace")
        if not 0 < len(label) < NAME_SIZE or b"\0" in label or len(self.files) >= MAX_FILES:
            raise ConfigError(f"a fw_cfg file has a name of 1 to {NAME_SIZE - 1} ASCII characters, and {MAX_FILES} fit: not {name!r}")
        selector = self.files.setdefault(name, FIRST_FILE + len(self.files))
        self.items[selector] = bytes(content)
        self._list_files()

    def _list_files(self) -> None:
        entries = [len(self.files).to_bytes(4, "big")]
        for name, selector in sorted(self.files.items()):
            size = len(self.items[selector]).to_bytes(4, "big")
            entries.append(size + selector.to_bytes(2, "big") + bytes(2) + name.encode("ascii", "replace").ljust(NAME_SIZE, b"\0"))
        self.items[FILE_DIRECTORY] = b"".join(entries)

    # --- registers ---------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The next byte of the item, or part of the DMA register's signature."""
        if offset < 2 and size == 1:
            return self._take(1)[0]
        if offset >= 4:
            return int.from_bytes(DMA_SIGNATURE[offset - 4 : offset - 4 + size].ljust(size, b"\0"), "little")
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or start a DMA access; anything else vanishes."""
        if offset == 0 and size == 2:
            self._select(value)
        elif offset == 4 and size == 8:
            self.address = 0
            self._dma(_swap(value, 8))
        elif offset == 4 and size == 4:
            self.address = _swap(value, 4) << 32
        elif offset == 8 and size == 4:
            address, self.address = self.address | _swap(value, 4), 0
            self._dma(address)

    def _select(self, selector: int) -> None:
        self.selected, self.offset = selector & ~WRITABLE, 0

    def _take(self, length: int) -> bytes:
        """The next bytes of the item, zeros behind its end; at most as many as it has, and one more."""
        data = self.items.get(self.selected, b"")[self.offset : self.offset + length]
        self.offset += length
        return data or b"\0"

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """What is selected, and all items."""
        items = [[selector, content.hex()] for selector, content in self.items.items()]
        place = {"selected": self.selected, "offset": self.offset, "address": self.address}
        return {"version": 1, **place, "items": items, "files": [list(row) for row in self.files.items()]}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what save() gave. Raises StateError."""
        saved = Saved(state, self.name, 1)
        self.selected, self.offset = saved.number("selected", 0xFFFF), saved.number("offset", (1 << 63) - 1)
        self.address = saved.number("address", (1 << 64) - 1)
        items = {}
        for row in saved.rows("items", 2, MAX_FILES + FIRST_FILE):
            one = Saved({"version": 1, "selector": row[0], "content": row[1]}, "fw_cfg.items", 1)
            items[one.number("selector", 0xFFFF)] = one.bytes("content", MAX_CONTENT)
        files: dict[str, int] = {}
        for row in saved.rows("files", 2, MAX_FILES):
            if not isinstance(row[0], str) or len(row[0]) >= NAME_SIZE:
                raise StateError("fw_cfg.files", "a name is too long")
            files[row[0]] = Saved({"version": 1, row[0]: row[1]}, "fw_cfg.files", 1).number(row[0], 0xFFFF)
        self.files = files
        self.items = items

    # --- DMA ---------------------------------------------------------------------------------------------------------

    def _dma(self, gpa: int) -> None:
        """Carry out the access that the structure at ``gpa`` asks for. Where there is no memory for it, nobody can be told."""
        try:
            control = int.from_bytes(self.memory.read(gpa, 4), "big")
            length = int.from_bytes(self.memory.read(gpa + 4, 4), "big")
            address = int.from_bytes(self.memory.read(gpa + 8, 8), "big")
        except GuestMemoryError:
            return
        if not self.memory.is_writable(gpa, 4):
            return
        if control & DMA_SELECT:
            self._select(control >> 16)
        failed = False
        if control & DMA_READ:
            failed = not self._dma_read(address, length)
        elif control & DMA_WRITE:
            failed = True
        elif control & DMA_SKIP:
            self.offset += length
        self.memory.write(gpa, (DMA_ERROR if failed else 0).to_bytes(4, "big"))

    def _dma_read(self, gpa: int, length: int) -> bool:
        if not self.memory.is_writable(gpa, length):
            return False
        if length:
            data = self._take(length)
            self.memory.write(gpa, data)
            self.memory.clear(gpa + len(data), length - len(data))
        return True

    def __repr__(self) -> str:
        return f"<fw_cfg {len(self.items)} items, {len(self.files)} files; at byte {self.offset} of {self.selected:#x}>"


def _swap(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "big")
