"""The vmlinux inside a Linux bzImage, unpacked on the host: a guest need not do it, which counts where its code is emulated.

gzip, xz and lzma are Python's own; LZ4's legacy frame is decoded here. zstd, bzip2 and lzo are refused by name.
Sources: Linux' Documentation/arch/x86/boot.rst (payload_offset, payload_length), LZ4's block and legacy frame formats.
"""

from __future__ import annotations

from struct import unpack_from

from pykvm.errors import GuestImageError

__all__ = ["is_bzimage", "setup_size", "vmlinux"]

_LZ4_LEGACY = b"\x02!L\x18"
_LZ4_BLOCK = 8 << 20  # bytes that a block of a legacy frame holds at most
_OTHERS = {b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\x89LZO": "lzo"}


def is_bzimage(data: bytes) -> bool:
    """Whether the file begins as a Linux boot sector does, with a setup header."""
    return len(data) > 0x268 and data[0x1FE:0x200] == b"\x55\xaa" and data[0x202:0x206] == b"HdrS"


def setup_size(data: bytes) -> int:
    """File offset of what runs in protected mode."""
    return 512 * ((data[0x1F1] or 4) + 1)


def vmlinux(data: bytes, path: str, largest: int) -> bytes:
    """The ELF file inside, of at most ``largest`` bytes. Raises GuestImageError."""
    version = unpack_from("<H", data, 0x206)[0]
    offset, size = unpack_from("<II", data, 0x248) if version >= 0x208 else (0, 0)
    start = setup_size(data) + offset
    if not size or start + size > len(data):
        raise GuestImageError(path, 0x248, "it has a Linux setup header, but no packed kernel inside that could be taken out")
    packed = data[start : start + size]
    for magic, name in _OTHERS.items():
        if packed.startswith(magic):
            raise GuestImageError(path, start, f"the kernel inside is packed with {name}, which pykvm cannot unpack: use --format linux")
    content = _lz4(packed, path, start, largest) if packed.startswith(_LZ4_LEGACY) else _known(packed, path, start, largest)
    if len(content) > largest:
        raise GuestImageError(path, start, f"the kernel inside has more than {largest} bytes, the most that pykvm loads")
    return content


def _known(packed: bytes, path: str, at: int, largest: int) -> bytes:
    try:
        if packed.startswith(b"\x1f\x8b"):
            import zlib

            return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, largest + 1)
        import lzma

        return lzma.LZMADecompressor(memlimit=1 << 30).decompress(packed, largest + 1)
    except Exception as error:  # zlib.error, lzma.LZMAError: each from a module imported only here
        raise GuestImageError(path, at, f"the kernel inside cannot be unpacked: {error}") from None


def _lz4(packed: bytes, path: str, at: int, largest: int) -> bytes:
    """A legacy frame; behind the last block is the size of the whole, which the kernel's build appends."""
    out: list[bytes] = []
    total, i = 0, 4
    while i + 8 <= len(packed) and total <= largest:
        size = unpack_from("<I", packed, i)[0]
        try:
            block = _lz4_block(packed[i + 4 : i + 4 + size])
        except IndexError:
            raise GuestImageError(path, at + i, "the kernel inside cannot be unpacked: its LZ4 data is damaged or truncated") from None
        out.append(block)
        total += len(block)
        i += 4 + size
    return b"".join(out)


def _lz4_block(src: bytes) -> bytes:
    """One block. Raises IndexError when it is not sound."""
    out = bytearray()
    i, end = 0, len(src)
    while True:
        token = src[i]
        i += 1
        length = token >> 4
        if length == 15:
            more = 255
            while more == 255:
                more = src[i]
                i += 1
                length += more
        if length:
            out += src[i : i + length]
            i += length
        if i >= end:
            if i > end or len(out) > _LZ4_BLOCK:
                raise IndexError
            return bytes(out)
        back = src[i] | src[i + 1] << 8
        i += 2
        length = (token & 15) + 4
        if length == 19:
            more = 255
            while more == 255:
                more = src[i]
                i += 1
                length += more
        start = len(out) - back
        if start < 0 or not back or len(out) + length > _LZ4_BLOCK:
            raise IndexError
        if back >= length:
            out += out[start : start + length]
        else:
            out += (out[start:] * (length // back + 1))[:length]
