"""What a kind of exit is for ``bench exits``: one row of a table, with the guest's code for it. kinds.py and rarekinds.py have them all.

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
    from typing import Literal

__all__ = ["BARE", "BATCH", "EMPTY", "EOI", "GUEST", "LAPIC_ON", "LOOPS", "SAMPLES", "WAIT", "Kind", "Program", "bank"]

STOP_PORT, PORT, GPA = 0xF4, 0x98, 0xD1000000
CODE_GPA = 0x100000
IDT_GPA, COMMAND, COUNT = 0x140000, 0x141000, 0x141008
SAMPLE_GPA, MAX_SAMPLES = 0x150000, 1 << 16
TOUCH_GPA, TOUCH_STRIDE, TOUCHES = 0x40000000, 0x10000, 250  # so far apart that KVM, which maps neighbours too, maps none of the next
RING_GPA, RING_PAGES = TOUCH_GPA, 1000
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
    ``reason``: KVM_EXIT_ of the exit, which has to come, and for "bare" has to be given. ``suberror``: which INTERNAL_ERROR has to come
    in the end. ``limit``: it comes without end, whatever the guest does. ``absent``: why no host makes it, or none that a guest may be
    run on. ``weight``: exits that one body makes.
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
        irqchip: Literal["none", "kernel", "split"] = "none",
        cpus: int = 1,
        limit: bool = False,
        reason: str = "",
        weight: int = 1,
        cost: int = 1,
        note: str = "",
        absent: str = "",
        suberror: int = 0,
    ) -> None:
        self.name, self.body, self.mode, self.reaches = name, body, mode, reaches
        self.arm, self.init, self.setup, self.handlers = arm, init, setup, handlers or {}
        self.needs, self.device, self.irqchip, self.cpus = needs, device, irqchip, cpus
        self.limit, self.reason, self.weight, self.cost, self.note = limit, reason, weight, cost, note
        self.absent, self.suberror = absent, suberror

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


# Guest code that several kinds have: interrupts through the LAPIC, whose EOI register R12 points at.
EOI = "mov dword ptr [r12], 0; inc ebx; iretq"
LAPIC_ON = f"mov r12d, {LAPIC_GPA + 0xB0:#x}; mov dword ptr [r12 + 0x40], 0x1ff; sti"
WAIT = "1: pause; test ebx, ebx; jz 1b"
_AP = f"""
ap:     mov r12d, {LAPIC_GPA + 0xB0:#x}
        mov dword ptr [r12 + 0x40], 0x1ff
        sti
        mov dword ptr [{AP_READY:#x}], 1
1:      hlt
        jmp 1b
"""


class Program:
    """Where a kind's code is: its start, its handlers by vector, the body of its batch, and what a second vCPU runs."""

    def __init__(self, entry: int, handlers: dict[int, int], body: int, ap: int) -> None:
        self.entry, self.handlers, self.body, self.ap = entry, handlers, body, ap


def bank(kinds: list[Kind], assemble: Callable[..., bytes]) -> tuple[bytes, dict[str, Program]]:
    """The code of ``kinds``, to be loaded at CODE_GPA, and where each one's is."""
    places = [f"kind{i}_{end}" for i, kind in enumerate(kinds) for end in ("", "stop", *(f"h{vector}" for vector in kind.handlers))]
    table = "; ".join(f".long {place}" for place in [*places, "ap"])
    parts = "\n".join(_program(i, kind) for i, kind in enumerate(kinds))
    code = assemble(f".set SCRATCH, {COMMAND + 0x100:#x}; {table}\n{parts}\n.code64\n{_AP}", bits=64, org=CODE_GPA)
    at = {place: int.from_bytes(code[4 * i : 4 * i + 4], "little") for i, place in enumerate([*places, "ap"])}
    programs = {
        kind.name: Program(at[f"kind{i}_"], {vector: at[f"kind{i}_h{vector}"] for vector in kind.handlers}, at[f"kind{i}_stop"], at["ap"])
        for i, kind in enumerate(kinds)
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
