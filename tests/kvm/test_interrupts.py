"""The host's side of interrupts, doorbells, coalesced writes, MSR exits and turns; the guests' side is in the gallery."""

import threading

import pytest

import pykvm
from pykvm import EventFd, Machine, Route, default_routes, msi_message, take_turns
from pykvm.abi import lib
from pykvm.errors import ConfigError
from pykvm.needs import unmet
from pykvm.x86.idt import GATE_SIZE, gate, use_idt
from pykvm.x86.modes import CODE64
from tests.conftest import FEW, TIMEOUT

READY = 0x142
CODE_GPA, IDT_GPA = 0x100000, 0x102000
LAPIC_ON = "mov ebx, 0xfee00000; mov dword ptr [rbx + 0xf0], 0x1ff"
# A 64-bit guest whose handler for VECTOR returns to where the guest ends with the vector as exit code. (It must return: Bochs keeps NMIs
# masked, for later VMs too, when a guest is given up in its NMI handler.)
WAITS = """
        jmp start
        .balign 16
handler:
        lea rax, [rip + done]
        mov [rsp + {frame}], rax
        add rsp, {frame}
        iretq
start:  {setup}
        sti
        mov edx, 0x142
        out dx, al
1:      hlt
        jmp 1b
done:   mov al, {vector}
        out 0xf4, al
        hlt
"""


def waits(vector, setup="", **options):
    source = WAITS.format(vector=vector, setup=setup, frame=8 if vector == 13 else 0)  # the error code
    machine = Machine(pykvm.asm(source, bits=64, org=CODE_GPA), mode="long", memory="2M", **options)
    machine.memory.write(IDT_GPA + GATE_SIZE * vector, gate(CODE_GPA + 0x10, CODE64))
    use_idt(machine.vcpu, IDT_GPA)
    return machine


def flat(source, **options):
    return Machine(pykvm.asm(source, bits=16, org=0x7C00), mode="real", memory="64K", **options)


class Calls:
    """A device that calls a function when the guest is ready (writes to READY)."""

    def __init__(self, do):
        self.do = do

    def write(self, offset, size, value):
        self.do()


def need(system, *names):
    why = unmet({"needs": ",".join(f"cap:{name}" for name in names)}, system)
    if why:
        pytest.skip(why)


# --- interrupts -------------------------------------------------------------------------------------------------------


def test_a_gsi_routed_to_an_msi(loop):
    with waits(0x51, LAPIC_ON, irqchip="kernel", loop=loop) as machine:
        machine.vm.set_gsi_routing([*default_routes(), Route.to_msi(30, *msi_message(0x51))])
        machine.add_device(Calls(lambda: machine.vm.irq_line(30, 1)), port=READY)
        assert machine.run(TIMEOUT).exit_code == 0x51


def test_an_msi_to_a_blocked_lapic_is_told():
    with waits(0x51, irqchip="kernel") as machine:
        machine.add_device(Calls(machine.stop), port=READY)
        machine.run(TIMEOUT)
        assert machine.vm.signal_msi(*msi_message(0x51)) is False  # SVR has not switched the LAPIC on
        with pytest.raises(ConfigError, match="8 bits"):
            msi_message(256)


@pytest.mark.parametrize("chip", ["kernel", "split", "none"])
def test_an_nmi_from_another_thread_wakes_a_halted_vcpu(chip):
    with waits(2, irqchip=chip) as machine:
        threads = []

        def later():
            threads.append(threading.Timer(0.01, machine.nmi))
            threads[0].start()
            if chip == "none":
                threads[0].join()  # there, HLT would end the run

        machine.add_device(Calls(later), port=READY)
        assert machine.run(TIMEOUT).exit_code == 2
        threads[0].join()


def test_an_exception_from_another_thread():
    with waits(6) as machine:
        machine.add_device(Calls(lambda: machine.inject_exception(6)), port=READY)
        assert machine.run(TIMEOUT).exit_code == 6


def test_interrupts_wait_in_line():
    source = """
        mov word ptr [0x80], offset handler
        mov word ptr [0x82], 0
        xor bx, bx
        mov dx, 0x142
        out dx, al
        sti
1:      cmp bx, 3
        jne 1b
        mov al, bl
        out 0xf4, al
        hlt
handler: inc bx
        iret
    """
    with flat(source) as machine:
        machine.add_device(Calls(lambda: [machine.interrupt(0x20) for _ in range(3)]), port=READY)
        result = machine.run(TIMEOUT)
        assert result.exit_code == 3
        assert result.exits["IRQ_WINDOW_OPEN"] >= 1


