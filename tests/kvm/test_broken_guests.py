"""Guests in real and protected mode that are broken on purpose (broken.py), and what the explainer says of them; and of stranger states."""

import random
import re

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from pykvm.debug.causes.delivery import came_by, undeliverable
from pykvm.debug.causes.first import first_exception, way_here
from pykvm.x86.view import CpuView
from tests.conftest import FEW, TIMEOUT
from tests.kvm.broken import FAULT, ORG, Broken, check_first_line, far, gate, gate32, own_gdt, tables

# IVT entries that lead out of memory: 64 KiB of it, and F000:0000.
IVT_OUT = "xor ax, ax; mov ds, ax; mov bx, 2; 1: mov word ptr [bx], 0xf000; add bx, 4; cmp bx, 0x80; jb 1b; "
LED = r"jumped to 0xf0000.*no memory, where vector {} has led: .*"

REAL = [
    Broken("ivt_out_of_memory", "real", IVT_OUT + "ud2", LED.format(6) + "`ud2` raises #UD", memory="64K"),
    Broken("real_divide", "real", IVT_OUT + "xor cx, cx; div cx", LED.format(0) + "divides by zero: cx is 0", memory="64K"),
    Broken(
        "real_limit", "real", IVT_OUT + "mov bx, 0xffff; mov ax, [bx]", LED.format(13) + "offset 0x10000 of DS.*limit 0xffff", memory="64K"
    ),
    Broken("real_int", "real", IVT_OUT + "int 0x10", LED.format(16) + "`int 0x10` calls vector 16", memory="64K"),
    Broken(
        "real_paging",
        "real",
        IVT_OUT + "mov eax, cr0; or eax, 0x80000000; mov cr0, eax",
        LED.format(13) + r"paging \(PG\) is set without protection \(PE\)",
        memory="64K",
    ),
    Broken("real_ltr", "real", IVT_OUT + "ltr ax", LED.format(6) + "`ltr ax`: it does not exist in real mode", memory="64K"),
    Broken(
        "ivt_limit",
        "real",
        "lidt [idtr]; ud2; idtr: .word 3; .long 0",
        FAULT + "`ud2` raises #UD.*beyond the vector table's limit 0x3",
        unchecked=True,
    ),
]

