"""Emulation assist: what KVM's emulator gives up on, compared with the same instruction at CPL3, or with what the manual says.

On a host that executes CPL0 code KVM gives up on none of these, and each test says that the guest runs the same there.
"""

from pathlib import Path

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from tests.conftest import TIMEOUT
from tests.kvm.assist import CF, INTERRUPT, OF, SF, STATUS, TRAP, ZF, at_the_handler, gate, has, same_at_both_levels, tcg, with_rows

# instruction -> the flags that it leaves defined (SDM vol. 2)
BITS = {
    "popcnt rax, rcx": STATUS, "popcnt eax, dword ptr [rbx + 4]": STATUS, "popcnt ax, cx": STATUS,
    "crc32 eax, cl": STATUS, "crc32 eax, word ptr [rbx]": STATUS, "crc32 rax, rdx": STATUS, "crc32 edx, dword ptr [rbx + 8]": STATUS,
}  # fmt: skip
BMI = {
    "andn rax, rcx, rdx": CF | ZF | SF | OF, "andn eax, ecx, [rbx]": CF | ZF | SF | OF, "bextr rax, rcx, rdx": CF | ZF | OF,
    "bextr eax, [rbx], esi": CF | ZF | OF, "blsi rax, rdx": CF | ZF | SF | OF, "blsmsk ecx, [rbx]": CF | ZF | SF | OF,
    "blsr rdx, rdx": CF | ZF | SF | OF, "bzhi rax, [rbx], rcx": CF | ZF | SF | OF, "bzhi eax, edx, esi": CF | ZF | SF | OF,
    "pdep rax, rcx, [rbx]": STATUS, "pext ecx, edx, esi": STATUS, "mulx rax, rcx, [rbx]": STATUS, "mulx eax, eax, ecx": STATUS,
    "rorx rax, rcx, 13": STATUS, "rorx edx, [rbx], 31": STATUS, "sarx rax, rcx, rdx": STATUS, "shlx eax, [rbx], ecx": STATUS,
    "shrx rax, [rbx], rsi": STATUS, "adcx rax, [rbx]": STATUS, "adox eax, ecx": STATUS,
}  # fmt: skip


@with_rows(8)
def test_counting_bits(rows):
    counts = same_at_both_levels(BITS, rows)
    assert counts == ({"popcnt": 24, "crc32": 32} if probe.cpl0_emulated() else {})


def test_bmi_and_adx():
    if not has("andn eax, eax, eax") or not has("mulx eax, ecx, edx") or not has("adcx eax, eax"):
        pytest.skip("a CPL3 program cannot execute BMI1, BMI2 and ADX here (probed)")

    @with_rows(8)
    def compare(rows):
        counts = same_at_both_levels(BMI, rows)
        assert sum(counts.values()) == (8 * len(BMI) if probe.cpl0_emulated() else 0)

    compare()


# --- INT n and its like ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("insn", "vector", "size"), [("int3", 3, 1), (".byte 0xcd, 3", 3, 2), ("int 0x80", 0x80, 2), (".byte 0xf1", 1, 1)])
@pytest.mark.parametrize("access", [TRAP, INTERRUPT])
@pytest.mark.parametrize("bits", [32, 64])
def test_int_goes_through_its_gate(insn, vector, size, access, bits):
    """The frame has the address behind the instruction, and an interrupt gate clears IF (SDM vol. 3 section 6.12.1.3)."""
    if vector == 1 and not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: KVM intercepts the #DB of INT1, and injects it in its own way (probed)")
    source = f"{gate(vector, access, bits)} lidt [idtr]; mov esp, 0x170004; sti; stc; here: {insn}"
    code, regs, sregs, stack, here, _ = at_the_handler(source, bits)
    assert code == 42
    assert stack[0] == here + size and stack[1] == (0x10 if bits == 64 else 8)
    assert stack[2] & 0x201 == 0x201 and regs.rflags & 1  # IF and CF in the frame; CF stays
    assert bool(regs.rflags & 0x200) == (access == TRAP)
    assert regs.rsp == (0x170000 - 5 * 8 if bits == 64 else 0x170004 - 3 * 4)  # long mode aligns it
    if bits == 64:
        assert stack[3:5] == [0x170004, 0x18]
    assert sregs.cs.dpl == 0 and sregs.cs.selector == stack[1]


