"""Guests that are broken on purpose, and what the explainer says of each: the true cause, in the first line.

Each row of GUESTS: its name, the mode it starts in, its source, and what the first line must say. Where a host cannot get as far, the
row says so, and a probe decides. Where KVM's emulator runs CPL0 code (probe.cpl0_emulated), ``emulated`` is the line, and
``unchecked`` says that this emulator does not check what is broken, so that the guest runs on. ``lenient`` marks what QEMU's TCG
does not check (segment limits and rights, reserved bits, most of SSE's alignment): there the guest is its own probe, since it halts
right behind the broken instruction. Where a triple fault loses the registers (AMD-V), the explainer runs the image again to find the
place: the same line.
"""

import random
import re
from pathlib import Path

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from pykvm.debug.causes.delivery import came_by, undeliverable
from pykvm.debug.causes.first import first_exception, way_here
from pykvm.x86.view import CpuView
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


# IVT entries that lead out of memory: 64 KiB of it, and F000:0000.
IVT_OUT = "xor ax, ax; mov ds, ax; mov bx, 2; 1: mov word ptr [bx], 0xf000; add bx, 4; cmp bx, 0x80; jb 1b; "
LED = r"jumped to 0xf0000.*no memory, where vector {} has led: .*"
RELOAD = "mov rax, cr3; mov cr3, rax; "
LOAD_TSS = (
    f"mov rax, 0x0000891810000067; mov [0x1038], rax; mov qword ptr [0x1040], 0; mov ax, 0x38; ltr ax; mov word ptr [{TSS + 102}], 104; "
)
FAULT = r"triple fault: .*"

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

