"""Emulation assist of what the CPU itself computes, and of system instructions; test_assist.py has the frame."""

import random

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from tests.conftest import TIMEOUT
from tests.kvm.assist import ROW, STATUS, TRAP, at_the_handler, gate, has, same_at_both_levels, tcg, with_rows

SSE = [
    "movd xmm0, eax", "movd xmm1, dword ptr [rbx]", "movd ecx, xmm2", "movd dword ptr [rbx + 4], xmm3", "movq xmm0, rax",
    "movq rdx, xmm1",
    "movq xmm2, xmm3", "movq xmm0, qword ptr [rbx + 8]", "movq qword ptr [rbx + 3], xmm1", "movss xmm0, xmm1", "movss xmm0, [rbx]",
    "movss [rbx + 4], xmm2", "movsd xmm0, xmm1", "movsd xmm3, [rbx]", "movsd [rbx + 16], xmm3", "movhps xmm0, [rbx + 8]",
    "movhps [rbx + 1], xmm0", "movlps xmm1, [rbx]", "movlpd [rbx], xmm1", "movhlps xmm0, xmm1", "movlhps xmm2, xmm3",
    "pxor xmm0, xmm1", "xorps xmm2, [rbx + 16]", "andnps xmm0, xmm3", "por xmm1, xmm2", "pand xmm0, [rbx + 32]", "paddd xmm0, xmm1",
    "pshufd xmm0, xmm1, 0x1b", "pshufd xmm1, [rbx], 0x4e", "punpcklbw xmm0, xmm1", "pmovmskb eax, xmm2", "pextrw ecx, xmm1, 3",
    "pinsrw xmm0, edx, 5", "psrldq xmm1, 3", "psllq xmm2, 7", "pmuludq xmm0, xmm3", "psadbw xmm1, xmm2", "pcmpeqb xmm0, [rbx + 48]",
    "addps xmm0, xmm1", "mulpd xmm0, [rbx + 16]", "divss xmm1, [rbx + 4]", "sqrtsd xmm2, xmm3", "maxps xmm0, xmm2", "cmpltps xmm0, xmm1",
    "cvtsi2sd xmm0, rax", "cvtsi2ss xmm1, dword ptr [rbx]", "cvttsd2si rax, xmm0", "cvtps2pd xmm0, xmm1", "cvtdq2ps xmm1, [rbx]",
    "comisd xmm0, [rbx + 8]", "ucomiss xmm1, xmm2", "unpckhpd xmm0, xmm1", "shufps xmm0, xmm1, 0x93", "movmskps esi, xmm0",
]  # fmt: skip
MMX = [
    "movd mm0, eax; paddw mm0, [rbx]; movq [rbx + 8], mm0; emms", "movq mm1, [rbx]; pshufw mm2, mm1, 0x1b; movd ecx, mm2; emms",
    "movq2dq xmm0, mm1; cvtps2pi mm3, xmm1; movq [rbx], mm3; emms",
]  # fmt: skip
X87 = [
    "fninit; fild qword ptr [rbx]; fild dword ptr [rbx + 8]; faddp; fistp qword ptr [rbx + 16]; fnstsw ax",
    "fninit; fld qword ptr [rbx + 16]; fsqrt; fstp qword ptr [rbx + 24]; fnstsw ax",
    "fninit; fldpi; fmul dword ptr [rbx]; fstp tbyte ptr [rbx + 32]; fnstcw [rbx]; fnstsw [rbx + 2]",
    "fninit; mov word ptr [rbx], 0xf7f; fldcw [rbx]; fld1; fld1; fchs; fscale; fstp st(1); frndint; fst dword ptr [rbx + 4]; fnclex",
    "fninit; fld tbyte ptr [rbx + 20]; fxam; fnstsw ax; fbstp [rbx + 40]; fwait",
    "fninit; fild word ptr [rbx]; fild word ptr [rbx + 2]; fcomi st, st(1); fnstsw ax; fnsave [rbx + 8]; frstor [rbx + 8]; fcompp;"
    "mov qword ptr [rbx + 20], 0; mov qword ptr [rbx + 28], 0",  # FIP, FCS, FDP, FDS: XSAVE keeps no selectors
]
AVX = [
    "vmovdqu ymm0, [rbx]; vxorps ymm1, ymm0, [rbx + 32]; vmovups [rbx], ymm1",
    "vmovd xmm3, eax; vpinsrq xmm3, xmm3, rdx, 1; vmovq rcx, xmm3",
    "vbroadcastss ymm2, dword ptr [rbx]; vaddps ymm2, ymm2, [rbx + 16]; vextractf128 [rbx + 32], ymm2, 1; vzeroupper",
    "vmovups ymm3, [rbx]; mov eax, 7; xor edx, edx; mov esi, 0x138000; xsave [rsi]; vzeroall; xrstor [rsi]; vmovups [rbx + 32], ymm3",
    "xor ecx, ecx; xgetbv; and eax, 7",
]  # fmt: skip
AVX2 = [
    "vmovdqu ymm0, [rbx]; vpaddd ymm1, ymm0, [rbx + 7]; vpermq ymm1, ymm1, 0x1b; vmovdqu [rbx], ymm1",
    "vmovdqu ymm0, [rbx]; vpmovmskb eax, ymm0",
    "vmovdqu ymm0, [rbx]; vextracti128 [rbx + 33], ymm0, 1; vpsrlvd ymm3, ymm0, [rbx + 32]; vmovdqu [rbx], ymm3",
]  # fmt: skip
ATOMIC = [
    "cmpxchg16b [rbx]", "lock cmpxchg16b [rbx + 16]", "mov rax, [rbx]; mov rdx, [rbx + 8]; lock cmpxchg16b [rbx]",
    "lock cmpxchg16b [rbx]; lock cmpxchg16b [rbx]",
]  # fmt: skip


