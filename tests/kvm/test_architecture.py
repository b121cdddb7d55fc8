"""What the architecture says, where the three kinds of hosts differ: RIP at exits, debug exits, hypercalls, CPL3, CPUID.

Each test states the manual's behaviour. Where a host cannot show it, a probe (pykvm/probe.py) says so and the test is skipped with
that reason; docs/hosts.md has the table.
"""

import pytest

import pykvm
from pykvm import GuestCrash, Machine, probe
from pykvm.abi import lib, new
from tests.conftest import TIMEOUT

MODES = {"real": 16, "protected": 32, "long": 64, "user": 64}


def snippet(source, mode, **options):
    """A machine for a few instructions of assembly, and where they start."""
    org = 0x7C00 if mode == "real" else 0x100000
    return Machine(pykvm.asm(source, bits=MODES[mode], org=org), mode=mode, memory="2M", **options), org


def length(source, mode):
    """How many bytes that is."""
    return len(pykvm.asm(source, bits=MODES[mode]))


# --- RIP at exits -----------------------------------------------------------------------------------------------------


@pytest.mark.shadow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("before", "insn"),
    [
        ("nop", "out 0xf4, al"),
        ("nop", "out 0x7e, al"),
        ("mov dx, 0xf4", "out dx, al"),
        ("mov dx, 0xf4", "out dx, ax"),
        ("mov dx, 0xf4", "out dx, eax"),
        ("out 0x80, al", "out 0xf4, al"),
    ],
)
def test_insn_rip_of_out(mode, before, insn):
    """The same on every host, though KVM leaves RIP at OUT on VT-x and AMD-V and past it where OUT is emulated."""
    machine, start = snippet(f"{before}; {insn}; nop; nop; ud2", mode)
    with machine:
        stops = []
        if "0x7e" in insn:
            machine.add_device(_Stopper(machine, stops), port=0x7E)
        machine.run(TIMEOUT)
        assert machine.insn_rip() == start + length(before, mode)


class _Stopper:
    def __init__(self, machine, stops):
        self.machine, self.stops = machine, stops

    def write(self, offset, size, value):
        self.machine.stop()

    def read(self, offset, size):
        self.machine.stop()
        return 0


@pytest.mark.parametrize("mode", MODES)
def test_insn_rip_of_in_and_hlt(mode):
    if mode != "user":
        machine, start = snippet("nop; hlt; nop", mode)
        with machine:
            machine.run(TIMEOUT)
            assert machine.insn_rip() == start + 1
    machine, start = snippet("nop; in al, 0x90; nop; nop; ud2", mode)
    with machine:
        exit = machine.vcpu.run(TIMEOUT)
        assert (exit.port, exit.size) == (0x90, 1)
        assert machine.insn_rip() == start + 1


@pytest.mark.shadow
@pytest.mark.parametrize("mode", ["protected", "long", "user"])
@pytest.mark.parametrize("insn", ["mov dword ptr [ebx], 7", "mov [ebx], al", "mov eax, [ebx]"])
def test_insn_rip_of_mmio(mode, insn):
    insn = insn.replace("ebx", "rbx") if MODES[mode] == 64 else insn
    before = "mov ebx, 0xd0200000; xor eax, eax"
    machine, start = snippet(f"{before}; {insn}; nop; nop; ud2", mode)
    with machine:
        machine.add_device(_Stopper(machine, []), gpa=0xD0200000, length=8)
        machine.run(TIMEOUT)
        assert machine.insn_rip() == start + length(before, mode)


def test_rep_outs_stays_at_the_instruction():
    before = "mov esi, 0x100000; mov ecx, 3; mov dx, 0x90; cld"
    machine, start = snippet(f"{before}; rep outsb; out 0xf4, al", "long")
    with machine:
        exit = machine.vcpu.run(TIMEOUT)
        assert (exit.port, exit.size) == (0x90, 1)
        assert exit.count == 3 or machine.insn_rip() == start + length(before, "long")