LONG = [
    Broken("no_idt", "long", "ud2", FAULT + "`ud2` raises #UD.*the IDT limit is 0"),
    Broken(
        "misaligned_sse",
        "long",
        "mov rsp, 0x1ffff8; movaps [rsp], xmm0",
        r"`movaps xmmword ptr \[rsp\], xmm0` needs a 16-byte aligned operand and RSP is 0x1ffff8 \(#GP\)",
    ),
    Broken(
        "sse_without_osfxsr",
        "long",
        "mov rax, cr4; btr eax, 9; mov cr4, rax; xorps xmm0, xmm0",
        r"`xorps xmm0, xmm0`: SSE needs CR4.OSFXSR, which is clear \(CR4 = 0x\w+\) \(#UD\)",
    ),
    Broken(
        "avx_without_osxsave",
        "long",
        "vxorps ymm0, ymm0, ymm0",
        r"`vxorps ymm0, ymm0, ymm0`: AVX needs CR4.OSXSAVE, which is clear .*\(#UD\)",
    ),
    Broken("x87_emulated", "long", "mov rax, cr0; or eax, 4; mov cr0, rax; fld1", r"`fld1`: CR0.EM is set.*\(#NM\)"),
    Broken("x87_task_switched", "long", "mov rax, cr0; or eax, 8; mov cr0, rax; fld1", "`fld1`: CR0.TS is set, so the FPU raises #NM"),
    Broken("jump_not_canonical", "long", "mov rax, 0x800000000000; jmp rax", FAULT + r"0x800000000000.* not canonical.*\(#GP\)"),
    Broken(
        "read_not_canonical",
        "long",
        "mov rbx, 0x8000000000000000; mov eax, [rbx]",
        FAULT + r"`mov eax, dword ptr \[rbx\]` uses 0x8000000000000000, which is not canonical \(#GP\)",
    ),
    Broken(
        "stack_not_canonical",
        "long",
        "mov rsp, 0x800000000008; push rax; push rax",
        FAULT + r"`push rax` pushes to 0x800000000000, which is not canonical \(#SS\)",
    ),
    Broken(
        "nx_fetch",
        "long",
        f"bts qword ptr [{PD + 8}], 63; {RELOAD} mov eax, 0x200000; call rax",
        FAULT
        + r"the instruction at 0x200000 cannot be fetched: the page is not executable \(NX = 1\), where `call rax` at \w+ has led \(#PF\)",
        memory="4M",
    ),
    Broken(
        "write_read_only",
        "long",
        f"btr qword ptr [{PD + 8}], 1; {RELOAD} mov [0x200010], eax",
        FAULT + r"`mov dword ptr \[0x200010\], eax` writes to 0x200010: the page is read-only \(R/W = 0\) \(#PF\)",
        memory="4M",
    ),
    Broken(
        "reserved_bit",
        "long",
        f"bts qword ptr [{PD + 8}], 13; {RELOAD} mov eax, [0x200010]",
        FAULT + r"reads 0x200010: reserved bits are set in the PD entry \(0x2000\) \(#PF\)",
        memory="4M",
    ),
    Broken(
        "pml4_absent",
        "long",
        "mov rbx, 0x8000000000; mov eax, [rbx]",
        FAULT + r"`mov eax, dword ptr \[rbx\]` reads 0x8000000000: the PML4 entry is not present \(P = 0\) \(#PF\)",
    ),
    Broken(
        "table_loop",
        "long",
        f"mov qword ptr [{PML4}], {PML4 + 3}; {RELOAD} nop",
        FAULT + r"cannot be fetched: the PT entry is not present .*the tables loop: the PML4 at gpa 0x9000 is its own PDPT.*\(#PF\)",
    ),
    Broken(
        "table_in_a_hole",
        "long",
        "mov rax, 0xd0000000; mov cr3, rax; nop",
        r"the PML4 entry at gpa 0xd0000000 lies where the guest has no memory",
    ),
    Broken(
        "stack_overflow",
        "long",
        f"mov rax, [{PD + 8}]; mov [{PD + 16}], rax; mov qword ptr [{PD + 8}], 0; {RELOAD} mov esp, 0x400020; 1: call 1b",
        FAULT + r"`call 0x10\w+` pushes to 0x3ffff8: the PD entry is not present \(P = 0\) \(#PF\)",
        memory="4M",
    ),
    Broken(
        "stack_in_a_hole",
        "long",
        gate(6) + "lidt [idtr]; mov esp, 0xd0001000; ud2;" + tables(),
        r"`ud2` raises #UD.*its frame goes below RSP = 0xd0001000, to gpa 0xd0000fd8, where there is no memory",
    ),
    Broken(
        "idt_in_a_hole",
        "long",
        "lidt [idtr]; ud2;" + tables(idt=0xD0000000),
        r"`ud2` raises #UD.*its IDT entry is at 0xd0000060, where there is no memory",
    ),
    Broken(
        "gdt_in_a_hole",
        "long",
        "sti; lgdt [bad]; mov eax, 0x18; mov ds, ax; bad: .word 0xff; .quad 0xd0000000",
        r"`mov ds, e?ax` loads DS with selector 0x18, which is in the GDT at 0xd0000000, where there is no memory",
        limit=0.05,
    ),
    Broken(
        "idt_not_mapped",
        "long",
        "lidt [idtr]; ud2;" + tables(idt=0x8000000000),
        FAULT + r"`ud2` raises #UD.*its IDT entry is at 0x8000000060, which is not mapped: the PML4 entry is not present",
    ),
    Broken(
        "gate_to_32_bit_code",
        "long",
        gate(6, selector=8) + "lidt [idtr]; ud2;" + tables(),
        FAULT + "`ud2` raises #UD.*its gate's code segment 0x8 is 32-bit code, and handlers in long mode are 64-bit",
        unchecked=True,
    ),
    Broken(
        "gate_to_null",
        "long",
        gate(6, selector=0) + "lidt [idtr]; ud2;" + tables(),
        FAULT + "`ud2` raises #UD.*its gate's code segment 0x0 is null",
    ),
    Broken(
        "gate_to_beyond_gdt",
        "long",
        gate(6, selector=0x80) + "lidt [idtr]; ud2;" + tables(),
        FAULT + "`ud2` raises #UD.*its gate's code segment 0x80 is beyond the GDT's limit 0x47",
    ),
    Broken(
        "gate_not_canonical",
        "long",
        gate(6) + f"mov dword ptr [{IDT + 16 * 6 + 8}], 0x80000000; lidt [idtr]; ud2;" + tables(),
        FAULT + "`ud2` raises #UD.*its handler 0x80000000001.* is not canonical",
        emulated="RIP 0x80000000001.* is not canonical, where vector 6 has led: `ud2` raises #UD",
    ),
    Broken(
        "ist_in_a_hole",
        "long",
        gate(6, ist=1) + f"mov rax, 0xd0001000; mov [{TSS + 36}], rax; {LOAD_TSS} lidt [idtr]; ud2;" + tables(),
        r"`ud2` raises #UD.*its frame goes below IST1 of the TSS = 0xd0001000, to gpa 0xd0000fd8, where there is no memory",
    ),
    Broken(
        "ist_not_mapped",
        "long",
        gate(6, ist=2) + f"mov rax, 0x8000001000; mov [{TSS + 44}], rax; {LOAD_TSS} lidt [idtr]; ud2;" + tables(),
        FAULT
        + r"`ud2` raises #UD.*its frame goes below IST2 of the TSS = 0x8000001000, and 0x8000000fd8 cannot be written: the PML4 entry",
    ),
    Broken("ltr_null", "long", "xor eax, eax; ltr ax", FAULT + r"`ltr ax`: LTR of a null selector \(0x0\) \(#GP\)", lenient=True),
    Broken("ltr_busy", "long", "mov eax, 0x38; ltr ax", FAULT + r"`ltr ax` with selector 0x38: LTR of a busy TSS .*\(#GP\)"),
    Broken("ltr_of_data", "long", "mov eax, 0x18; ltr ax", FAULT + r"LTR of what is data, no available TSS \(#GP\)"),
    Broken("lldt_of_code", "long", "mov eax, 0x10; lldt ax", FAULT + r"LLDT of what is 64-bit code, no LDT \(#GP\)"),
    Broken(
        "iretq_null_cs",
        "long",
        "push 0x18; push 0x1000; push 2; push 0; push offset handler; iretq;" + tables(),
        FAULT + r"`iretq` returns to a null CS selector \(0x0\) \(#GP\)",
    ),
    Broken(
        "iretq_null_ss",
        "long",
        "push 0; push 0x1000; push 2; push 0x33; push offset handler; iretq;" + tables(),
        FAULT + r"`iretq` returns with a null SS selector \(0x0\) to CPL3 \(#GP\)",
    ),
    Broken(
        "iretq_wrong_rpl",
        "long",
        "push 0x2b; push 0x1000; push 2; push 0x13; push offset handler; iretq;" + tables(),
        FAULT + "`iretq` returns to CS selector 0x13, whose DPL is 0 and whose RPL is 3",
    ),
    Broken(
        "iretq_not_canonical",
        "long",
        "push 0x18; push 0x1000; push 2; push 0x10; mov rax, 0x900000000000; push rax; iretq",
        FAULT + r"(`iretq` goes to RIP 0x900000000000, which|RIP 0x900000000000) is not canonical \(#GP\)",
    ),
    Broken(
        "cr0_high",
        "long",
        "mov rax, cr0; bts rax, 40; mov cr0, rax",
        FAULT + "`mov cr0, rax`.*bits 63 to 32 are reserved",
        unchecked=True,
        lenient=True,
    ),
    Broken("cr0_nw", "long", "mov rax, cr0; bts eax, 29; mov cr0, rax", FAULT + "`mov cr0, rax`.*NW is set without CD"),
    Broken(
        "cr4_reserved",
        "long",
        "mov rax, cr4; bts rax, 40; mov cr4, rax",
        FAULT + r"`mov cr4, rax`.*reserved bits are set \(0x10000000000\)",
        unchecked=True,
        lenient=True,
    ),
    Broken("cr4_pae", "long", "mov rax, cr4; btr eax, 5; mov cr4, rax", FAULT + "`mov cr4, rax`.*PAE cannot be cleared in long mode"),
    Broken(
        "cr3_reserved",
        "long",
        "mov rax, cr3; bts rax, 61; mov cr3, rax",
        r"(triple fault|refused to enter the guest).*: `mov cr3, rax`.*: bits above the \d+ physical address bits",
    ),
    Broken("cr8_reserved", "long", "mov eax, 16; mov cr8, rax", FAULT + "`mov cr8, rax`.*bits 63 to 4 are reserved"),
    Broken(
        "wrmsr_unknown",
        "long",
        "mov ecx, 0x12345678; wrmsr",
        FAULT + r"`wrmsr` writes MSR 0x12345678, which this vCPU does not have \(#GP\)",
    ),
    Broken(
        "efer_reserved",
        "long",
        "mov ecx, 0xc0000080; rdmsr; bts eax, 17; wrmsr",
        FAULT + r"`wrmsr` writes 0x\w+ to MSR 0xc0000080 \(IA32_EFER\): reserved bits are set \(0x20000\)",
    ),
    Broken(
        "efer_lme",
        "long",
        "mov ecx, 0xc0000080; rdmsr; btr eax, 8; wrmsr",
        FAULT + r"IA32_EFER\): LME cannot be changed while paging is on",
    ),
    Broken(
        "fs_base_not_canonical",
        "long",
        "mov ecx, 0xc0000100; xor eax, eax; mov edx, 0x8000; wrmsr",
        FAULT + r"`wrmsr` writes 0x800000000000 to MSR 0xc0000100 \(IA32_FS_BASE\): the address is not canonical \(#GP\)",
        lenient=True,
    ),
    Broken("xsetbv_off", "long", "xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv", FAULT + r"`xsetbv`: CR4.OSXSAVE is clear \(#UD\)"),
    Broken(
        "xsetbv_zero",
        "long",
        "mov rax, cr4; bts eax, 18; mov cr4, rax; xor ecx, ecx; xor edx, edx; xor eax, eax; xsetbv",
        FAULT + r"(`xsetbv` writes 0x0 to XCR0: bit 0 \(x87\) must be set \(#GP\)|OSXSAVE is set, and this vCPU's CPUID does not have it)",
    ),
    Broken(
        "syscall_off", "long", "mov ecx, 0xc0000080; rdmsr; btr eax, 0; wrmsr; syscall", FAULT + r"`syscall`: EFER.SCE is clear \(#UD\)"
    ),
    Broken(
        "divide_by_zero", "long", "xor ecx, ecx; mov eax, 1; xor edx, edx; div ecx", FAULT + r"`div ecx` divides by zero: ecx is 0 \(#DE\)"
    ),
    Broken(
        "divide_overflow",
        "long",
        "mov eax, 0; mov edx, 5; mov ecx, 5; div ecx",
        FAULT + r"`div ecx` overflows: 0x500000000 / 0x5 does not fit in 32 bits \(#DE\)",
    ),
    Broken(
        "idiv_overflow",
        "long",
        "mov eax, 0x80000000; cdq; mov ecx, -1; idiv ecx",
        FAULT + r"`idiv ecx` overflows: 0xffffffff80000000 / 0xffffffff does not fit",
    ),
    Broken(
        "run_into_data",
        "long",
        "call 1f; .byte 0x06, 0x07, 0x0e; 1: ret",
        FAULT + r"the bytes 06 07 0e .*at RIP 0x100005 are no instruction.*return.*\(#UD\)",
        emulated=r"the bytes 06 07 0e .*are no instruction.*return",
    ),
    Broken(
        "self_modified",
        "long",
        "mov dword ptr [rip + 1f], 0x06060606; jmp 1f; 1: nop; nop; nop; nop",
        r"06 06 06 06.* at (RIP )?0x\w+,? (are|which are) no instruction",
    ),
    Broken(
        "call_into_a_hole",
        "long",
        "mov eax, 0xd0000000; call rax",
        r"jumped to 0xd0000000.*no memory, where `call rax` at 0x100005 has led",
    ),
    Broken(
        "run_through_zeros",
        "long",
        "mov eax, 0x1ffff0; mov ebx, eax; mov eax, 0x180000; jmp rbx",
        "ran through memory that holds only zeros, up to 0x200000, gpa 0x200000, where there is no memory",
    ),
]

