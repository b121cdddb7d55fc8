"""Guests in long mode and at CPL3 that are broken on purpose (broken.py), and what the explainer says of them."""

import pytest

from tests.kvm.broken import FAULT, IDT, LOAD_TSS, PD, PDPT, PML4, RELOAD, TSS, Broken, check_first_line, gate, tables

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

GUESTS = [*LONG, *USER]


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_the_first_line_names_the_cause(guest):
    check_first_line(guest)
