"""The same instructions twice: at CPL0, where a host whose KVM emulates that needs assist, and at CPL3, where the CPU executes them.

A batch is one guest: for each instruction a loop over rows of operands, which the code fetches from memory and puts back. On a host that
executes CPL0 code both are the CPU's own, and the comparison says that the test itself is right.
"""

import random
from functools import cache
from pathlib import Path

import pykvm
from pykvm import GuestCrash, Machine
from tests.conftest import TIMEOUT

ORG, ROWS = 0x100000, 0x140000
ROW = 256
MXCSR_DEFAULT = 0x1F80
CF, PF, AF, ZF, SF, OF = 1, 4, 16, 64, 128, 2048
STATUS = CF | PF | AF | ZF | SF | OF
GPRS = ("rax", "rcx", "rdx", "rsi")  # at 0, 8, 16, 24; RFLAGS at 32, MXCSR at 40; [rbx] is at 64, 64 bytes; XMM0 to XMM3 at 128
MEMORY, XMM = 64, 128


def tcg():
    """Whether the host's CPU is QEMU's TCG, which checks less than a CPU, and raises no unmasked SSE exceptions."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


@cache
def _code(instructions, rows, sse):
    """Code that carries out each instruction on so many rows of its own."""
    load = "; ".join(f"movdqu xmm{n}, [rdi + {XMM + 16 * n}]" for n in range(4)) + "; ldmxcsr [rdi + 40]" if sse else "nop"
    store = "; ".join(f"movdqu [rdi + {XMM + 16 * n}], xmm{n}" for n in range(4)) + "; stmxcsr [rdi + 40]" if sse else "nop"
    parts = [f"mov edi, {ROWS}"]
    for n, insn in enumerate(instructions):
        parts.append(
            f"""mov r14d, {rows}
            loop{n}: {"; ".join(f"mov {r}, [rdi + {8 * i}]" for i, r in enumerate(GPRS))}; lea rbx, [rdi + {MEMORY}]
            {load}; push qword ptr [rdi + 32]; popfq
            {insn}
            pushfq; pop qword ptr [rdi + 32]; {"; ".join(f"mov [rdi + {8 * i}], {r}" for i, r in enumerate(GPRS))}; {store}
            add edi, {ROW}; dec r14d; jnz loop{n}"""
        )
    return pykvm.asm("; ".join(parts) + "; mov al, 0; out 0xf4, al", org=ORG)


def avx_on(vcpu):
    """CR4.OSXSAVE and XCR0 for x87, SSE and AVX, from outside: not every emulated CPU lets KVM know of XSETBV."""
    sregs, xcrs = vcpu.get_sregs(), vcpu.get_xcrs()
    sregs.cr4 |= 1 << 18
    vcpu.set_sregs(sregs)
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, 7
    vcpu.set_xcrs(xcrs)


def results(instructions, rows, mode, sse=False, avx=False):
    """[what has become of ``rows`` for this instruction], and the machine's counts of assisted instructions."""
    with Machine(_code(tuple(instructions), len(rows), sse), mode=mode, memory="2M") as machine:
        if avx:
            avx_on(machine.vcpu)
        machine.memory.write(ROWS, b"".join(rows) * len(instructions))
        assert machine.run(TIMEOUT).exit_code == 0
        data = machine.memory.read(ROWS, ROW * len(rows) * len(instructions))
        counts = machine.assisted()
    pieces = [data[at : at + ROW] for at in range(0, len(data), ROW)]
    return [pieces[n * len(rows) : (n + 1) * len(rows)] for n in range(len(instructions))], counts


def row_of(values, flags, seed):
    """A row of four registers and the first two words of memory, and flags; the rest of its bytes comes from ``seed``."""
    words = [value.to_bytes(8, "little") for value in values]
    head = b"".join(words[:4]) + (flags & STATUS | 2).to_bytes(8, "little") + MXCSR_DEFAULT.to_bytes(8, "little") + bytes(16)
    row = head + b"".join(words[4:])
    return row + random.Random(seed).randbytes(ROW - len(row))


SPECIAL = (0, 1, (1 << 64) - 1, (1 << 32) - 1, 255, 1 << 63)


