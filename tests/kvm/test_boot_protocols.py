"""Multiboot, PVH and firmware images on the KVM at hand: the state they start in, and what the command line says of them."""

import struct
import subprocess
import sys

import pytest

from pykvm import Machine, gallery
from tests.conftest import TIMEOUT

FLAT32 = (0, 0xFFFFFFFF, 1, 1, 0)  # base, limit, present, db, dpl


def flat(segment):
    return segment.base, segment.limit, segment.present, segment.db, segment.dpl


@pytest.mark.parametrize("name", ["multiboot_info", "pvh_info"])
def test_the_state_at_the_entry(name, system):
    with Machine(name, system=system) as machine:
        regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
        assert regs.rip == machine.info.entry
        assert regs.rflags == 2
        assert {flat(getattr(sregs, name)) for name in ("cs", "ss", "ds", "es", "fs", "gs")} == {FLAT32}
        assert sregs.cs.type in (0xA, 0xB)
        assert {getattr(sregs, name).type for name in ("ss", "ds", "es", "fs", "gs")} <= {2, 3}
        assert (sregs.cr0 & ~0x10, sregs.cr4, sregs.efer) == (1, 0, 0)
        if name == "multiboot_info":
            assert regs.rax == 0x2BADB002
        else:
            assert (sregs.tr.base, sregs.tr.limit, sregs.tr.type, sregs.tr.present) == (0, 0x67, 0xB, 1)
        assert machine.memory.contains(regs.rbx, 56)


def test_the_state_at_the_reset_vector(system):
    with Machine("reset_vector", system=system) as machine:
        regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
        assert (regs.rip, regs.rflags, sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xFFF0, 2, 0xF000, 0xFFFF0000, 0xFFFF)
        assert sregs.cr0 & 1 == 0
        result = machine.run(TIMEOUT)
        assert result.exit_code == 0
        assert machine.memory.read_u16(0xFF000 + machine.symbols().address("mark") - 0xFFFFF000) == 0x1234


def test_what_is_handed_over(tmp_path, system):
    (tmp_path / "one").write_text("first\n")
    modules = [f"{tmp_path}/one words", b"second\n"]
    with Machine("multiboot_info", memory="8M", append="a  b", initrd=modules, system=system) as machine:
        lines = machine.run(TIMEOUT).console.splitlines()
        assert lines[:3] == ["loader: pykvm", "command line: multiboot_info.elf a  b", "0000027f KiB below 1 MiB, 00001c00 KiB above"]
        assert lines[-2:] == ["module one words: first", "module module: second"]
    with Machine("pvh_info", memory="8M", append="a  b", initrd=modules, system=system) as machine:
        lines = machine.run(TIMEOUT).console.splitlines()
        assert lines[0] == "command line: a  b"
        assert "00100000 + 00700000 type 00000001" in lines
        assert lines[-2:] == ["module words: first", "module : second"]


@pytest.mark.slow
def test_a_flat_firmware_file(tmp_path, system):
    with open(gallery.find("reset_vector"), "rb") as file:
        elf = file.read()
    with Machine("reset_vector", system=system) as machine:
        code = machine.memory.read(0xFFFFF000, 0x1000)
    assert code in elf
    (tmp_path / "bios.bin").write_bytes(bytes(0xF000) + code)
    done = run("--firmware", tmp_path / "bios.bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello from the reset vector.\n", "")


def test_an_image_just_below_1_mib(system):
    """Where a linker that is told to put the code at 1 MiB puts the ELF header; the platform's tables are elsewhere in that area."""
    magic, flags = 0x1BADB002, 1 << 16
    header = struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, 0x100000, 0xFF000, 0, 0, 0x100020)
    image = bytes(0x1000) + header + b"\xb0\x07\xe6\xf4"  # mov al, 7; out 0xf4, al
    with Machine(image, system=system) as machine:
        assert machine.info.kind == "multiboot (flat)" and machine.config.platform == "pc-test"
        assert machine.run(TIMEOUT).exit_code == 7


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "pykvm", "run", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_line_says_what_it_took_the_file_for(tmp_path):
    with Machine("reset_vector") as machine:
        data = machine.memory.read(0xFFFFF000, 0x1000)
    (tmp_path / "bios.bin").write_bytes(bytes(0xF000) + data)
    (tmp_path / "exit.bin").write_bytes(b"\xb0\x05\xe6\xf4")
    for file, why in (("bios.bin", "pykvm run --firmware"), ("exit.bin", "it has no header that pykvm knows")):
        done = run(tmp_path / file, "--timeout", "1")
        assert f"{file} is taken for a flat binary, to start in real mode at 0x7c00: " in done.stderr
        assert why in done.stderr
    assert done.returncode == 5
    insisted = run(tmp_path / "exit.bin", "--format", "flat")
    assert (insisted.returncode, insisted.stderr) == (5, "")
    assert '"format": "multiboot (ELF32)"' in run("multiboot_info", "--json").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["hello", "--initrd", "/nonexistent"], 65, "cannot be read"),
        (["hello", "--initrd", "/proc/self/status"], 64, "takes no --initrd"),
        (["multiboot_info", "--mode", "long"], 64, "--mode long is for ELF files"),
        (["hello", "--format", "multiboot"], 65, "no multiboot header"),
        (["reset_vector", "--append", "x"], 64, "no --append"),
        (["reset_vector", "--entry", "0x1000"], 64, "reset vector"),
        (["hello", "--firmware", "x"], 64, "one word too many"),
        (["--firmware", "x", "--format", "elf"], 64, "give one of the two"),
        (["--firmware", "/dev/null"], 65, "empty"),
        ([], 64, "something is missing"),
    ],
)
@pytest.mark.slow
def test_mistakes(arguments, status, why):
    done = run(*arguments)
    assert (done.returncode, why in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