LGDT = "lgdt [gdtr]; "
PROTECTED = [
    Broken(
        "null_ds",
        "protected",
        "xor eax, eax; mov ds, ax; mov eax, [0x100000]",
        FAULT + r"`mov eax, .*0x100000\]` uses DS, which holds a null selector \(0x0\) \(#GP\)",
        lenient=True,
    ),
    Broken(
        "limit",
        "protected",
        LGDT + "mov ax, 0x18; mov ds, ax; mov eax, [0x1000];" + tables(own_gdt(0x0040930000000FFF)),
        FAULT + r"reaches offset 0x1003 of DS \(0x18\), beyond the segment's limit 0xfff \(#GP\)",
        lenient=True,
    ),
    Broken(
        "expand_down",
        "protected",
        LGDT + "mov ax, 0x18; mov ds, ax; mov eax, [0x100];" + tables(own_gdt(0x0040970000000FFF)),
        FAULT + r"reaches offset 0x100 of DS \(0x18\), an expand-down segment, which holds only offsets above its limit 0xfff",
        lenient=True,
    ),
    Broken(
        "stack_limit",
        "protected",
        LGDT + "mov ax, 0x18; mov ss, ax; mov esp, 0x1008; push eax; push eax;" + tables(own_gdt(0x0040930000000FFF)),
        FAULT + r"`push eax` reaches offset 0x1007 of SS \(0x18\), beyond the segment's limit 0xfff \(#SS\)",
        lenient=True,
    ),
    Broken(
        "read_only_segment",
        "protected",
        LGDT + "mov ax, 0x18; mov ds, ax; mov [0x100], eax;" + tables(own_gdt(0x0040910000000FFF)),
        FAULT + r"writes through DS \(0x18\), a read-only data segment \(#GP\)",
        lenient=True,
    ),
    Broken(
        "write_to_code", "protected", "mov cs:[0x100000], eax", FAULT + r"writes through CS \(0x8\), a code segment \(#GP\)", lenient=True
    ),
    Broken(
        "execute_only",
        "protected",
        LGDT + "mov ax, 0x18; mov ds, ax;" + tables(own_gdt(0x0040990000000FFF)),
        FAULT + "loads DS with selector 0x18, which is 32-bit code: no data, and no code that may be read",
    ),
    Broken("jump_to_data", "protected", far(0x18) + tables(), FAULT + r"goes to CS selector 0x18, which is data, no code segment \(#GP\)"),
    Broken(
        "jump_absent",
        "protected",
        LGDT + far(0x18) + tables(own_gdt(0x00CF1B000000FFFF)),
        FAULT + r"goes to CS selector 0x18, which is not present \(#NP\)",
    ),
    Broken(
        "far_return_null",
        "protected",
        "push 0; push offset handler; retf;" + tables(),
        FAULT + r"`retf` returns to a null CS selector \(0x0\) \(#GP\)",
    ),
    Broken(
        "gdt_limit",
        "protected",
        "lgdt [small]; mov ax, 0x18; mov es, ax; small: .word 0xf; .long 0x1000",
        FAULT + "loads ES with selector 0x18, which is beyond the GDT's limit 0xf",
    ),
    Broken(
        "ds_absent",
        "protected",
        LGDT + "mov ax, 0x18; mov ds, ax;" + tables(own_gdt(0x00CF13000000FFFF)),
        FAULT + r"loads DS with selector 0x18, which is not present \(#NP\)",
    ),
    Broken(
        "ss_absent",
        "protected",
        LGDT + "mov ax, 0x18; mov ss, ax;" + tables(own_gdt(0x00CF13000000FFFF)),
        FAULT + r"loads SS with selector 0x18, which is not present \(#SS\)",
    ),
    Broken(
        "ss_is_code",
        "protected",
        "mov eax, 8; mov ss, ax",
        FAULT + "loads SS with selector 0x8, which is 32-bit code, no writable data segment",
    ),
    Broken("ss_rpl", "protected", "mov eax, 0x1b; mov ss, ax", FAULT + "loads SS with selector 0x1b, whose RPL is 3, and CPL is 0"),
    Broken("ss_null", "protected", "xor eax, eax; mov ss, ax", FAULT + r"loads SS with a null selector \(0x0\)"),
    Broken(
        "int_beyond_idt",
        "protected",
        "lidt [idtr]; int 0x40;" + tables(idt_limit=0xFF),
        FAULT + "`int 0x40` calls vector 64.*its IDT entry is beyond the IDT's limit 0xff",
    ),
    Broken(
        "gate_absent",
        "protected",
        gate32(6, access=0x0E) + "lidt [idtr]; ud2;" + tables(),
        FAULT + r"`ud2` raises #UD.*its gate is not present \(P = 0\)",
    ),
    Broken(
        "gate_type",
        "protected",
        gate32(6, access=0x8C) + "lidt [idtr]; ud2;" + tables(),
        FAULT + r"`ud2` raises #UD.*of a type that is no gate here: call gate \(type 0xc\)",
        unchecked=True,
    ),
    Broken(
        "gate_to_data",
        "protected",
        gate32(6, selector=0x18) + "lidt [idtr]; ud2;" + tables(),
        FAULT + "`ud2` raises #UD.*its gate's code segment 0x18 is data, no code",
        unchecked=True,
    ),
    Broken(
        "gate_to_absent_code",
        "protected",
        LGDT + gate32(6, selector=0x18) + "lidt [idtr]; ud2;" + tables(own_gdt(0x00CF1B000000FFFF)),
        FAULT + "`ud2` raises #UD.*its gate's code segment 0x18 is not present",
        unchecked=True,
    ),
    Broken(
        "pae_forgotten",
        "protected",
        "mov ecx, 0xc0000080; rdmsr; or eax, 0x100; wrmsr; mov eax, 0x9000; mov cr3, eax;mov eax, cr0; or eax, 0x80000000; mov cr0, eax",
        FAULT + r"`mov cr0, eax` .*CR0.PG is set with EFER.LME but CR4.PAE clear: long mode needs PAE \(#GP\)",
    ),
    Broken(
        "paging_without_protection",
        "protected",
        "mov eax, 0x80000010; mov cr0, eax",
        FAULT + r"`mov cr0, eax` \(CR0 = 0x80000010\): paging \(PG\) is set without protection \(PE\) \(#GP\)",
    ),
    Broken(
        "beyond_cs",
        "protected",
        LGDT + ".byte 0xea; .long 1f; .word 0x18; 1: jmp 2f; .fill 0x1000; 2: hlt;" + tables(own_gdt(0x00C09B0000000100)),
        FAULT + r"`jmp 0x10.*` goes to 0x10\w+, beyond the limit 0x100fff of CS",
        lenient=True,
    ),
]