def with_rows(count):
    """Makes a test of f(rows): hypothesis picks so many rows, three times; where it is not installed, chance does, once."""

    def decorate(test):
        try:
            from hypothesis import Phase, given, settings
            from hypothesis import strategies as st
        except ImportError:
            chance = random.Random(test.__name__)

            def once():
                picks = ([chance.choice([*SPECIAL, chance.getrandbits(64)]) for _ in range(6)] for _ in range(count))
                test([row_of(values, chance.getrandbits(12), chance.getrandbits(32)) for values in picks])

            return once
        value = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda n: 1 << n), st.sampled_from(SPECIAL))
        rows = st.builds(row_of, st.lists(value, min_size=6, max_size=6), st.integers(0, STATUS), st.integers(0, 2**32))
        rounds = settings(max_examples=3, deadline=None, database=None, phases=[Phase.generate])
        return rounds(given(st.lists(rows, min_size=count, max_size=count))(test))

    return decorate


def same_at_both_levels(table, rows, sse=False, avx=False):
    """Compare; the counts of assisted instructions. ``table``: an instruction -> the flags it defines; ``avx``: switched on for CPL0."""
    instructions = [*table]
    got, counts = results(instructions, rows, "long", sse, avx)
    want, _ = results(instructions, rows, "user", sse)
    for insn, mine, cpus, row_flags in zip(instructions, got, want, table.values(), strict=True):
        for before, a, b in zip(rows, mine, cpus, strict=True):
            flags_a, flags_b = (int.from_bytes(row[32:40], "little") & row_flags for row in (a, b))
            assert a[:32] == b[:32] and a[40:] == b[40:] and flags_a == flags_b, (insn, before.hex(), a.hex(), b.hex())
    return counts


def has(insn):
    """Whether CPL3 executes it."""
    with Machine(pykvm.asm(f"{insn}; mov al, 0; out 0xf4, al", org=0x100000), mode="user", memory="2M") as machine:
        try:
            return machine.run(TIMEOUT).exit_code == 0
        except GuestCrash:
            return False


IDT = 0x180000
TRAP, INTERRUPT = 0x8F, 0x8E  # access bytes: present, DPL 0


def gate(vector, access, bits, *, ist=0, selector=None):
    """Code that makes a gate to ``handler``."""
    at = IDT + (16 if bits == 64 else 8) * vector
    selector = {64: 0x10, 32: 8}[bits] if selector is None else selector
    return (
        f"mov eax, offset handler; mov [{at}], ax; mov word ptr [{at + 2}], {selector}; mov word ptr [{at + 4}], {access << 8 | ist}; "
        f"shr eax, 16; mov [{at + 6}], ax; "
    )


def at_the_handler(source, bits):
    """(regs, sregs, the words on the stack) at ``handler``, and the address of ``here``."""
    width = {64: 8, 32: 4, 16: 2}[bits]
    mode, org = {64: ("long", 0x100000), 32: ("protected", 0x100000), 16: ("real", 0x7C00)}[bits]
    table = f"idtr: .word 0xfff; .{'quad' if bits == 64 else 'long'} {IDT}; " if bits != 16 else ""
    code = (
        f'{source}; after: mov al, 1; out 0xf4, al; hlt; handler: mov al, 42; out 0xf4, al; hlt; {table} .ascii "HERE"; .long here, after'
    )
    binary = pykvm.asm(code, bits=bits, org=org)
    at = binary.index(b"HERE") + 4
    with Machine(binary, mode=mode, memory="2M") as machine:
        machine.memory.write(0x110000, bytes.fromhex("00ffffff00000000"))
        result = machine.run(TIMEOUT)
        regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
        top = regs.rsp + (0 if bits == 64 else sregs.ss.base)
        stack = [int.from_bytes(machine.memory.read(top + width * i, width), "little") for i in range(6)] if top < 0x1FFF00 else []
        assert machine.memory.read(0x110000, 1) == b"\0"
    return (
        result.exit_code,
        regs,
        sregs,
        stack,
        int.from_bytes(binary[at : at + 4], "little"),
        int.from_bytes(binary[at + 4 : at + 8], "little"),
    )