@with_rows(3)
def test_sse(rows):
    counts = same_at_both_levels(dict.fromkeys(SSE, STATUS), rows, sse=True)
    assert sum(counts.values()) == (3 * 3 * len(SSE) if probe.cpl0_emulated() else 0)  # LDMXCSR and STMXCSR too


@with_rows(3)
def test_mmx(rows):
    same_at_both_levels(dict.fromkeys(MMX, STATUS), rows, sse=True)


@with_rows(3)
def test_x87(rows):
    counts = same_at_both_levels(dict.fromkeys(X87, STATUS & ~0x10), [row[:128] + bytes(ROW - 128) for row in rows])
    assert ("fsqrt" in counts) == probe.cpl0_emulated()


@pytest.mark.parametrize(("insns", "needs"), [(AVX, "vzeroupper"), (AVX2, "vpaddd ymm0, ymm0, ymm0")])
def test_avx_and_xsave(insns, needs):
    if not has(needs):
        pytest.skip(f"a CPL3 program cannot execute {needs} here (probed)")

    @with_rows(2)
    def compare(rows):
        same_at_both_levels(dict.fromkeys(insns, STATUS & ~0x8D5), rows, avx=True)

    compare()


@with_rows(3)
def test_cmpxchg16b(rows):
    counts = same_at_both_levels(dict.fromkeys(ATOMIC, STATUS), rows)
    assert counts == ({"cmpxchg16b": 15} if probe.cpl0_emulated() else {})


def test_cmpxchg16b_of_two_vcpus():
    """A 128-bit counter that both add to, by LOCK CMPXCHG16B: no addition is lost, and its halves never disagree."""
    times = 60  # and IN lets the other one run, where the host has one CPU
    code = f"""mov esi, 0x140000; mov edi, {times}
        again: mov rax, [rsi]; mov rdx, [rsi + 8]
        retry: lea rbx, [rax + 1]; lea rcx, [rdx + 1]; lock cmpxchg16b [rsi]; jnz retry; cmp rax, rdx; jne bad; dec edi; jnz again
        lock inc dword ptr [rsi + 16]; wait_: in al, 0xe0; cmp dword ptr [rsi + 16], 2; jne wait_; mov al, 0; out 0xf4, al
        bad: mov al, 1; out 0xf4, al; hlt"""
    with Machine(pykvm.asm(code, org=0x100000), mode="long", memory="2M", cpus=2) as machine:
        first, second = machine.vcpus
        second.set_sregs(first.get_sregs())
        second.set_regs(first.get_regs())
        second.set_mp_state(0)  # runnable, without INIT and SIPI
        result = machine.run(TIMEOUT)
        counter = machine.memory.read(0x140000, 16)
    assert result.exit_code == 0
    assert counter == (2 * times).to_bytes(8, "little") * 2
    assert (result.assisted.get("cmpxchg16b", 0) >= 2 * times) == probe.cpl0_emulated()


