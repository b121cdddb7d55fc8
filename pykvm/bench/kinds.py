"""The kinds of exits and traps that ``bench exits`` measures: one row of a table each, with the guest's code for it.

The code of all kinds is assembled at once (``bank()``), because starting ``as`` takes an emulated host longer than measuring does. A kind's
guest does, as the host has put at COMMAND, one of three things, then writes to STOP_PORT:

- BATCH: COUNT times ``arm`` and ``body``;
- SAMPLES: the same with RDTSC before and after, each difference stored at SAMPLE_GPA;
- EMPTY: RDTSC, ``arm``, RDTSC: what has to be taken off a sample.

EAX, ECX and EDX are the body's; EBX, and in 64-bit modes R8 to R15, are too, but stay. The rest is the loop's.
"""

from __future__ import annotations

from pykvm.platform import LAPIC_GPA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BATCH", "EMPTY", "KINDS", "SAMPLES", "Kind", "Program", "bank", "chosen"]

STOP_PORT, PORT, GPA = 0xF4, 0x98, 0xD1000000
CODE_GPA = 0x100000
IDT_GPA, COMMAND, COUNT = 0x140000, 0x141000, 0x141008
SAMPLE_GPA, MAX_SAMPLES = 0x150000, 1 << 16
TOUCH_GPA, TOUCH_STRIDE, TOUCHES = 0x40000000, 0x10000, 250  # so far apart that KVM, which maps neighbours too, maps none of the next
AP_READY = COMMAND + 0x80
BATCH, SAMPLES, EMPTY = 0, 1, 2
VECTOR, IPI_BACK = 0x41, 0x42
UNFILTERED_MSR, FILTERED_MSR = 0x8B, 0xC0DE0001  # IA32_BIOS_SIGN_ID; one that no CPU has
HC_MAP_GPA_RANGE = 12

LOOPS, BARE, GUEST = "loops", "bare", "guest"


class Kind:
    """One row.

    ``reaches``: "loops": user space answers and the guest goes on, so C, native and Python loop are compared. "bare": the exit ends a
    run, so Python means VCPU.run(), one typed exit each. "guest": nothing reaches user space, and only the guest's own clock sees it.
    ``limit``: such exits come without end, whatever the guest does, and ``reason`` is theirs. ``weight``: exits that one body makes.
    ``setup`` runs once, ``init`` before each command. ``handlers``: vector -> code. ``needs``: names of needs.py, or of setup.NEEDS.
    ``device``: what of the machine is special (setup.py). ``cost``: how many times as long as others one body takes, about.
    """

    def __init__(
        self,
        name: str,
        body: str = "",
        *,
        mode: str = "protected",
        reaches: str = LOOPS,
        arm: str = "",
        init: str = "",
        setup: str = "",
        handlers: dict[int, str] | None = None,
        needs: tuple[str, ...] = (),
        device: str = "",
        irqchip: str = "none",
        cpus: int = 1,
        limit: bool = False,
        reason: str = "",
        weight: int = 1,
        cost: int = 1,
        note: str = "",
    ) -> None:
        self.name, self.body, self.mode, self.reaches = name, body, mode, reaches
        self.arm, self.init, self.setup, self.handlers = arm, init, setup, handlers or {}
        self.needs, self.device, self.irqchip, self.cpus = needs, device, irqchip, cpus
        self.limit, self.reason, self.weight, self.cost, self.note = limit, reason, weight, cost, note

    @property
    def clocked(self) -> bool:
        """Whether the guest can take the time of one body."""
        return not self.limit and self.device != "dr0"

    @property
    def bits(self) -> int:
        """Width of its code."""
        return 32 if self.mode == "protected" else 64

    def __repr__(self) -> str:
        return f"<Kind {self.name}>"