# --- debug exits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_single_step(mode):
    """KVM_GUESTDBG_SINGLESTEP: #DB after each instruction (SDM vol. 3 section 17.3.1.4)."""
    if not probe.single_step(mode):
        pytest.skip(f"this host does not single-step {mode} mode (probed)")
    machine, start = snippet("nop; inc eax; nop; out 0xf4, al", mode)
    with machine:
        machine.vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
        seen = []
        for _ in range(3):
            assert isinstance(machine.vcpu.run(TIMEOUT), pykvm.Debug)
            seen.append(machine.vcpu.get_regs().rip - start)
        step = length("inc eax", mode)
        assert seen == [1, 1 + step, 2 + step]


def test_hardware_breakpoint():
    """DR0 and DR7 through KVM_GUESTDBG_USE_HW_BP: a DEBUG exit before the instruction runs (SDM vol. 3 section 17.2.4)."""
    if not probe.breakpoints("hardware"):
        pytest.skip("debug registers do not stop a guest on this host (probed): a fault of its emulation of AMD-V")
    machine, start = snippet("nop; nop; inc eax; out 0xf4, al", "long")
    with machine:
        debug = new("struct kvm_guest_debug")
        debug.control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
        debug.cdata.arch.debugreg[0] = start + 2
        debug.cdata.arch.debugreg[7] = 0x402
        machine.vcpu.set_guest_debug(debug)
        exit = machine.vcpu.run(TIMEOUT)
        assert isinstance(exit, pykvm.Debug)
        assert machine.vcpu.get_regs().rip == start + 2
        assert machine.vcpu.get_regs().rax == 0


def test_software_breakpoint():
    """KVM_GUESTDBG_USE_SW_BP: the guest's INT3 becomes a DEBUG exit with RIP at it."""
    if not probe.breakpoints("software"):
        pytest.skip("INT3 does not exit on this host (probed): CPL0 code is emulated, or its AMD-V does not intercept #BP from INT3")
    machine, start = snippet("nop; int3; out 0xf4, al", "long")
    with machine:
        machine.vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_SW_BP)
        assert isinstance(machine.vcpu.run(TIMEOUT), pykvm.Debug)
        assert machine.vcpu.get_regs().rip == start + 1


# --- hypercalls, software interrupts, CPL3 ----------------------------------------------------------------------------


@pytest.mark.parametrize("insn", ["vmcall", "vmmcall"])
def test_unknown_hypercalls_return(insn):
    """KVM answers -KVM_ENOSYS (-1000) to a number that it does not know, with either vendor's instruction (api.rst, hypercalls.rst)."""
    if not probe.hypercall_returns():
        pytest.skip("hypercalls never come back to CPL0 on this host (probed)")
    machine, _ = snippet(f"mov eax, 0x7fff; {insn}; cmp eax, -1000; setne al; out 0xf4, al", "long")
    with machine:
        assert machine.run(TIMEOUT).exit_code == 0


@pytest.mark.parametrize("bits", [16, 64])
def test_software_interrupts_reach_their_handler(bits):
    """INT n through the IVT, or through a 64-bit gate (SDM vol. 3 chapter 6); where KVM's emulator does not know it, by assist."""
    if bits == 16:
        source = """xor ax, ax; mov ds, ax; mov word ptr [0x84], offset handler; mov word ptr [0x86], 0; mov sp, 0x7000
            int 0x21; mov al, 1; out 0xf4, al; handler: mov al, 42; out 0xf4, al"""
        machine, _ = snippet(source, "real")
    else:
        source = """mov eax, offset handler; mov [0x180000 + 0x210], ax; mov word ptr [0x180000 + 0x212], cs
            mov word ptr [0x180000 + 0x214], 0x8e00; shr eax, 16; mov [0x180000 + 0x216], ax; lidt [idtr]; int 0x21
            mov al, 1; out 0xf4, al; handler: mov al, 42; out 0xf4, al; idtr: .word 0xfff; .quad 0x180000"""
        machine, _ = snippet(source, "long")
    with machine:
        assert machine.run(TIMEOUT).exit_code == 42


