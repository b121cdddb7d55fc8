"""Guests that are broken on purpose, and what the explainer has to say of each: the true cause, in the first line.

A Broken: its name, the mode it starts in, its source, and what the first line must say. Where a host cannot get as far, the
row says so, and a probe decides. Where KVM's emulator runs CPL0 code (probe.cpl0_emulated), ``emulated`` is the line, and
``unchecked`` says that this emulator does not check what is broken, so that the guest runs on. ``lenient`` marks what QEMU's TCG
does not check (segment limits and rights, reserved bits, most of SSE's alignment): there the guest is its own probe, since it halts
right behind the broken instruction. Where a triple fault loses the registers (AMD-V), the explainer runs the image again to find the
place: the same line.
"""

import re
from pathlib import Path

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from tests.conftest import TIMEOUT

ORG = {"real": 0x7C00, "protected": 0x100000, "long": 0x100000, "user": 0x100000}
BITS = {"real": 16, "protected": 32, "long": 64, "user": 64}
IDT, TSS = 0x180000, 0x181000  # where the guests put theirs
PML4, PDPT, PD = 0x9000, 0xA000, 0xB000  # where long mode's tables are (platform.PAGE_TABLES_GPA)


class Broken:
    """One of them. ``memory``: its RAM; ``limit``: seconds after which it is stopped, for one that does not crash."""

    def __init__(self, name, mode, source, first, *, emulated=None, unchecked=False, lenient=False, memory="2M", limit=None):
        self.name, self.mode, self.source, self.first = name, mode, source, first
        self.emulated, self.unchecked, self.lenient = emulated or first, unchecked, lenient
        self.memory, self.limit = memory, limit

    def machine(self):
        source = self.source if "handler" in self.source else self.source + "; hlt"  # where a host does not check, it ends here
        return Machine(pykvm.asm(source, bits=BITS[self.mode], org=ORG[self.mode]), mode=self.mode, memory=self.memory)

    def explanation(self):
        with self.machine() as machine:
            try:
                return machine.run(self.limit or TIMEOUT).explanation
            except GuestCrash as crash:
                return crash.explanation


def gate(vector, *, access=0x8E, selector=0x10, ist=0, handler="handler"):
    """Code that writes a 64-bit gate into the IDT."""
    at = IDT + 16 * vector
    return (
        f"mov eax, offset {handler}; mov [{at}], ax; mov word ptr [{at + 2}], {selector}; mov word ptr [{at + 4}], {access << 8 | ist}; "
        f"shr eax, 16; mov [{at + 6}], ax; "
    )


def gate32(vector, *, access=0x8E, selector=8):
    """The same for protected mode."""
    at = IDT + 8 * vector
    return (
        f"mov eax, offset handler; mov [{at}], ax; mov word ptr [{at + 2}], {selector}; mov word ptr [{at + 4}], {access << 8}; "
        f"shr eax, 16; mov [{at + 6}], ax; "
    )


def tables(gdt="", idt_limit=0xFFF, idt=IDT):
    """Data: the operands of LIDT and LGDT, a GDT of one's own, and the handler, which is never reached."""
    return f"handler: hlt; idtr: .word {idt_limit}; .quad {idt}; gdtr: .word gdtend - gdt - 1; .long gdt, 0; .balign 8; gdt: {gdt} gdtend:"


def own_gdt(entry):
    """A GDT for protected mode: null, code, then data as it should be, then ``entry`` at 0x18."""
    return f".quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, {entry:#x};"


def far(selector):
    """JMP ptr16:32."""
    return f".byte 0xea; .long handler; .word {selector};"


RELOAD = "mov rax, cr3; mov cr3, rax; "
LOAD_TSS = (
    f"mov rax, 0x0000891810000067; mov [0x1038], rax; mov qword ptr [0x1040], 0; mov ax, 0x38; ltr ax; mov word ptr [{TSS + 102}], 104; "
)
FAULT = r"triple fault: .*"


def check_first_line(guest):
    """Run it: the first line of the explanation names the cause."""
    emulated = guest.mode != "user" and probe.cpl0_emulated()
    if guest.name == "pae_forgotten" and "QEMU TCG" in Path("/proc/cpuinfo").read_text():
        pytest.skip("QEMU's TCG hangs for good, the host with it, when a guest sets EFER.LME with CR4.PAE clear")
    if emulated and guest.unchecked:
        pytest.skip("this host's KVM emulates CPL0 code (probed), and its emulator does not check this")
    explanation = guest.explanation()
    if guest.lenient and (not explanation or "`hlt` at" in explanation.partition("\n")[0]):  # CPL3 may not halt
        pytest.skip("this host's CPU does not check it: the guest ran past what is broken, and halted")
    want = guest.emulated if emulated else guest.first
    assert re.search(want, explanation.partition("\n")[0]), explanation