# Long mode that goes on to CPL3 by itself: pages for the user, a TSS, then IRETQ.
TO_USER = (
    f"or qword ptr [{PML4}], 4; or qword ptr [{PDPT}], 4; or qword ptr [{PD}], 4; {RELOAD} {LOAD_TSS} lidt [idtr]; "
    "push 0x2b; push 0x1f0000; push 2; push 0x33; push offset user; iretq; "
)
RAISES = "the guest's program raised "
USER = [
    Broken(
        "no_rsp0",
        "long",
        gate(6) + TO_USER + "user: ud2;" + tables(),
        FAULT + "`ud2` raises #UD.*its frame goes below RSP0 of the TSS = 0x0, and 0xf+d8 cannot be written: the PML4 entry is not present",
    ),
    Broken(
        "user_misaligned",
        "user",
        "mov rsp, 0x180008; movaps xmm0, [rsp]",
        RAISES + r"#GP .*`movaps xmm0, xmmword ptr \[rsp\]` at 0x100007: needs a 16-byte aligned operand and RSP is 0x180008",
    ),
    Broken(
        "user_misaligned_sum",
        "user",
        "mov eax, 0x180008; xorps xmm0, [rax]",
        RAISES + r"#(GP|UD) .*`xorps xmm0, xmmword ptr \[rax\]` .*needs a 16-byte aligned operand and RAX is 0x180008",
        lenient=True,
    ),
    Broken("user_privileged", "user", "mov rax, cr0", RAISES + "#GP .*`mov rax, cr0` at 0x100000: is privileged, and CPL is 3"),
    Broken(
        "user_null", "user", "xor ebx, ebx; mov [rbx + 8], eax", RAISES + "#PF .*touched 0x8 .*: writes to 0x8: the PT entry is not present"
    ),
    Broken("user_kernel_page", "user", "mov eax, [0x9000]", RAISES + "#PF .*touched 0x9000 .*: the page is for the supervisor only"),
    Broken("user_divide", "user", "xor ecx, ecx; div rcx", RAISES + "#DE .*`div rcx` at 0x100002: divides by zero: rcx is 0"),
    Broken(
        "user_not_canonical",
        "user",
        "mov rbx, 0xff00000000000000; mov al, [rbx]",
        RAISES + "#GP .*: uses 0xff00000000000000, which is not canonical",
    ),
    Broken(
        "user_stack", "user", "mov esp, 0x1000; push rax", RAISES + "#PF .*touched 0xff8 .*: pushes to 0xff8: the PT entry is not present"
    ),
    Broken(
        "user_kernel_jump",
        "user",
        "mov eax, 0x9000; jmp rax",
        RAISES + "#PF .*touched 0x9000 .*an instruction fetch.*the page is for the supervisor only",
    ),
    Broken(
        "user_far",
        "user",
        "push 0x10; push offset 1f; .byte 0x48, 0xcb; 1: nop",
        RAISES + "#GP .*returns to CS selector 0x10, whose RPL 0 is more privileged than CPL 3",
    ),
    Broken(
        "user_ds",
        "user",
        "mov eax, 0x18; mov ds, ax",
        RAISES + "#GP .*loads DS with selector 0x18, whose DPL is 0: too privileged for RPL 0 and CPL 3",
    ),
]

GUESTS = [*REAL, *PROTECTED, *LONG, *USER]


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_the_first_line_names_the_cause(guest):
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
        for _ in range(12):
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
