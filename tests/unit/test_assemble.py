"""pykvm.asm: code, errors with their line, and the gallery's build."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from pykvm.assemble import asm, assemble_image
from pykvm.errors import AsmError, ConfigError
from pykvm.loaders import peek

GUESTS = Path(__file__).parents[2] / "guests"


@pytest.mark.parametrize(
    ("source", "bits", "code"),
    [
        ("mov al, 42; out 0xf4, al", 16, "b02ae6f4"),
        ("mov eax, 1", 16, "66b801000000"),
        ("mov eax, 1", 32, "b801000000"),
        ("push rax", 64, "50"),
        ("_start: jmp _start", 64, "ebfe"),
        ("# a comment\nnop\n", 64, "90"),
        ("", 64, ""),
    ],
)
def test_code(source, bits, code):
    assert asm(source, bits=bits).hex() == code


def test_org_is_where_labels_are():
    assert asm("mov ax, offset x; x:", bits=16, org=0x7C00).hex() == "b8037c"
    assert asm("movabs rax, offset x; x:", org=1 << 40)[2:] == ((1 << 40) + 10).to_bytes(8, "little")


def test_data_follows_the_code():
    code = asm(".data\nd: .long 5\n.text\nmov eax, [rip + d]\n.bss\n.skip 2")
    assert code == bytes.fromhex("8b0500000000") + (5).to_bytes(4, "little") + b"\0\0"


@pytest.mark.parametrize(
    ("source", "line", "text", "message"),
    [
        ("nop\nfrob eax\nnop", 2, "frob eax", "no such instruction"),
        ("frob", 1, "frob", "no such instruction"),
        ("nop\n\n\ncall nowhere", 4, "call nowhere", "undefined reference to `nowhere'"),
        ("nop\n.byte 300", 2, ".byte 300", "truncated"),
        ("mov eax, [ebx", 1, "mov eax, [ebx", ""),
    ],
)
def test_errors_name_the_line(source, line, text, message):
    with pytest.raises(AsmError) as caught:
        asm(source)
    assert (caught.value.line, caught.value.source) == (line, text)
    assert message in str(caught.value)
    assert "/tmp" not in str(caught.value)


def test_code_out_of_reach():
    with pytest.raises(AsmError, match="line 2: relocation truncated"):
        asm("x: nop\nmov bx, offset x", bits=16, org=0x100000)


@pytest.mark.parametrize("options", [{"bits": 8}, {"org": -1}, {"org": 1 << 32, "bits": 32}, {"org": 1 << 64}])
def test_impossible_requests(options):
    with pytest.raises(ConfigError):
        asm("nop", **options)


def test_missing_binutils(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AsmError, match="apt-get install binutils"):
        asm("nop # not in the cache: binutils")


def test_results_are_kept(monkeypatch):
    code = asm("nop; nop; hlt")
    monkeypatch.setattr(sys.modules["pykvm.assemble"], "_assemble", None)
    assert asm("nop; nop; hlt") is code


def test_included_files_are_read_again(tmp_path):
    blob = tmp_path / "blob"
    source = f'.incbin "{blob}"'
    blob.write_bytes(b"\x01")
    assert asm(source) == b"\x01"
    blob.write_bytes(b"\x02")
    assert asm(source) == b"\x02"


def test_needs_nothing_compiled():
    """setup.py assembles the guests before the binding exists."""
    import subprocess

    code = "import sys, pykvm.assemble; sys.exit(any(m in sys.modules for m in ('pykvm._native', 'pykvm.abi', 'cffi')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=GUESTS.parent, check=False).returncode == 0


# --- images ----------------------------------------------------------------------------------------------------------


def _build_module():
    spec = importlib.util.spec_from_file_location("guests_build", GUESTS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_image_errors_name_file_and_line(tmp_path):
    path = tmp_path / "bad.S"
    path.write_text('.include "guest.inc"\nnote_begin\n.ascii "mode=long\\n"\nnote_end\n.text\nfrob\n')
    shutil.copy(GUESTS / "guest.inc", tmp_path)
    with pytest.raises(AsmError) as caught:
        assemble_image(str(path), str(tmp_path / "bad.elf"), str(GUESTS / "guest.ld"))
    assert caught.value.line == 6
    assert str(path) in str(caught.value)
    assert not (tmp_path / "bad.elf").exists()


def test_build_makes_every_guest_once_and_forgets_what_is_gone(tmp_path):
    build = _build_module().build
    guests = sorted(path.stem for path in GUESTS.glob("*.S"))
    (tmp_path / "mine.S").write_text("not the build's")
    assert build(tmp_path) == guests
    for name in guests:
        image = tmp_path / f"{name}.elf"
        info = peek(image.read_bytes(), str(image))
        assert info.note["mode"] == info.mode
        assert info.format == ("ELF64" if info.mode in ("long", "user") else "ELF32")
        base = 0xFFFFF000 if info.protocol == "firmware" else 0x7C00 if info.mode == "real" else 0x100000
        assert info.segments[0].gpa == base
        assert info.entry == base or info.protocol
        assert (tmp_path / f"{name}.S").read_bytes() == (GUESTS / f"{name}.S").read_bytes()
    assert build(tmp_path) == []
    shutil.copy(tmp_path / f"{guests[0]}.elf", tmp_path / "gone.elf")
    (tmp_path / "gone.S").write_text("")
    os.utime(tmp_path / f"{guests[1]}.elf", (0, 0))
    assert build(tmp_path) == [guests[1]]
    assert not list(tmp_path.glob("gone.*"))
    assert (tmp_path / "mine.S").exists()
    assert not list(tmp_path.glob("*.tmp"))