def test_what_an_irqchip_is_asked_in_vain():
    with flat("hlt") as machine:
        with pytest.raises(ConfigError, match="has no irqchip"):
            machine.irq(4)
        with pytest.raises(ConfigError, match="0 to 255"):
            machine.interrupt(256)
        with pytest.raises(ConfigError, match="vCPUs 0 to 0"):
            machine.nmi(1)
        with pytest.raises(ConfigError, match="vectors 0 to 31"):
            machine.inject_exception(32)
    with flat("hlt", irqchip="kernel") as machine:
        with pytest.raises(ConfigError, match=r"use irq\(gsi\)"):
            machine.interrupt(0x20)
        with pytest.raises(ConfigError, match="GSIs 0 to 23"):
            machine.irq(24)
    with pytest.raises(ConfigError, match="unknown irqchip 'pic'"):
        flat("hlt", irqchip="pic")
    with pytest.raises(ConfigError, match="need LAPICs"):
        flat("hlt", cpus=2, irqchip="none")


# --- doorbells and coalesced writes -----------------------------------------------------------------------------------


class Log:
    def __init__(self):
        self.writes = []

    def write(self, offset, size, value):
        self.writes.append((offset, size, value))


@pytest.mark.parametrize("level", [False, True], ids=["edge", "level"])
def test_an_irqfd_is_flushed(level, system):
    """What it was signalled for has arrived then, each time: the PIC has seen the edge, or the IOAPIC's line is high, and stays so."""
    why = unmet({"needs": "cap:KVM_CAP_IRQFD,cap:KVM_CAP_IRQFD_RESAMPLE"}, system)
    if why:
        pytest.skip(why)
    pin = 11

    def requested():
        if level:
            return vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC).chip.ioapic.irr >> pin & 1
        return vm.get_irqchip(lib.KVM_IRQCHIP_PIC_SLAVE).chip.pic.irr >> pin - 8 & 1

    with Machine("halt", irqchip="kernel") as machine, EventFd() as fd, EventFd() as resample:
        vm, request = machine.vm, (pin, fd.fd, resample.fd if level else -1)
        for _ in range(FEW):
            vm.irqfd(*request)
            assert not requested()
            fd.signal()
            vm.flush_irqfd(*request)
            assert requested()
            vm.flush_irqfd(*request)
            assert requested()
            vm.remove_irqfd(pin, fd.fd)
            if not level:  # a PIC remembers an edge until it is acknowledged
                chip = vm.get_irqchip(lib.KVM_IRQCHIP_PIC_SLAVE)
                chip.chip.pic.irr = 0
                vm.set_irqchip(chip)
        assert resample.take() == 0  # nobody has ended an interrupt


def test_a_doorbell_comes_and_goes(loop, system):
    need(system, "KVM_CAP_IOEVENTFD")
    with flat("mov dx, 0x300; 1: mov ax, 5; out dx, ax; mov ax, 6; out dx, ax; hlt; jmp 1b", loop=loop) as machine, EventFd() as bell:
        log = Log()
        claimed = machine.add_device(log, port=0x300, length=2, eventfd=bell, datamatch=5)
        machine.run(TIMEOUT)
        assert (bell.take(), log.writes) == (1, [(0, 2, 6)])
        machine.remove_device(claimed)
        machine.add_device(log, port=0x300, length=2)
        machine.run(TIMEOUT)
        assert (bell.take(), log.writes[1:]) == (0, [(0, 2, 5), (0, 2, 6)])


def test_an_mmio_doorbell_is_heard_by_a_thread(system):
    need(system, "KVM_CAP_IOEVENTFD")
    code = pykvm.asm("mov ebx, 0xd1000000; mov dword ptr [ebx], 1; hlt", bits=32, org=0x100000)
    with Machine(code, mode="protected", memory="2M") as machine, EventFd() as bell:
        machine.add_device(Log(), gpa=0xD1000000, length=4, eventfd=bell)
        heard = []
        thread = threading.Thread(target=lambda: heard.append(bell.wait(TIMEOUT)))
        thread.start()
        result = machine.run(TIMEOUT)
        thread.join()
        assert heard == [1]
        assert "MMIO" not in result.exits


def test_a_doorbell_that_kvm_refuses_is_not_claimed(system):
    need(system, "KVM_CAP_IOEVENTFD")
    with flat("hlt") as machine, EventFd() as bell:
        with pytest.raises(pykvm.KvmError, match="KVM_IOEVENTFD"):
            machine.add_device(Log(), port=0x300, length=3, eventfd=bell)
        machine.add_device(Log(), port=0x300, length=3)