GUESTS = [*REAL, *PROTECTED]


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_the_first_line_names_the_cause(guest):
    check_first_line(guest)


def test_empty_interrupt_vectors():
    """An exception leads to 0000:0000 and on through zeros, which are instructions."""
    if not probe.interruptible_with_if_clear():
        pytest.skip("this host leaves a guest with RFLAGS.IF clear uninterrupted: a fault of its emulation of VT-x")
    source = "xor ax, ax; mov ds, ax; mov word ptr [26], 0x800; mov bx, 0; ud2"  # vector 6 to 0800:0000, all zeros
    with Machine(pykvm.asm(source, bits=16, org=0x7C00), mode="real", memory="2M") as machine:
        machine.memory.write(0x8100, pykvm.asm("jmp 0", bits=16, org=0x100))  # round and round in the zeros
        first = [machine.run(0.02).explanation.partition("\n")[0] for _ in range(3)]
    want = r"runs through memory that holds only zeros, at 0x8.*left its code, where vector 6 has led: `ud2` raises #UD"
    assert any(re.search(want, line) for line in first), first  # chance may stop it at the jump


def test_halting_with_interrupts_off_is_no_crash():
    with Machine(pykvm.asm("cli; hlt"), mode="long", memory="2M", irqchip="kernel") as machine:
        result = machine.run(TIMEOUT)
    assert (result.reason, result.explanation) == ("halted", "")


class _Once:
    """A device that is not there when the image is run again."""

    def read(self, offset, size):
        return 1


def test_a_lost_place_is_said_to_be_lost():
    """Where the registers are lost, and running the image again ends otherwise, no place is made up."""
    if probe.shutdown_keeps_registers():
        pytest.skip("this host keeps the registers of a triple fault (probed)")
    with Machine(pykvm.asm("mov dx, 0x300; in al, dx; cmp al, 1; jne 1f; ud2; 1: hlt"), mode="long", memory="2M") as machine:
        machine.add_device(_Once(), port=0x300)
        with pytest.raises(GuestCrash, match=r"triple fault.*the place is lost") as crash:
            machine.run(TIMEOUT)
    assert "run again, it ended otherwise" in crash.value.explanation


def test_a_fault_inside_a_handler():
    """Its registers where they are kept; else the exception that led into the handler, and that the rest is lost."""
    source = gate(6) + "lidt [idtr]; ud2; handler: mov rbx, 0x8000000000; mov rax, [rbx]; " + tables().replace("handler: hlt;", "")
    with Machine(pykvm.asm(source, org=ORG["long"]), mode="long", memory="2M") as machine, pytest.raises(GuestCrash) as crash:
        machine.run(TIMEOUT)
    kept = r"`mov rax, qword ptr \[rbx\]` reads 0x8000000000: the PML4 entry is not present"
    lost = "triple fault in the handler of #UD or behind it: `ud2` raises #UD on purpose"
    assert re.search(kept if probe.shutdown_keeps_registers() else lost, str(crash.value))


@pytest.mark.parametrize("mode", ORG)
def test_no_state_is_too_broken_to_be_explained(mode):
    """Any bytes as code, any registers, tables anywhere: causes are looked for, and nothing raises."""
    chance = random.Random(mode)
    values = [0, 1, 0x10, 0x2B, 0xFFFF, 0x8000, 0x100000, 0x1FFFFC, 0xD0000000, 1 << 47, 1 << 63, (1 << 64) - 1]
    with Machine(b"\xf4", mode=mode, memory="2M") as machine:
        for _ in range(min(FEW, 12)):
            first = chance.choice([b"", b"\x0f", b"\x66", b"\xf0", b"\xf3", b"\x8e", b"\xff", b"\xcf", b"\xcb", b"\xcd", b"\xc5\xf8"])
            machine.memory.write(ORG[mode], first + chance.randbytes(14))
            view = CpuView(machine.vcpu, machine.memory)
            for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rflags"):
                setattr(view.regs, name, chance.choice(values))
            for name in ("gdt", "idt"):
                table = getattr(view.sregs, name)
                table.base, table.limit = chance.choice(values), chance.choice([0, 7, 0x47, 0xFFF, 0xFFFF])
            for _ in range(2):
                cause = first_exception(view)
                assert str(cause)
                undeliverable(view, 13 if cause.vector is None else cause.vector, cause.software)
                undeliverable(view, 8)
                came_by(view, strayed=True)
                way_here(view)
                view.regs.rip = chance.choice(values)
                view.reset_to(view.regs, view.sregs)
