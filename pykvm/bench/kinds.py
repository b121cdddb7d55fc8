"""The kinds of exits and traps that ``bench exits`` measures."""

from __future__ import annotations

from pykvm.bench.kind import (
    AP_READY,
    BARE,
    CODE_GPA,
    EOI,
    FILTERED_MSR,
    GPA,
    GUEST,
    HC_MAP_GPA_RANGE,
    IPI_BACK,
    LAPIC_ON,
    PORT,
    TOUCH_GPA,
    TOUCH_STRIDE,
    UNFILTERED_MSR,
    VECTOR,
    WAIT,
    Kind,
)
from pykvm.bench.rarekinds import RARE
from pykvm.platform import LAPIC_GPA

__all__ = ["KINDS", "chosen"]

_MSR_TRASH = "xor eax, eax; xor edx, edx"

KINDS: list[Kind] = [
    # --- user space answers
    Kind("PIO out 8", f"out {PORT}, al"),
    Kind("PIO out 16", f"out {PORT}, ax"),
    Kind("PIO out 32", f"out {PORT}, eax"),
    Kind("PIO in 8", f"in al, {PORT}"),
    Kind("PIO in 16", f"in ax, {PORT}"),
    Kind("PIO in 32", f"in eax, {PORT}"),
    Kind("REP OUTSB, 8", "rep outsb", arm=f"mov edx, {PORT}; mov ecx, 8; mov esi, SCRATCH", weight=8, note="eight elements"),
    Kind("REP INSB, 8", "rep insb", arm=f"mov edx, {PORT}; mov ecx, 8; push edi; mov edi, SCRATCH", weight=8, note="eight elements"),
    Kind("MMIO write 8", "mov [ebx], al", init=f"mov ebx, {GPA}"),
    Kind("MMIO write 32", "mov [ebx], eax", init=f"mov ebx, {GPA}"),
    Kind("MMIO write 64", "mov [rbx], rax", init=f"mov ebx, {GPA}", mode="long"),
    Kind("MMIO read 8", "mov al, [ebx]", init=f"mov ebx, {GPA}"),
    Kind("MMIO read 32", "mov eax, [ebx]", init=f"mov ebx, {GPA}"),
    Kind("MMIO read 64", "mov rax, [rbx]", init=f"mov ebx, {GPA}", mode="long"),
    Kind("PIO out 8, CPL3", f"out {PORT}, al", mode="user", cost=4),
    Kind("MMIO write 32, CPL3", "mov [rbx], eax", init=f"mov ebx, {GPA}", mode="user", cost=4),
    Kind("RDMSR, user space", "rdmsr", arm=f"mov ecx, {FILTERED_MSR:#x}", device="msr", needs=("cap:KVM_CAP_X86_MSR_FILTER",)),
    Kind(
        "WRMSR, user space", "wrmsr", arm=f"mov ecx, {FILTERED_MSR:#x}; {_MSR_TRASH}", device="msr", needs=("cap:KVM_CAP_X86_MSR_FILTER",)
    ),
    Kind(
        "hypercall, user space",
        "vmcall",
        mode="long",
        device="hypercall",
        needs=("hypercalls", "cap:KVM_CAP_EXIT_HYPERCALL"),
        arm=f"mov eax, {HC_MAP_GPA_RANGE}; mov ecx, 1; xor edx, edx",
        init=f"mov ebx, {CODE_GPA:#x}",
    ),
    Kind("coalesced MMIO", "mov [ebx], eax", init=f"mov ebx, {GPA}", device="coalesced mmio", needs=("cap:KVM_CAP_COALESCED_MMIO",)),
    Kind("coalesced PIO", f"out {PORT}, al", device="coalesced pio", needs=("cap:KVM_CAP_COALESCED_PIO",)),
    # --- exits that end a run
    Kind("HLT", "hlt", reaches=BARE, reason="HLT"),
    Kind(
        "debug, single step",
        "nop",
        reaches=BARE,
        limit=True,
        reason="DEBUG",
        device="step",
        mode="long",
        needs=("single step",),
        note="every instruction exits, so the guest's clock tells nothing",
    ),
    Kind("debug, INT3", "int3", reaches=BARE, reason="DEBUG", device="int3", mode="long", needs=("software breakpoints", "sync regs")),
    Kind("debug, DR0", "nop", reaches=BARE, reason="DEBUG", device="dr0", mode="long", needs=("hardware breakpoints", "sync regs")),
    Kind("interrupt window", "nop", setup="sti", reaches=BARE, limit=True, reason="IRQ_WINDOW_OPEN", device="window", cost=50),
    Kind(
        "SHUTDOWN",
        "ud2",
        mode="long",
        reaches=BARE,
        limit=True,
        reason="SHUTDOWN",
        needs=("SHUTDOWN keeps registers",),
        note="a triple fault, again and again",
    ),
    *RARE,
    # --- in the kernel
    Kind("ioeventfd PIO", f"out {PORT}, al", reaches=GUEST, device="eventfd pio", needs=("cap:KVM_CAP_IOEVENTFD",)),
    Kind(
        "ioeventfd MMIO", "mov [ebx], eax", init=f"mov ebx, {GPA}", reaches=GUEST, device="eventfd mmio", needs=("cap:KVM_CAP_IOEVENTFD",)
    ),
    Kind("CPUID", "cpuid", arm="xor eax, eax", reaches=GUEST),
    Kind("RDMSR, in KVM", "rdmsr", arm=f"mov ecx, {UNFILTERED_MSR}", reaches=GUEST),
    Kind("WRMSR, in KVM", "wrmsr", arm=f"mov ecx, {UNFILTERED_MSR}; {_MSR_TRASH}", reaches=GUEST),
    Kind(
        "hypercall, in KVM",
        "vmcall",
        arm="mov eax, 255",
        reaches=GUEST,
        mode="long",
        needs=("hypercalls",),
        note="an unknown number: -KVM_ENOSYS",
    ),
    Kind("PIT read", "in al, 0x40", reaches=GUEST, irqchip="kernel", needs=("cap:KVM_CAP_PIT2",)),
    Kind(
        "LAPIC read",
        "mov eax, [ebx]",
        init=f"mov ebx, {LAPIC_GPA + 0x20:#x}",
        reaches=GUEST,
        irqchip="kernel",
        needs=("cap:KVM_CAP_IRQCHIP",),
    ),
    Kind(
        "LAPIC write",
        "mov [ebx], eax",
        arm="xor eax, eax",
        init=f"mov ebx, {LAPIC_GPA + 0x80:#x}",
        reaches=GUEST,
        irqchip="kernel",
        needs=("cap:KVM_CAP_IRQCHIP",),
        note="TPR",
    ),
    Kind(
        "irqfd to handler",
        f"out {PORT}, al; {WAIT}",
        arm="xor ebx, ebx",
        setup=LAPIC_ON,
        handlers={VECTOR: EOI},
        mode="long",
        reaches=GUEST,
        irqchip="kernel",
        device="irqfd",
        needs=("cap:KVM_CAP_IRQFD", "cap:KVM_CAP_IOEVENTFD"),
        cost=25,
        note="a doorbell's eventfd is the irqfd; to the handler, its EOI and back",
    ),
    Kind(
        "self-IPI",
        f"mov dword ptr [r12 + 0x250], {VECTOR | 1 << 18:#x}; {WAIT}",
        arm="xor ebx, ebx",
        setup=LAPIC_ON,
        handlers={VECTOR: EOI},
        mode="long",
        reaches=GUEST,
        irqchip="kernel",
        needs=("cap:KVM_CAP_IRQCHIP",),
        cost=25,
        note="through the LAPIC; to the handler, its EOI and back",
    ),
    Kind(
        "IPI round trip",
        f"mov dword ptr [r12 + 0x260], 1 << 24; mov dword ptr [r12 + 0x250], {VECTOR:#x}; {WAIT}",
        arm="xor ebx, ebx",
        setup=f"{LAPIC_ON}; 1: pause; cmp dword ptr [{AP_READY:#x}], 0; jz 1b",
        mode="long",
        reaches=GUEST,
        irqchip="kernel",
        cpus=2,
        needs=("cap:KVM_CAP_IRQCHIP",),
        cost=25,
        handlers={
            VECTOR: f"mov dword ptr [r12], 0; mov dword ptr [r12 + 0x260], 0; mov dword ptr [r12 + 0x250], {IPI_BACK:#x}; iretq",
            IPI_BACK: EOI,
        },
        note="to a vCPU that has halted, and back from its handler",
    ),
    Kind(
        "first touch, fresh",
        f"mov eax, [rbx]; add ebx, {TOUCH_STRIDE}",
        init=f"mov ebx, {TOUCH_GPA:#x}",
        mode="user",
        reaches=GUEST,
        device="touch fresh",
        note="the host has no page there yet",
    ),
    Kind(
        "first touch, backed",
        f"mov eax, [rbx]; add ebx, {TOUCH_STRIDE}",
        init=f"mov ebx, {TOUCH_GPA:#x}",
        mode="user",
        reaches=GUEST,
        device="touch backed",
        note="the host has the page, KVM has not",
    ),
    # --- the guest's own affairs: no exit where a CPU runs the guest and EPT or NPT is on
    Kind("WBINVD", "wbinvd", reaches=GUEST, mode="long"),
    Kind("MOV to CR3", "mov cr3, rax", arm="mov rax, r8", setup="mov r8, cr3", reaches=GUEST, mode="long"),
    Kind("INVLPG", "invlpg [rbx]", init="mov ebx, 0x200000", reaches=GUEST, mode="long"),
    Kind(
        "trap, SYSCALL",
        "syscall; lfence",
        arm="lfence",
        mode="user",
        reaches=GUEST,
        device="syscall",
        handlers={0x100: "sysretq"},
        note="SYSCALL and SYSRET",
    ),
    Kind("trap, INT 0x80", "int 0x80", arm="lfence", mode="user", reaches=GUEST, handlers={0x80: "iretq"}, note="INT and IRETQ"),
    Kind("trap, INT3", "int3", arm="lfence", mode="user", reaches=GUEST, handlers={3: "iretq"}, note="#BP and IRETQ"),
    Kind("trap, #UD", "ud2", arm="lfence", mode="user", reaches=GUEST, handlers={6: "add qword ptr [rsp], 2; iretq"}, note="UD2 and IRETQ"),
    Kind(
        "trap, #PF",
        "mov ecx, [rbx]",
        arm="lfence",
        init="xor ebx, ebx",
        mode="user",
        reaches=GUEST,
        handlers={14: "add rsp, 8; add qword ptr [rsp], 2; iretq"},
        note="a page that is not present, and IRETQ",
    ),
]


def chosen(words: list[str]) -> list[Kind]:
    """The kinds that ``words`` name, each in full or by how several begin; all without words."""
    from pykvm.errors import ConfigError

    if not words:
        return list(KINDS)
    names: set[str] = set()
    for word in map(str.lower, words):
        exact = {kind.name for kind in KINDS if kind.name.lower() == word}
        found = exact or {kind.name for kind in KINDS if kind.name.lower().startswith(word)}
        if not found:
            raise ConfigError(f"unknown kind {word!r}: use one of these, or how it begins: {'; '.join(kind.name for kind in KINDS)}")
        names |= found
    return [kind for kind in KINDS if kind.name in names]