@pytest.mark.shadow
def test_sse_operands_in_mmio():
    """On every host: KVM's emulator knows some SSE moves, and no arithmetic."""
    seen = []

    class Device:
        def read(self, offset, size):
            return 40

        def write(self, offset, size, value):
            seen.append((offset, size, value))

    code = (
        "mov ebx, 0xd0100000; cvtsi2sd xmm0, dword ptr [rbx]; cvttsd2si eax, xmm0; add eax, 2; movd xmm1, eax; movd [rbx + 4], xmm1;"
        "out 0xf4, al"
    )
    with Machine(pykvm.asm(code, org=0x100000), mode="long", memory="2M") as machine:
        machine.add_device(Device(), gpa=0xD0100000, length=8)
        result = machine.run(TIMEOUT)
    assert result.exit_code == 42 and seen == [(4, 4, 42)]
    assert result.assisted.keys() >= {"cvtsi2sd", "movd"}


# --- 16- and 32-bit code ----------------------------------------------------------------------------------------------

NARROW = {
    "movd xmm1, eax; paddd xmm1, xmm1; movd ebx, xmm1": 2 * 0x1234567,
    "mov [MEM], eax; movd xmm1, dword ptr [MEM]; psrld xmm1, 4; movd [MEM + 4], xmm1; mov ebx, [MEM + 4]": 0x123456,
    "mov dword ptr [MEM], 9; fninit; fild dword ptr [MEM]; fsqrt; fistp word ptr [MEM + 8]; movzx ebx, word ptr [MEM + 8]": 3,
    "popcnt ebx, eax": 12, "mov [MEM], ax; popcnt bx, word ptr [MEM]; movzx ebx, bx": 8,
    "fninit; mov word ptr [MEM], 0x27f; fldcw [MEM]; fnstcw [MEM + 2]; movzx ebx, word ptr [MEM + 2]": 0x27F,
}  # fmt: skip


@pytest.mark.shadow  # without unrestricted guest, real mode is partly emulated
@pytest.mark.parametrize(
    ("bits", "memory"), [(16, "bx + si - 8"), (16, "0x6000"), (16, "fs:0x20"), (32, "esi + edi * 4 + 0x10"), (32, "0x160000"), (32, "ebp")]
)
def test_narrow_code(bits, memory):
    """Every addressing form is the address that the guest means, whatever the CPU is shown instead."""
    start = {
        16: "mov ax, cs; mov ds, ax; mov eax, cr4; or eax, 0x600; mov cr4, eax; mov ax, 0x640; mov fs, ax; mov sp, 0x7000",
        32: "mov eax, cr4; or eax, 0x600; mov cr4, eax; mov ebp, 0x161000",
    }[bits]
    parts = []
    for n, (insns, want) in enumerate(NARROW.items()):
        setup = "mov bx, 0x6000; mov si, 0x108" if bits == 16 else "mov esi, 0x160000; mov edi, 3"
        segment, _, address = memory.rpartition(":")
        body = insns.replace("[MEM", f"{segment}{':' if segment else ''}[{address}")
        parts.append(f"{setup}; mov eax, 0x1234567; {body}; cmp ebx, {want}; mov al, {n + 1}; jne bad")
    code = f"{start}; {'; '.join(parts)}; mov al, 0; bad: out 0xf4, al; hlt"
    with Machine(
        pykvm.asm(code, bits=bits, org=0x7C00 if bits == 16 else 0x100000), mode="real" if bits == 16 else "protected", memory="2M"
    ) as m:
        result = m.run(TIMEOUT)
    assert result.exit_code == 0, [*NARROW][result.exit_code - 1]