@pytest.mark.shadow
@pytest.mark.parametrize(
    ("insn", "vector"),
    [("hlt", "#GP"), ("mov rax, cr3", "#GP"), ("ud2", "#UD"), ("int3", "#BP"), ("mov rax, [0x1000]", "#PF"), ("mov rax, [0]", "#PF")],
)
def test_exceptions_of_cpl3_reach_the_kernel(insn, vector):
    machine, start = snippet(f"nop; {insn}", "user")
    with machine, pytest.raises(GuestCrash) as crash:
        machine.run(TIMEOUT)
    first = str(crash.value).splitlines()[0]
    assert vector in first
    assert f"{start + 1:#x}" in first  # INT3 too, though the frame's RIP is past it


def test_cpl3_reaches_every_port():
    """User mode grants ports twice, since of two hosts each knows one way only."""
    machine, _ = snippet("mov dx, 0xfff0; in al, dx; mov al, 7; out 0xf4, al", "user")
    with machine:
        assert machine.run(TIMEOUT).exit_code == 7


@pytest.mark.parametrize(("by", "change"), [("bitmap", probe.only_bitmap), ("iopl", probe.only_iopl)])
def test_cpl3_reaches_ports_by(by, change):
    """CPL <= IOPL, or else a zero in the TSS's I/O bitmap, is enough (SDM vol. 1 section 19.5; APM vol. 2 section 12.2.5)."""
    if not probe.cpl3_ports(by):
        pytest.skip(f"on this host the {by} grants CPL3 no port (probed)")
    machine, _ = snippet("mov al, 7; out 0xf4, al", "user")
    with machine:
        change(machine.vcpu, machine.memory)
        assert machine.run(TIMEOUT).exit_code == 7


def test_cpl3_without_either_gets_gp():
    machine, start = snippet("nop; mov al, 7; out 0xf4, al", "user")
    with machine:
        probe.only_bitmap(machine.vcpu, machine.memory)
        probe.only_iopl(machine.vcpu, machine.memory)
        with pytest.raises(GuestCrash, match=rf"#GP.*`out 0xf4, al` at {start + 3:#x}"):
            machine.run(TIMEOUT)


# --- entry and CPUID --------------------------------------------------------------------------------------------------


def test_contradicting_state_is_refused():
    """CR0.PG without CR0.PE cannot be (SDM vol. 3 section 2.5): KVM_SET_SREGS refuses it and names itself."""
    with Machine("hello") as machine:
        sregs = machine.vcpu.get_sregs()
        sregs.cr0 &= ~1
        with pytest.raises(pykvm.KvmError, match=r"KVM_SET_SREGS.*CR0, CR4, EFER and CS"):
            machine.vcpu.set_sregs(sregs)


def test_invalid_guest_state_is_a_fail_entry():
    """CS.L and CS.D both set: KVM takes it, the CPU refuses to enter (SDM vol. 3 section 26.3.1.2; APM vol. 2 section 15.5.1)."""
    if probe.cpl0_emulated():
        pytest.skip("this host emulates CPL0 code: no CPU checks the state at entry (probed)")
    machine, _ = snippet("out 0xf4, al", "long")
    with machine:
        sregs = machine.vcpu.get_sregs()
        sregs.cs.l = sregs.cs.db = 1
        machine.vcpu.set_sregs(sregs)
        with pytest.raises(GuestCrash, match=r"refused to enter the guest.*contradict each other"):
            machine.run(TIMEOUT)


def test_cpuid_masks_hold():
    """A feature that KVM_SET_CPUID2 takes away is gone for the guest, where CPUID is intercepted (always on VT-x and AMD-V)."""
    if probe.cpl0_emulated():
        pytest.skip("this host's KVM keeps the CPU's own features whatever it is told (probed: it emulates CPL0 code)")
    source = "mov eax, 1; cpuid; bt ecx, 0; setc al; out 0xf4, al"  # SSE3
    for masked in (False, True):
        machine, _ = snippet(source, "long")
        with machine:
            cpuid = machine.system.get_supported_cpuid().as_guest()
            leaf1 = next(e for e in cpuid.cdata.entries[0 : len(cpuid)] if e.function == 1)
            if masked:
                leaf1.ecx &= ~1
            machine.vcpu.set_cpuid2(cpuid)
            assert machine.run(TIMEOUT).exit_code == (0 if masked else 1)