def test_coalesced_writes_come_before_the_exit_they_precede(loop, system):
    need(system, "KVM_CAP_COALESCED_PIO")
    source = "mov dx, 0x300; mov al, 1; out dx, al; inc ax; out dx, al; mov dx, 0x142; out dx, al; mov dx, 0x300; inc ax; out dx, al; hlt"
    with flat(source, loop=loop) as machine:
        log = Log()
        machine.add_device(log, port=0x300, coalesced=True)
        seen = []
        machine.add_device(Calls(lambda: seen.append(list(log.writes))), port=READY)
        result = machine.run(TIMEOUT)
        assert seen == [[(0, 1, 1), (0, 1, 2)]]
        assert log.writes == [(0, 1, 1), (0, 1, 2), (0, 1, 3)]
        assert result.exits == {"IO": 1, "HLT": 1}


def test_a_device_that_fails_on_a_coalesced_write_is_given_it_again(loop, system):
    need(system, "KVM_CAP_COALESCED_PIO")

    class Fails(Log):
        broken = True

        def write(self, offset, size, value):
            if value == 2 and self.broken:
                raise RuntimeError("on purpose")
            super().write(offset, size, value)

    with flat("mov dx, 0x300; mov al, 1; out dx, al; inc ax; out dx, al; inc ax; out dx, al; hlt", loop=loop) as machine:
        device = Fails()
        machine.add_device(device, port=0x300, coalesced=True)
        with pytest.raises(RuntimeError, match="on purpose"):
            machine.run(TIMEOUT)
        assert device.writes == [(0, 1, 1)]
        device.broken = False
        assert machine.run(TIMEOUT).reason == "halted"
        assert [value for _, _, value in device.writes] == [1, 2, 3]


def test_more_coalesced_writes_than_the_ring_has_room_for(system):
    need(system, "KVM_CAP_COALESCED_PIO")
    with flat("mov dx, 0x300; mov cx, 1000; 1: mov ax, cx; out dx, ax; loop 1b; hlt") as machine:
        log = Log()
        machine.add_device(log, port=0x300, length=2, coalesced=True)
        machine.run(TIMEOUT)
        assert [value for _, _, value in log.writes] == list(range(1000, 0, -1))


# --- MSRs -------------------------------------------------------------------------------------------------------------


def test_msr_handlers(system):
    need(system, "KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER")
    kept = []
    code = pykvm.asm("mov ecx, 0x1234; rdmsr; inc eax; wrmsr; hlt", bits=32, org=0x100000)
    with Machine(code, mode="protected", memory="2M") as machine:
        machine.on_msr(0x1234, read=lambda: 41, write=kept.append)
        result = machine.run(TIMEOUT)
        assert kept == [42]
        assert result.exits == {"X86_RDMSR": 1, "X86_WRMSR": 1, "HLT": 1}
        assert machine.msrs.refused == {}
        with pytest.raises(ConfigError, match="x2APIC"):
            machine.on_msr(0x802)
        for i in range(15):
            machine.on_msr(0x4000_0000 + (i << 20))
        with pytest.raises(ConfigError, match="16 ranges"):
            machine.on_msr(0x6000_0000)
        machine.on_msr(0x1240)  # in a range that is there


def test_an_msr_without_a_handler_is_a_gp_and_counted(system):
    need(system, "KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER")
    with waits(13, "out 0x43, al; mov ecx, 0x1234; rdmsr") as machine:
        machine.on_msr(0x1234)
        assert machine.run(TIMEOUT).exit_code == 13
        assert machine.msrs.refused == {(0x1234, False): 1}


# --- turns ------------------------------------------------------------------------------------------------------------


def test_two_vms_take_turns_on_one_thread():
    slices = []

    def counted(name):
        machine = Machine("two_vms", append=name)
        run = machine.run

        def note(*arguments, **options):
            slices.append(name)
            return run(*arguments, **options)

        machine.run = note
        return machine

    with counted("a") as a, counted("b") as b:
        results = take_turns([a, b], slice=0.002, timeout=TIMEOUT)
        assert [r.console for r in results] == ["a" * 20 + "\n", "b" * 20 + "\n"]
    both = 2 * min(slices.count("a"), slices.count("b"))
    assert slices[:both] == ["a", "b"] * (both // 2)


def test_turns_have_a_time_limit():
    with Machine("spin") as a, Machine("halt") as b:
        assert [r.reason for r in take_turns([a, b], slice=0.01, timeout=0.05)] == ["timeout", "halted"]
        with pytest.raises(ConfigError, match="positive"):
            take_turns([a], slice=0)


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_a_line_is_one_however_often_it_is_asked_for(irqchip):
    with Machine("halt", irqchip=irqchip) as m:
        line = m.irq(10)
        line.set(1)
        assert m.irq(10) is line and m.irq(10).level == 1 and m.irq(11).level == 0
