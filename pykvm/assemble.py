"""Assembling with GNU as and ld: a snippet into flat code, a file into an ELF image.

This module imports nothing compiled: the build makes the gallery's images with it before the binding exists.
"""

from __future__ import annotations

import os

from pykvm.errors import AsmError, ConfigError

__all__ = ["asm", "assemble_image"]

_SETUP = {16: ".code16", 32: ".code32", 64: ".code64"}
# Data lies right behind the code.
_SCRIPT = """SECTIONS {
    .text ORG : { *(.text .text.*) *(.rodata .rodata.* .data .data.* .bss .bss.*) }
    /DISCARD/ : { *(.note.*) }
}"""
_CACHE_SIZE = 256
_TIME_LIMIT = 60  # seconds; `.rept` can keep as busy for ever
_cache: dict[tuple[str, int, int], bytes] = {}


def asm(source: str, *, bits: int = 64, org: int = 0) -> bytes:
    """Machine code for ``source`` (GNU as, Intel syntax), linked to run at ``org``.

    ``bits``: 16, 32 or 64. Statements end with a newline or ``;``, labels and data directives work, ``#`` starts a
    comment. Data sections follow the code.
    Raises AsmError with the line that as or ld refused (a value that would be cut short is refused too), or when
    binutils is not installed; ConfigError for bits or an org that cannot be.

    >>> asm("mov al, 42; out 0xf4, al", bits=16).hex()
    'b02ae6f4'
    """
    if bits not in _SETUP:
        raise ConfigError(f"bits={bits}: x86 code has 16, 32 or 64")
    if not 0 <= org < 1 << (64 if bits == 64 else 32):
        raise ConfigError(f"org={org:#x}: {bits}-bit code cannot run there")
    key = (source, bits, org)
    code = _cache.get(key)
    if code is None:
        code = _assemble(source, bits, org)
        if ".inc" not in source:  # .include and .incbin read files, which may change
            if len(_cache) >= _CACHE_SIZE:
                _cache.clear()
            _cache[key] = code
    return code


def _assemble(source: str, bits: int, org: int) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pykvm-") as folder:
        listing, script, obj, out = (os.path.join(folder, name) for name in ("in.S", "script", "out.o", "out.bin"))
        with open(listing, "w", encoding="utf-8", newline="") as file:
            # On one line, so that as counts lines as the caller does.
            file.write(f".intel_syntax noprefix; {_SETUP[bits]}; .text; {source}\n")
        with open(script, "w", encoding="utf-8") as file:
            file.write(_SCRIPT.replace("ORG", f"{org:#x}"))
        _run("as", [_width(bits), "-g", "--fatal-warnings", "-o", obj, listing], source, listing)
        _run("ld", [*_emulation(bits), "--oformat=binary", "-e", "0", "-T", script, "-o", out, obj], source, listing)
        try:
            with open(out, "rb") as binary:
                return binary.read()
        except FileNotFoundError:  # what ld makes of an empty source
            return b""


def assemble_image(path: str, out: str, script: str) -> None:
    """Assemble the guest at ``path`` and link it with the linker script ``script`` into the ELF image ``out``.

    The note's mode= decides the format: real and protected guests are ELF32, the others ELF64; mode= and format= where it goes.
    Raises AsmError; its message starts with the file's name.
    """
    import tempfile

    with open(path, encoding="utf-8") as file:
        source = file.read()
    mode = source.partition("mode=")[2].partition("\\n")[0]
    bits = 64 if mode in ("long", "user") else 32
    base = 0xFFFFF000 if "format=firmware\\n" in source else 0x7C00 if mode == "real" else 0x100000
    with tempfile.TemporaryDirectory(prefix="pykvm-") as folder:
        obj = os.path.join(folder, "out.o")
        _run("as", [_width(bits), "-I", os.path.dirname(path), "-o", obj, path], source, path, path)
        options = ["--build-id=none", "-z", "noexecstack", "--no-warn-rwx-segments", f"--defsym=LOAD_GPA={base:#x}"]
        _run("ld", [*_emulation(bits), *options, "-T", script, "-o", out, obj], source, path, path)


def _width(bits: int) -> str:
    return "--64" if bits == 64 else "--32"


def _emulation(bits: int) -> tuple[str, ...]:
    return ("-m", "elf_x86_64" if bits == 64 else "elf_i386")


def _run(tool: str, arguments: list[str], source: str, listing: str, path: str = "") -> None:
    """Run as or ld on the file ``listing``, which holds ``source``; ``path`` is its name for people, if it has one."""
    import subprocess

    environment = {**os.environ, "LC_ALL": "C"}  # messages are read below
    try:
        done = subprocess.run(
            [tool, *arguments],
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=_TIME_LIMIT,
        )
    except FileNotFoundError:
        raise AsmError(f"GNU {tool} is not installed: sudo apt-get install binutils") from None
    except subprocess.TimeoutExpired:
        raise AsmError(f"{tool} needs more than {_TIME_LIMIT} seconds: is there a .rept without an end?") from None
    if done.returncode:
        raise _error(tool, done.stderr, source, listing, path)


def _error(tool: str, stderr: str, source: str, listing: str, path: str) -> AsmError:
    """The first complaint with a line number: as writes ``in.S:3: Error: why``, ld ``in.S:3:(.text+0x7): why``."""
    prefix = f"{path}: " if path else ""
    for kind in (": Error: ", ": Warning: ", ": "):
        for text in stderr.splitlines():
            _, found, message = text.partition(f"{listing}:")
            number, _, message = message.partition(":")
            message = ":" + message
            if not found or not number.isdigit() or kind not in message:
                continue
            line = int(number)
            lines = source.split("\n")
            there = lines[line - 1] if 0 < line <= len(lines) else ""
            return AsmError(prefix + message.partition(kind)[2], line, there)
    # An included file's line, or no line at all.
    rest = [t for t in stderr.strip().splitlines() if "Assembler messages:" not in t and ": in function " not in t]
    return AsmError(f"{prefix}{tool}: {rest[0].replace(listing, 'source') if rest else 'no message'}")