def test_int_through_an_interrupt_stack():
    """IST1 of the TSS (SDM vol. 3 section 6.14.5)."""
    tss = "mov rax, 0x160000; mov [0x181000 + 36], rax; "
    descriptors = (
        "mov rax, 0x00af9b000000ffff; mov [0x182010], rax; mov rax, 0x00cf93000000ffff; mov [0x182018], rax; "
        "mov rax, 0x0000891810000067; mov [0x182020], rax; mov qword ptr [0x182028], 0; lgdt [gdtr]; mov eax, 0x20; ltr ax; "
    )
    source = (
        f"{tss} {descriptors} {gate(0x30, INTERRUPT, 64, ist=1)} lidt [idtr]; here: int 0x30; jmp after; gdtr: .word 0x2f; .quad 0x182000"
    )
    code, regs, _, stack, here, _ = at_the_handler(source, 64)
    assert (code, regs.rsp, stack[0], stack[3]) == (42, 0x160000 - 40, here + 2, 0x200000)


@pytest.mark.shadow
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("overflow", [False, True])
def test_into(bits, overflow):
    """INTO is vector 4 if OF is set, else nothing."""
    table = (
        "xor ax, ax; mov ds, ax; mov word ptr [16], offset handler; mov word ptr [18], 0; "
        if bits == 16
        else gate(4, TRAP, 32) + "lidt [idtr]; "
    )
    source = f"{table} mov al, {0x7F if overflow else 1}; inc al; mov {'sp' if bits == 16 else 'esp'}, 0x7000; here: .byte 0xce"
    code, _, _, stack, here, _ = at_the_handler(source, bits)
    assert code == (42 if overflow else 1)
    if overflow and bits == 16 and without_unrestricted_guest():
        assert stack[0] in (here, here + 1)  # KVM delivers #OF itself there, and may have forgotten how long INTO is
    elif overflow:
        assert stack[0] == here + 1


def without_unrestricted_guest():
    """VT-x with EPT off: real mode is virtual-8086 mode, as far as it can be."""
    try:
        return Path("/sys/module/kvm_intel/parameters/unrestricted_guest").read_text().strip() == "N"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("access", "vector", "what"), [(0x0F, 11, "not present"), (0x85, 13, "no gate of long mode"), (0x8C, 13, "a call gate")]
)
def test_int_through_a_bad_gate_faults_at_the_instruction(access, vector, what):
    """#NP or #GP with the gate's error code (SDM vol. 3 section 6.13): index, IDT, not external."""
    if tcg():
        pytest.skip("QEMU's TCG pushes the error code of a gate at twice its index, and RIP behind the instruction")
    bad = gate(0x31, access, 64)
    source = f"{bad} {gate(vector, TRAP, 64)} lidt [idtr]; mov esp, 0x170000; here: int 0x31"
    code, _, _, stack, here, _ = at_the_handler(source, 64)
    assert code == 42, what
    assert stack[:3] == [0x31 << 3 | 2, here, 0x10]


@pytest.mark.parametrize(
    ("insn", "error", "cr2"),
    [
        ("popcnt rax, [rbx]", 0, 0x8000000000),
        ("popcnt rax, [rbx - 4]", None, 0x7FFFFFFFFC),
        ("crc32 eax, byte ptr [rbx + 5]", 0, 0x8000000005),
    ],
)
def test_page_faults_of_assisted_instructions(insn, error, cr2):
    source = f"{gate(14, TRAP, 64)} lidt [idtr]; mov esp, 0x170000; mov rbx, 0x8000000000; here: {insn}"
    code, _, sregs, stack, here, _ = at_the_handler(source, 64)
    assert (code, stack[1], sregs.cr2) == (42, here, cr2)
    assert error is None or stack[0] == error