_EOI = "mov dword ptr [r12], 0; inc ebx; iretq"
_LAPIC_ON = f"mov r12d, {LAPIC_GPA + 0xB0:#x}; mov dword ptr [r12 + 0x40], 0x1ff; sti"
_WAIT = "1: pause; test ebx, ebx; jz 1b"
_AP = f"""
ap:     mov r12d, {LAPIC_GPA + 0xB0:#x}
        mov dword ptr [r12 + 0x40], 0x1ff
        sti
        mov dword ptr [{AP_READY:#x}], 1
1:      hlt
        jmp 1b
"""
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
    Kind(
        "emulation failure",
        setup="mov eax, 0xd2000000; jmp rax",
        mode="long",
        reaches=BARE,
        limit=True,
        reason="INTERNAL_ERROR",
        note="code fetched where no memory is",
    ),
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
        f"out {PORT}, al; {_WAIT}",
        arm="xor ebx, ebx",
        setup=_LAPIC_ON,
        handlers={VECTOR: _EOI},
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
        f"mov dword ptr [r12 + 0x250], {VECTOR | 1 << 18:#x}; {_WAIT}",
        arm="xor ebx, ebx",
        setup=_LAPIC_ON,
        handlers={VECTOR: _EOI},
        mode="long",
        reaches=GUEST,
        irqchip="kernel",
        needs=("cap:KVM_CAP_IRQCHIP",),
        cost=25,
        note="through the LAPIC; to the handler, its EOI and back",
    ),
    Kind(
        "IPI round trip",
        f"mov dword ptr [r12 + 0x260], 1 << 24; mov dword ptr [r12 + 0x250], {VECTOR:#x}; {_WAIT}",
        arm="xor ebx, ebx",
        setup=f"{_LAPIC_ON}; 1: pause; cmp dword ptr [{AP_READY:#x}], 0; jz 1b",
        mode="long",
        reaches=GUEST,
        irqchip="kernel",
        cpus=2,
        needs=("cap:KVM_CAP_IRQCHIP",),
        cost=25,
        handlers={
            VECTOR: f"mov dword ptr [r12], 0; mov dword ptr [r12 + 0x260], 0; mov dword ptr [r12 + 0x250], {IPI_BACK:#x}; iretq",
            IPI_BACK: _EOI,
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


class Program:
    """Where a kind's code is: its start, its handlers by vector, the body of its batch, and what a second vCPU runs."""

    def __init__(self, entry: int, handlers: dict[int, int], body: int, ap: int) -> None:
        self.entry, self.handlers, self.body, self.ap = entry, handlers, body, ap


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
            raise ConfigError(f"unknown kind {word!r}: use one of {', '.join(kind.name for kind in KINDS)}, or how it begins")
        names |= found
    return [kind for kind in KINDS if kind.name in names]


def bank(assemble: Callable[..., bytes]) -> tuple[bytes, dict[str, Program]]:
    """The code of all kinds, to be loaded at CODE_GPA, and where each one's is."""
    places = [f"kind{i}_{end}" for i, kind in enumerate(KINDS) for end in ("", "stop", *(f"h{vector}" for vector in kind.handlers))]
    table = "; ".join(f".long {place}" for place in [*places, "ap"])
    parts = "\n".join(_program(i, kind) for i, kind in enumerate(KINDS))
    code = assemble(f".set SCRATCH, {COMMAND + 0x100:#x}; {table}\n{parts}\n.code64\n{_AP}", bits=64, org=CODE_GPA)
    at = {place: int.from_bytes(code[4 * i : 4 * i + 4], "little") for i, place in enumerate([*places, "ap"])}
    programs = {
        kind.name: Program(at[f"kind{i}_"], {vector: at[f"kind{i}_h{vector}"] for vector in kind.handlers}, at[f"kind{i}_stop"], at["ap"])
        for i, kind in enumerate(KINDS)
    }
    return code, programs


def _program(i: int, kind: Kind) -> str:
    start, end = "mov esi, eax", "sub eax, esi"
    if kind.body == "rep outsb":  # which moves ESI
        start, end = "mov [SCRATCH + 64], eax", "sub eax, [SCRATCH + 64]"
    after = "pop edi" if kind.body == "rep insb" else ""
    handlers = "\n".join(f".balign 16\nkind{i}_h{vector}: {code}" for vector, code in kind.handlers.items())
    return f"""
.code{kind.bits}
.balign 64
kind{i}_:   {kind.setup}
kind{i}_n:  mov ebp, [{COUNT:#x}]
        mov edi, {SAMPLE_GPA:#x}
        {kind.init}
        mov eax, [{COMMAND:#x}]
        test eax, eax
        jz kind{i}_b
        dec eax
        jz kind{i}_s
kind{i}_e:  rdtsc
        {start}
        {kind.arm}
        {after}
        rdtsc
        {end}
        mov [edi], eax
        add edi, 4
        dec ebp
        jnz kind{i}_e
        jmp kind{i}_d
kind{i}_s:  rdtsc
        {start}
        {kind.arm}
        {kind.body}
        {after}
        rdtsc
        {end}
        mov [edi], eax
        add edi, 4
        dec ebp
        jnz kind{i}_s
        jmp kind{i}_d
kind{i}_b:  {kind.arm}
kind{i}_stop:
        {kind.body}
        {after}
        dec ebp
        jnz kind{i}_b
kind{i}_d:  xor eax, eax
        out {STOP_PORT}, al
        jmp kind{i}_n
{handlers}
"""
