"""The same instructions twice: at CPL0, where a host whose KVM emulates that needs assist, and at CPL3, where the CPU executes them.

A batch is one guest: for each instruction a loop over rows of operands, which the code fetches from memory and puts back. On a host that
executes CPL0 code both are the CPU's own, and the comparison says that the test itself is right.
"""

from functools import cache

import pykvm
from pykvm import Machine
from tests.conftest import TIMEOUT

ORG, ROWS = 0x100000, 0x140000
ROW = 256
GPRS = ("rax", "rcx", "rdx", "rsi")  # at 0, 8, 16, 24; RFLAGS at 32; [rbx] is at 64, 64 bytes; XMM0 to XMM3 at 128
MEMORY, XMM = 64, 128


@cache
def _code(instructions, rows, sse):
    """Code that carries out each instruction on so many rows of its own."""
    load = "; ".join(f"movdqu xmm{n}, [rdi + {XMM + 16 * n}]" for n in range(4)) if sse else "nop"
    store = "; ".join(f"movdqu [rdi + {XMM + 16 * n}], xmm{n}" for n in range(4)) if sse else "nop"
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


def results(instructions, rows, mode, sse=False):
    """[what has become of ``rows`` for this instruction], and the machine's counts of assisted instructions."""
    with Machine(_code(tuple(instructions), len(rows), sse), mode=mode, memory="2M") as machine:
        machine.memory.write(ROWS, b"".join(rows) * len(instructions))
        assert machine.run(TIMEOUT).exit_code == 0
        data = machine.memory.read(ROWS, ROW * len(rows) * len(instructions))
        counts = machine.assisted()
    pieces = [data[at : at + ROW] for at in range(0, len(data), ROW)]
    return [pieces[n * len(rows) : (n + 1) * len(rows)] for n in range(len(instructions))], counts