def test_a_trap_flag_stops_behind_the_instruction():
    """#DB, with DR6.BS, once the instruction is done; INT n clears TF on the way (SDM vol. 3 section 17.3.1.4)."""
    trap = "pushfq; or dword ptr [rsp], 0x100; mov ecx, 7; popfq"
    source = f"{gate(1, INTERRUPT, 64)} lidt [idtr]; mov esp, 0x170000; {trap}; here: popcnt eax, ecx"
    code, regs, _, stack, _, after = at_the_handler(source, 64)
    assert code == 42 and stack[0] == after and stack[2] & 0x100 and not regs.rflags & 0x100


def test_the_shadow_of_sti_ends():
    """Interrupts may come in behind the instruction after STI: KVM is told that it is done."""
    from pykvm.debug.control import Control

    if not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: a shadow is the CPU's, and a step may cover two instructions (probed)")
    with Machine(pykvm.asm("sti; popcnt eax, ecx; nop; hlt", org=0x100000), mode="long", memory="2M") as machine:
        control = Control(machine)
        shadows = [(control.step(0, TIMEOUT).rip, machine.vcpu.get_vcpu_events().interrupt.shadow != 0) for _ in range(2)]
    assert shadows == [(0x100001, True), (0x100005, False)]


# --- the rules --------------------------------------------------------------------------------------------------------


def test_without_assist_it_is_a_crash():
    if not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: KVM gives up on nothing here (probed)")
    with Machine(pykvm.asm("popcnt eax, ecx; hlt", org=0x100000), mode="long", memory="2M", assist=False) as machine:
        with pytest.raises(GuestCrash, match="emulator does not know `popcnt eax, ecx`"):
            machine.run(TIMEOUT)
        assert machine.result().assisted == {}


def test_what_cannot_be_finished_says_why():
    if not probe.cpl0_emulated():
        pytest.skip("this host executes CPL0 code: KVM gives up on nothing here (probed)")
    code = pykvm.asm("mov ebx, 0xd0100000; popcnt eax, [rbx]; hlt", org=0x100000)
    with Machine(code, mode="long", memory="2M") as machine, pytest.raises(GuestCrash) as crash:
        machine.run(TIMEOUT)
    assert "user space did not finish it: it accesses 4 bytes of MMIO at gpa 0xd0100000" in crash.value.explanation


@pytest.mark.shadow
def test_mmio_operands_reach_their_device():
    """On every host: KVM's emulator does not know POPCNT, which is what it needs for MMIO."""

    class Device:
        def read(self, offset, size):
            return 0xFF << 8 * offset

    with Machine(
        pykvm.asm("mov ebx, 0xd0100000; popcnt eax, dword ptr [rbx]; out 0xf4, al; hlt", org=0x100000), mode="long", memory="2M"
    ) as machine:
        machine.add_device(Device(), gpa=0xD0100000, length=8)
        result = machine.run(TIMEOUT)
    assert result.exit_code == 8
    assert result.assisted == {"popcnt": 1}


def test_a_fault_that_cannot_be_delivered_ends_the_run():
    """No IDT: the #PF of an assisted instruction is a triple fault, or is told as what it is; nothing loops."""
    code = pykvm.asm("mov rbx, 0x8000000000; popcnt eax, [rbx]; hlt", org=0x100000)
    with Machine(code, mode="long", memory="2M") as machine, pytest.raises(GuestCrash, match="the PML4 entry is not present"):
        machine.run(TIMEOUT)


def test_a_step_ends_behind_an_assisted_instruction():
    from pykvm.debug.control import Control

    if not probe.single_step("long"):
        pytest.skip("this host does not single-step CPL0 (probed)")
    with Machine(pykvm.asm("mov ecx, 7; popcnt eax, ecx; nop; hlt", org=0x100000), mode="long", memory="2M") as machine:
        control = Control(machine)
        assert [control.step(0, TIMEOUT).rip for _ in range(3)] == [0x100005, 0x100009, 0x10000A]