def test_iret_in_protected_mode():
    """To CPL3 with IOPL 3 and a stack of its own; selectors of inner segments become null."""
    code = (
        "push 0x2b; push 0x150000; push 0x3002; push 0x23; push offset user; iretd; user: mov ecx, ss; mov ebx, ds; mov eax, cs;"
        "out 0xf4, al; jmp user"
    )
    with Machine(pykvm.asm(code, bits=32, org=0x100000), mode="protected", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0x23
        regs, sregs = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
    assert (regs.rcx & 0xFFFF, regs.rbx & 0xFFFF, regs.rsp) == (0x2B, 0, 0x150000)
    assert (sregs.ss.dpl, regs.rflags & 0x3000) == (3, 0x3000)


OLD = [
    ("mov ax, 0x0079; add al, 0x35; daa", 0x14, 0x15),
    ("mov ax, 0x0099; add al, 1; daa", 0, 0x55),
    ("mov ax, 0x12; add al, 0x34; daa", 0x46, 0),
    ("mov ax, 0x0208; add al, 9; aaa", 0x0307, 0x11),
    ("mov ax, 0x0203; add al, 4; aaa", 0x0207, 0),
    ("mov ax, 0x02ff; aaa", 0x0405, 0x11),
    ("mov ax, 0x0203; sub al, 7; aas", 0x0106, 0x11),
    ("mov ax, 0x0207; sub al, 3; aas", 0x0204, 0),
    ("mov ax, 0x10; mov bx, 3; arpl ax, bx", 0x13, 0x40),
    ("mov ax, 0x13; mov bx, 2; arpl ax, bx", 0x13, 0),
    ("mov eax, 5; bound eax, [0x140000]", 5, 0),
    ("mov eax, 7; bound eax, [0x140000]", 7, 0),
]


@pytest.mark.parametrize(("insns", "ax", "flags"), OLD)
def test_old_arithmetic(insns, ax, flags):
    """In 32-bit code; BOUND's limits are -3 and 7. Flags: those that are defined, of CF, PF, AF and ZF."""
    defined = 0x55 if "daa" in insns else 0x11 if "aa" in insns else 0x40 if "arpl" in insns else 0
    code = f"mov dword ptr [0x140000], -3; mov dword ptr [0x140004], 7; {insns}; pushfd; pop ecx; mov esi, eax; mov al, 0; out 0xf4, al"
    with Machine(pykvm.asm(code, bits=32, org=0x100000), mode="protected", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0
        regs = machine.vcpu.get_regs()
    assert (regs.rsi & 0xFFFF, regs.rcx & defined) == (ax, flags & defined)


@pytest.mark.parametrize("index", [-4, 8])
def test_bound_raises_br(index):
    source = f"{gate(5, TRAP, 32)} lidt [idtr]; mov esp, 0x170000; push 7; push -3; mov eax, {index}; here: bound eax, [esp]"
    code, _, _, stack, here, _ = at_the_handler(source, 32)
    assert (code, stack[0]) == (42, here)


@pytest.mark.parametrize(("bits", "level"), [(16, 1), (32, 1), (32, 3), (64, 2), (64, 0)])
def test_enter_copies_frame_pointers(bits, level):
    """LEAVE undoes it; the display is the frame before's, and the new frame pointer."""
    width, sp, bp = bits // 8, {16: "sp", 32: "esp", 64: "rsp"}[bits], {16: "bp", 32: "ebp", 64: "rbp"}[bits]
    outer = "; ".join(f"mov word ptr [{bp} - {width * n}], {0x111 * n}" for n in range(1, 4))
    clear = "xor ax, ax; mov ds, ax; mov ss, ax; " if bits == 16 else ""
    start = f"{clear} mov {sp}, 0x6000; mov {bp}, 0x6800; {outer}"
    code = f"{start}; enter 24, {level}; mov cx, sp; mov bx, bp; leave; mov al, 0; out 0xf4, al"
    mode, org = {64: ("long", 0x100000), 32: ("protected", 0x100000), 16: ("real", 0x7C00)}[bits]
    with Machine(pykvm.asm(code, bits=bits, org=org), mode=mode, memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0
        regs = machine.vcpu.get_regs()
        words = [machine.memory.read_u16(0x6000 - width * n) for n in range(1, level + 2)]
    assert words == [0x6800, *(0x111 * n for n in range(1, level)), *([0x6000 - width] if level else [])]
    assert (regs.rbx & 0xFFFF, regs.rcx & 0xFFFF) == (0x6000 - width, 0x6000 - width * (level + 1) - 24)
    assert (regs.rsp & 0xFFFF, regs.rbp & 0xFFFF) == (0x6000, 0x6800)


# --- system instructions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "lar", "lsl", "verr", "verw"),
    [
        (0x08, 0xCF9B00, 0xFFFFFFFF, 1, 0), (0x10, 0xAF9B00, 0xFFFFFFFF, 1, 0), (0x18, 0xCF9300, 0xFFFFFFFF, 1, 1),
        (0x1B, None, None, 0, 0), (0x2B, 0xCFF300, 0xFFFFFFFF, 1, 1), (0x38, 0x8B00, 0x67 + 0x2001, 0, 0), (0, None, None, 0, 0),
        (0x4000, None, None, 0, 0), (0x0C, None, None, 0, 0),
    ],
)  # fmt: skip
def test_looking_at_selectors(selector, lar, lsl, verr, verw):
    code = (
        f"mov esi, {selector}; mov eax, -1; mov ebx, -1; lar eax, esi; setz cl; lsl ebx, esi; setz ch; verr si; setz dl; verw si; setz dh;"
        "mov r8b, dl; and edx, 0xff00; shr edx, 8; mov edi, ecx; mov al, al; mov r9d, eax; mov al, 0; out 0xf4, al"
    )
    with Machine(pykvm.asm(code, org=0x100000), mode="long", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0
        regs = machine.vcpu.get_regs()
    assert (regs.r9 & 0xFFF0FFFF if lar else regs.r9) == (0xFFFFFFFF if lar is None else lar & 0xFFF0FFFF)
    assert regs.rbx == (0xFFFFFFFF if lsl is None else lsl)
    assert (regs.rdi & 0xFFFF, regs.r8 & 0xFF, regs.rdx & 0xFF) == ((lar is not None) * 0x101, verr, verw)


def test_rdtscp_is_between_two_rdtsc(system):
    """Its time stamp, and TSC_AUX where CPUID lets the guest set that."""
    leaf = system.get_supported_cpuid().find(0x8000_0001)
    offered = leaf is not None and bool(leaf.edx >> 27 & 1)
    if not offered and not probe.cpl0_emulated():
        pytest.skip("this host's KVM offers no RDTSCP (CPUID 0x80000001 EDX bit 27)")
    code = (
        f"mov ecx, 0xc0000103; mov eax, 0x1234; xor edx, edx; {'wrmsr' if offered else 'nop'}; rdtsc; shl rdx, 32; lea r8, [rax + rdx];"
        "rdtscp; shl rdx, 32; lea r9, [rax + rdx]; mov r10d, ecx; rdtsc; shl rdx, 32; lea r11, [rax + rdx]; mov al, 0; out 0xf4, al"
    )
    with Machine(pykvm.asm(code, org=0x100000), mode="long", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0
        regs = machine.vcpu.get_regs()
    assert regs.r8 <= regs.r9 <= regs.r11 and regs.r10 == (0x1234 if offered else 0)


def test_what_needs_no_work_is_done():
    """Hints, translations to forget, and the AC flag."""
    if not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: what its CPU has of these differs (probed)")
    code = (
        "mov ebx, 0x140000; mov eax, ebx; xor ecx, ecx; xor edx, edx; monitor; mwait; clwb [rbx]; rdsspq rsi; mov esi, 2;"
        "invpcid rsi, [rbx]; stac; pushfq; clac; pushfq; pop rdi; pop rsi; mov al, 0; out 0xf4, al"
    )
    with Machine(pykvm.asm(code, org=0x100000), mode="long", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0
        regs = machine.vcpu.get_regs()
    assert (regs.rsi & 0x40000, regs.rdi & 0x40000) == (0x40000, 0)


# --- faults -----------------------------------------------------------------------------------------------------------

TS, EM = "mov rax, cr0; bts eax, 3; mov cr0, rax", "mov rax, cr0; bts eax, 2; mov cr0, rax"
UNMASKED = "mov dword ptr [0x140000], 0x1d80; ldmxcsr [0x140000]"  # MXCSR with divide-by-zero exceptions
HALF = "mov dword ptr [0x140000], 0x37b; fninit; fldcw [0x140000]; fld1; fldz; fdivp"  # x87 with the same
FAULTS = [
    ("#NM, TS", 7, None, TS, "movd xmm0, eax"),
    ("#NM, TS, x87", 7, None, TS, "fld1"),
    ("#NM, EM, x87", 7, None, EM, "fld1"),
    ("#UD, EM, SSE", 6, None, EM, "addps xmm0, xmm1"),
    ("#UD, no OSFXSR", 6, None, "mov rax, cr4; btr eax, 9; mov cr4, rax", "mulps xmm0, xmm1"),
    ("#UD, no OSXSAVE", 6, None, "mov rax, cr4; btr eax, 18; mov cr4, rax", "xgetbv"),
    ("#UD, AVX is off", 6, None, "mov rax, cr4; btr eax, 18; mov cr4, rax", "vaddps ymm0, ymm1, ymm2"),
    ("#UD1", 6, None, "nop", "ud1 eax, eax"),
    ("#XM", 19, None, f"{UNMASKED}; xorps xmm1, xmm1; mov eax, 1; cvtsi2ss xmm0, eax", "divss xmm0, xmm1"),
    ("#MF", 16, None, HALF, "fwait"),
    ("#MF, next x87", 16, None, HALF, "fld1"),
    ("#GP, MXCSR", 13, 0, "mov dword ptr [0x140000], -1", "ldmxcsr [0x140000]"),
    ("#GP, alignment", 13, 0, "mov ebx, 0x140001", "paddd xmm0, [rbx]"),
    ("#GP, cmpxchg16b", 13, 0, "mov ebx, 0x140008", "cmpxchg16b [rbx]"),
    ("#GP, canonical", 13, 0, "mov rbx, 0x800000000000", "movss xmm0, [rbx]"),
    ("#SS, canonical", 12, 0, "mov rbp, 0x800000000000", "movss xmm0, [rbp]"),
    ("#PF, read", 14, 0, "mov rbx, 0x8000000000", "movss xmm0, [rbx]"),
    ("#PF, write", 14, 2, "mov rbx, 0x8000000000", "movss [rbx], xmm0"),
    ("#PF, x87 store", 14, 2, "mov rbx, 0x8000000000", "fistp dword ptr [rbx]"),
    ("#PF, read-only", 14, 3, "mov ebx, 0x340000; mov qword ptr [0xb008], 0x81; mov rax, cr3; mov cr3, rax", "cmpxchg16b [rbx]"),
]  # fmt: skip


TCG_LACKS = ("#XM", "#MF, next x87", "#GP, MXCSR", "#SS, canonical")


@pytest.mark.parametrize(("name", "vector", "error", "before", "insn"), FAULTS, ids=[row[0] for row in FAULTS])
def test_faults(name, vector, error, before, insn):
    """RIP of the frame is at the instruction, and the error code is the manual's."""
    if vector == 13 and error == 0 and not probe.cpl0_emulated() and not alignment_is_checked():
        pytest.skip("this host's CPU does not check the alignment of SSE operands (probed)")
    if name in TCG_LACKS and tcg():
        pytest.skip("QEMU's TCG does not raise this")
    source = f"{gate(vector, TRAP, 64)} lidt [idtr]; mov esp, 0x170000; {before}; here: {insn}"
    code, _, sregs, stack, here, _ = at_the_handler(source, 64)
    assert code == 42
    assert stack[0 if error is None else 1] == here
    assert error is None or stack[0] == error
    if vector == 14:
        assert sregs.cr2 == (0x340000 if error == 3 else 0x8000000000)


def test_a_page_comes_in_two_faults():
    """Not present, then read-only: the same instruction faults twice in a row, and is done the third time."""
    code = (
        f"{gate(14, TRAP, 64)} lidt [idtr]; mov esp, 0x170000; xor edi, edi; mov qword ptr [0xb008], 0; mov rcx, cr3; mov cr3, rcx;"
        "mov eax, 0x12345678; movd xmm0, eax; mov ebx, 0x340000; movd [rbx], xmm0; mov eax, [0x140000]; mov ecx, edi; mov al, 0;"
        "out 0xf4, al; hlt;"
    )
    handler = (
        "handler: inc edi; pop rdx; mov ecx, 0x81; cmp edx, 2; je 1f; mov ecx, 0x83; 1: mov [0xb008], rcx; mov rcx, cr3; mov cr3, rcx;"
        "iretq; idtr: .word 0xfff; .quad 0x180000"
    )
    with Machine(pykvm.asm(code + handler, org=0x100000), mode="long", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 0
        assert machine.memory.read_u32(0x140000) == 0x12345678
        assert machine.vcpu.get_regs().rcx == 2


def alignment_is_checked():
    """Whether MOVAPS raises #GP for an address that is not aligned, as all CPUs do and QEMU's TCG does not."""
    return not has("mov ebx, 0x140001; paddd xmm0, [rbx]")


def test_an_sse_exception_leaves_its_flag():
    """#XM: MXCSR.ZE tells, and the destination is as it was (SDM vol. 1 section 11.5.3)."""
    if tcg():
        pytest.skip("QEMU's TCG raises no unmasked SSE exceptions")
    divide = f"{UNMASKED}; xorps xmm1, xmm1; mov eax, 1; cvtsi2ss xmm0, eax; divss xmm0, xmm1"
    handler = "handler: stmxcsr [0x140000]; mov ecx, [0x140000]; movd edx, xmm0; mov al, 42; out 0xf4, al; hlt;"
    source = f"{gate(19, TRAP, 64)} lidt [idtr]; mov esp, 0x170000; {divide}; mov al, 1; out 0xf4, al; {handler}"
    with Machine(pykvm.asm(f"{source} idtr: .word 0xfff; .quad 0x180000", org=0x100000), mode="long", memory="2M") as machine:
        assert machine.run(TIMEOUT).exit_code == 42
        regs = machine.vcpu.get_regs()
    assert (regs.rcx & 4, regs.rdx) == (4, 0x3F800000)


def test_interrupted_in_the_scratch_vm(monkeypatch):
    """Ctrl-C while the CPU is asked: the run ends as always, nothing is done by halves, and the next run goes on."""
    from pykvm.x86.assist.scratch import Scratch

    if not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: no instruction of this guest is asked about (probed)")
    real = Scratch._exit

    def interrupted(self):
        monkeypatch.setattr(Scratch, "_exit", real)
        real(self)
        raise KeyboardInterrupt

    code = pykvm.asm("mov eax, 41; movd xmm0, eax; paddd xmm0, xmm0; movd eax, xmm0; out 0xf4, al", org=0x100000)
    with Machine(code, mode="long", memory="2M") as machine:
        monkeypatch.setattr(Scratch, "_exit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            machine.run(TIMEOUT)
        assert machine.run(TIMEOUT).exit_code == 82


def test_time_limits_and_heartbeats_go_on():
    """A guest that does nothing but what is asked about: its time limit ends it, and heartbeats that fall into an answer do no harm."""
    code = pykvm.asm("sti; again: addsd xmm0, xmm1; jmp again", org=0x100000)
    with Machine(code, mode="long", memory="2M") as machine:
        beats = []
        machine.on_heartbeat = lambda: beats.append(None)
        assert machine.run(0.4).reason == "timeout"
    assert beats


# --- what must not happen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_any_bytes_do_no_harm(mode):
    """Whatever is no instruction, or one of those that nobody knows, ends in a crash or runs into the time limit; nothing raises here."""
    if not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: nothing of this reaches user space (probed)")
    chance = random.Random(mode)
    firsts = [
        b"\x0f",
        b"\x66\x0f",
        b"\xf3\x0f",
        b"\xf2\x0f",
        b"\x0f\x38",
        b"\x66\x0f\x3a",
        b"\xc5",
        b"\xc4",
        b"\x62",
        b"\xd9",
        b"\xdd",
        b"\xf0\x0f",
    ]
    ends = set()
    for _ in range(40):
        code = chance.choice(firsts) + chance.randbytes(12) + b"\xf4"
        with Machine(code, mode=mode, memory="2M") as machine:
            regs = machine.vcpu.get_regs()
            for name in ("rbx", "rsi", "rdi", "rbp"):
                setattr(regs, name, chance.choice([0, 0x140000, 0x1FFFFC, 0xFFFFFFFC, 0xD0000000, 1 << 47, (1 << 64) - 8]))
            machine.vcpu.set_regs(regs)
            try:
                ends.add(machine.run(0.05).reason)
            except GuestCrash:
                ends.add("crash")
    assert "crash" in ends
