"""Gives an instruction with a memory operand another address: as 64-bit code, RIP-relative, its registers as they were.

Only what SSE, AVX and x87 use: opcodes of the maps 0F, 0F38 and 0F3A, VEX, and D8 to DF (SDM vol. 2 sections 2.1 to 2.3).
"""

from __future__ import annotations

from pykvm.x86.assist.cpu import Declined

__all__ = ["Encoding"]

_MANDATORY = (0x66, 0xF2, 0xF3)  # prefixes that are part of the opcode
_OTHER = (0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0x67, 0xF0)


class Encoding:
    """The parts of an instruction in 16-, 32- or 64-bit code: ``map`` (0: one byte, 1: 0F, 2: 0F38, 3: 0F3A), ``opcode``, ``vex``, ``w``
    (REX.W or VEX.W), ``modrm`` or None. ``code`` is one instruction, all of it. Raises Declined for EVEX, and where the bytes end early."""

    def __init__(self, code: bytes, bits: int) -> None:
        try:
            self._parse(code, bits)
        except IndexError:
            raise Declined("its bytes end early") from None

    def _parse(self, code: bytes, bits: int) -> None:
        at, self.prefixes, size_flip = 0, b"", False
        while code[at] in _MANDATORY or code[at] in _OTHER:
            if code[at] in _MANDATORY:
                self.prefixes += code[at : at + 1]
            elif code[at] == 0xF0:
                raise Declined("LOCK does not go with it")
            size_flip |= code[at] == 0x67
            at += 1
        self.head = b""
        self.vex, self.map, self.w = False, 0, False
        if bits == 64 and 0x40 <= code[at] <= 0x4F:
            self.head, self.w = code[at : at + 1], bool(code[at] & 8)
            at += 1
        if code[at] in (0xC4, 0xC5) and (bits == 64 or code[at + 1] >> 6 == 3):
            at = self._parse_vex(code, at, bits)
        elif code[at] == 0x62 and (bits == 64 or code[at + 1] >> 6 == 3):
            raise Declined("it is encoded with EVEX")
        elif code[at] == 0x0F:
            long = {0x38: 2, 0x3A: 3}.get(code[at + 1], 1)
            self.map = long
            self.head += code[at : at + (2 if long > 1 else 1)]
            at += 2 if long > 1 else 1
        self.opcode = code[at]
        at += 1
        self.modrm: int | None = None
        self.is_memory = False
        if at < len(code):  # else one without, such as EMMS
            self.modrm = code[at]
            self.is_memory = self.modrm >> 6 != 3
            at += 1 + self._address_length(
                code, at, {64: 32 if size_flip else 64, 32: 16 if size_flip else 32, 16: 32 if size_flip else 16}[bits]
            )
        self.tail = code[at:]
        if self.vex and bits != 64 and self.map == 3 and self.tail:
            self.tail = bytes((self.tail[0] & 0x7F,)) if 0x4A <= self.opcode <= 0x4C else self.tail  # a register number in bits 7 to 4

    def _parse_vex(self, code: bytes, at: int, bits: int) -> int:
        self.vex = True
        size = 3 if code[at] == 0xC4 else 2
        head = bytearray(code[at : at + size])
        self.map = head[1] & 0x1F if size == 3 else 1
        self.w = size == 3 and bool(head[2] & 0x80)
        if bits != 64:  # eight registers: the inverted bits that make them sixteen do not count
            head[1] |= 0xE0 if size == 3 else 0x80
            head[-1] |= 0x40
        self.head = bytes(head)
        return at + size

    def _address_length(self, code: bytes, at: int, bits: int) -> int:
        """Bytes of SIB and displacement behind the ModRM byte at ``at``."""
        mod, rm = code[at] >> 6, code[at] & 7
        if mod == 3:
            return 0
        if bits == 16:
            return 2 if mod == 2 or (mod == 0 and rm == 6) else mod
        sib = rm == 4
        base = code[at + 1] & 7 if sib else rm
        return sib + (4 if mod == 2 or (mod == 0 and base == 5) else mod)

    def moved(self, at: int, operand: int) -> bytes:
        """As 64-bit code that lies at ``at``, its memory operand, if it has one, at ``operand``."""
        start = self.prefixes + self.head + bytes((self.opcode,))
        if self.modrm is None:
            return start + self.tail
        if not self.is_memory:
            return start + bytes((self.modrm,)) + self.tail
        length = len(start) + 5 + len(self.tail)
        return start + bytes((self.modrm & 0x38 | 5,)) + (operand - at - length).to_bytes(4, "little", signed=True) + self.tail
