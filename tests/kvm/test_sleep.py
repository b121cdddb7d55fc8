"""S3 on the platform pc-test: what a guest loses, what it keeps, and what wakes it."""

import time
from threading import Thread

import pytest

from pykvm import Machine, asm
from pykvm.debug.control import Control
from tests.conftest import TIMEOUT

LSTAR, SYSTEM_TIME = 0xC0000082, 0x4B564D01
BEFORE = 0x2000  # 0 before S3, 1 if anything ran behind the OUT that asks for it
# As kvm-unit-tests' s3 goes about it: an alarm each second, the vector into the FACS, a resume in real mode that ends with what it finds.
CODE = f"""
    .code64
    mov ecx, {LSTAR}
    mov eax, 0x1234
    xor edx, edx
    wrmsr
    mov eax, 0xe000c                # in the FACS
    mov dword ptr [rax], {{vector}}
    lea rsi, resume[rip]
    mov edi, 0x1000
    mov ecx, offset resume_end - resume
    rep movsb
    mov dx, 0x602
    mov ax, {{enable}}
    out dx, ax
    .irp n, 1, 3, 5                 # the alarm's registers: whenever a second is full
    mov al, \\n
    out 0x70, al
    mov al, 0xc0
    out 0x71, al
    .endr
    mov al, 11
    out 0x70, al
    mov al, 0x22                    # 24 hours, the alarm's interrupt
    out 0x71, al
    mov dword ptr [{BEFORE}], 0
    mov dx, 0x604
    mov ax, 0x2400
    out dx, ax
1:  mov dword ptr [{BEFORE}], 1
    jmp 1b
resume:
    .code16
    mov dx, 0x600
    in ax, dx
    shr ax, 8                       # 0x84: woken, by the RTC; 0x81: by the power button
    add ax, [{BEFORE}]
    out 0xf4, al
    hlt
resume_end:
"""
RTC, BUTTON = 0x84, 0x81


def sleeper(system, enable=0x400, vector=0x1000, **options):
    code = asm(CODE.format(enable=enable, vector=vector), bits=64, org=0x100000)
    machine = Machine(code, mode="long", memory="2M", platform="pc-test", system=system, **options)
    machine.rtc.now = lambda: 50 * time.monotonic()  # a second is full 50 times as often
    return machine


def until_asleep(machine):
    deadline = time.monotonic() + TIMEOUT
    while not machine.pc.asleep and time.monotonic() < deadline:
        assert machine.run(0.05).reason == "timeout"
    assert machine.pc.asleep


@pytest.mark.parametrize(("irqchip", "cpus"), [("kernel", 1), ("kernel", 2), ("split", 2)])
def test_the_alarm_wakes(system, loop, irqchip, cpus):
    with sleeper(system, irqchip=irqchip, cpus=cpus, loop=loop) as machine:
        result = machine.run(TIMEOUT)
        assert (result.reason, result.exit_code) == ("exit", RTC), result.explanation
        assert machine.vcpu.get_msr(LSTAR) == 0 and machine.vcpu.get_sregs().efer == 0 and machine.vcpu.get_sregs().cs.selector == 0x100
        assert not machine.pc.asleep


def test_the_power_button_wakes_from_any_thread(system):
    with sleeper(system, enable=0) as machine:
        until_asleep(machine)
        limited = machine.run(0.05)
        assert limited.reason == "timeout" and "suspended (ACPI S3)" in limited.explanation  # it has not halted for good
        results = []
        thread = Thread(target=lambda: results.append(machine.run(TIMEOUT)))
        thread.start()
        machine.pc.acpi.press_power_button()
        thread.join()
        assert results[0].exit_code == BUTTON


def test_saved_while_asleep(system, tmp_path):
    with sleeper(system, enable=0, cpus=2) as machine:
        until_asleep(machine)
        machine.snapshot(tmp_path / "asleep")
    with Machine.restore(tmp_path / "asleep", system=system) as machine:
        assert machine.pc.asleep
        machine.pc.acpi.press_power_button()
        assert machine.run(TIMEOUT).exit_code == BUTTON


def test_reset_and_fork(system):
    """Back from after S3 to before it, and back into it; a clone sleeps too."""
    with sleeper(system, cpus=2) as machine:
        machine.checkpoint()
        assert machine.run(TIMEOUT).exit_code == RTC
        machine.reset()
        assert machine.vcpu.get_sregs().cs.selector == 0x10
        assert machine.run(TIMEOUT).exit_code == RTC
    with sleeper(system, enable=0) as machine:
        until_asleep(machine)
        machine.checkpoint()
        for _ in range(2):
            machine.pc.acpi.press_power_button()
            assert machine.run(TIMEOUT).exit_code == BUTTON
            machine.reset()
            assert machine.pc.asleep
        with machine.fork() as clone:
            clone.pc.acpi.press_power_button()
            assert clone.run(TIMEOUT).exit_code == BUTTON


@pytest.mark.parametrize("vector", [0, 0x100000, 0xFFFFFFFF])
def test_nowhere_to_go_on(system, vector):
    with sleeper(system, vector=vector) as machine:
        assert machine.run(TIMEOUT).reason == "reset"


def test_step_by_step(system):
    """The OUT that suspends is a step like any other, and the next one lasts until something wakes the guest."""
    with sleeper(system) as machine:
        control = Control(machine)
        for _ in range(500):
            stopped = control.step(timeout=TIMEOUT)
            assert stopped.reason == "step"
            if machine.pc.asleep:
                break
        stopped = control.step(timeout=TIMEOUT)
        assert (stopped.reason, stopped.rip) == ("step", 0x1000) and not machine.pc.asleep
        assert control.cont(TIMEOUT).code == RTC


def test_firmware_comes_from_the_reset_vector(system):
    """And finds in CMOS that it is to resume."""
    code = asm(
        """
        mov al, 0x0f
        out 0x70, al
        in al, 0x71
        test al, al
        jnz 1f
        mov dx, 0x604
        mov ax, 0x2400
        out dx, ax
        1: out 0xf4, al
        hlt
        """,
        bits=16,
        org=0xFF00,
    )
    image = bytes(0xFF00) + code.ljust(0xF0, b"\xf4") + b"\xe9\x0d\xff".ljust(16, b"\0")  # jmp 0xff00
    with Machine(image, format="firmware", memory="2M", system=system) as machine:
        until_asleep(machine)
        machine.pc.acpi.press_power_button()
        assert machine.run(TIMEOUT).exit_code == 0xFE
