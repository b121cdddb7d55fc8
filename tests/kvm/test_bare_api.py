"""System, VM and VCPU alone, as the author of a 20-line VMM uses them: no Machine, no bus, no run loop."""

import ctypes
import errno
import gc
import mmap
import os
import time
from contextlib import contextmanager

import pytest

import pykvm
from pykvm import VCPU, VM, GuestMemory, Hlt, IoIn, IoOut, KvmError, MmioRead, MmioWrite, System, asm, mode_named, probe
from pykvm.abi import lib
from pykvm.x86.paging import PageTableBuilder, walk
from tests.conftest import TIME_SCALE

TIMEOUT = 20 * TIME_SCALE
HOLE = 0xC000_0000
P, RW = 1, 2


@contextmanager
def guest(source, mode="real", memory="64K"):
    """(vcpu, ram) of a VM whose code is ``source``; real mode at 0x1000, else 1 MiB in 2 MiB of RAM."""
    bits, at = {"real": (16, 0x1000), "protected": (32, 0x100000)}.get(mode, (64, 0x100000))
    with System() as system, GuestMemory.of_size(memory if mode == "real" else "2M") as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        ram.write(at, asm(source, bits=bits, org=at))
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
        mode_named(mode).apply(vcpu, ram, at)
        yield vcpu, ram


def exits_until_hlt(vcpu, answer=lambda exit: 0):
    """All exits up to HLT; IN and MMIO reads get ``answer(exit)``."""
    seen = []
    while not isinstance(exit := vcpu.run(TIMEOUT), Hlt):
        seen.append(exit)
        match exit:
            case IoIn() | MmioRead():
                exit.reply(answer(exit))
            case IoOut() | MmioWrite():
                pass
            case _:
                pytest.fail(f"unexpected {exit!r} after {seen!r}")
    return seen


# --- a small VMM ------------------------------------------------------------------------------------------------------


def test_a_vmm_in_twenty_lines():
    console, code = bytearray(), None
    with System() as system, GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
        vm.add_memory(ram)
        ram.write(0x1000, pykvm.asm("mov al, 'h'; out 0xe9, al; mov al, 'i'; out 0xe9, al; in al, 0x60; inc al; out 0xf4, al", bits=16))
        vcpu = vm.create_vcpu()
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = 0x1000, 2
        vcpu.set_regs(regs)
        while code is None:
            match vcpu.run(TIMEOUT):
                case pykvm.IoOut(port=0xE9, data=data):
                    console += data
                case pykvm.IoIn(port=0x60) as question:
                    question.reply(41)
                case pykvm.IoOut(port=0xF4, data=d):
                    code = d[0]
                case other:
                    pytest.fail(f"unexpected {other!r}")
    assert (bytes(console), code) == (b"hi", 42)


# --- exits and their answers ------------------------------------------------------------------------------------------


@pytest.mark.shadow
def test_port_accesses_of_all_sizes():
    source = """
        mov dx, 0x300; in al, dx; out dx, al
        mov dx, 0x302; in ax, dx; out dx, ax
        mov dx, 0x304; in eax, dx; out dx, eax
        hlt"""
    with guest(source) as (vcpu, _):
        exits = exits_until_hlt(vcpu, lambda exit: 0x8877665544332211 >> 8 * (exit.port & 0xF))  # answers are cut to the size
        assert [(e.port, e.size, e.count) for e in exits] == [(p, s, 1) for p, s in ((0x300, 1), (0x302, 2), (0x304, 4)) for _ in "io"]
        assert [e for e in exits if isinstance(e, IoOut)] == [
            IoOut(0x300, 1, b"\x11"),
            IoOut(0x302, 2, b"\x33\x44"),
            IoOut(0x304, 4, b"\x55\x66\x77\x88"),
        ]
        assert exits[-1].value == 0x88776655


@pytest.mark.shadow
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_accesses_of_all_sizes(size):
    register = {1: "al", 2: "ax", 4: "eax", 8: "rax"}[size]
    value = 0x8877665544332211 & (1 << 8 * size) - 1
    with guest(f"mov ebx, 0xd0000010; mov {register}, [rbx]; mov [rbx + 0x20], {register}; hlt", "long") as (vcpu, _):
        read = vcpu.run(TIMEOUT)
        assert (type(read), read.gpa, read.size) == (MmioRead, 0xD0000010, size)
        read.reply(value.to_bytes(size, "little"))
        write = vcpu.run(TIMEOUT)
        assert write == MmioWrite(0xD0000030, value.to_bytes(size, "little"))
        assert (write.value, write.size) == (value, size)
        assert vcpu.run(TIMEOUT) == Hlt()


def test_a_wrong_number_of_bytes_is_refused_and_the_guest_still_waits():
    with guest("in ax, 0x10; out 0x12, ax; hlt") as (vcpu, _):
        question = vcpu.run(TIMEOUT)
        for wrong in (b"", b"\x01", b"\x01\x02\x03"):
            with pytest.raises(ValueError, match="2 bytes"):
                question.reply(wrong)
        question.reply(b"\x34\x12")
        assert vcpu.run(TIMEOUT) == IoOut(0x12, 2, b"\x34\x12")


def test_an_exit_stays_true_after_the_next_run_and_after_close():
    with guest("mov al, 1; out 0x10, al; inc al; out 0x10, al; in al, 0x11; hlt") as (vcpu, _):
        first, second, question = (vcpu.run(TIMEOUT) for _ in range(3))
    assert (first, second) == (IoOut(0x10, 1, b"\x01"), IoOut(0x10, 1, b"\x02"))
    assert repr(first) == "IoOut(port=0x10, size=1, data=b'\\x01', count=1)"
    assert repr(question) == "IoIn(port=0x11, size=1, count=1)"
    with pytest.raises(pykvm.ConfigError, match="closed"):
        question.reply(0)


@pytest.mark.shadow
@pytest.mark.parametrize(("letter", "size"), [("b", 1), ("w", 2), ("d", 4)])
def test_rep_outs_honours_count(letter, size):
    sent = bytes(range(1, 1 + 24 * size))
    with guest(f"cld; mov si, 0x2000; mov cx, 24; mov dx, 0x300; rep outs{letter}; hlt") as (vcpu, ram):
        ram.write(0x2000, sent)
        exits = exits_until_hlt(vcpu)
        assert all((e.port, e.size, len(e.data)) == (0x300, size, size * e.count) for e in exits)
        assert sum(e.count for e in exits) == 24
        assert b"".join(e.data for e in exits) == sent
        assert vcpu.get_regs().rcx & 0xFFFF == 0


@pytest.mark.shadow
@pytest.mark.parametrize(("letter", "size"), [("b", 1), ("w", 2), ("d", 4)])
def test_rep_ins_honours_count(letter, size):
    wanted = bytes(range(1, 1 + 24 * size))
    left = bytearray(wanted)

    def take(exit):
        assert (exit.port, exit.size) == (0x300, size)
        part = bytes(left[: size * exit.count])
        del left[: size * exit.count]
        return part

    with guest(f"cld; mov di, 0x2ff0; mov cx, 24; mov dx, 0x300; rep ins{letter}; hlt") as (vcpu, ram):  # across a page boundary
        exits = exits_until_hlt(vcpu, take)
        assert sum(e.count for e in exits) == 24
        assert ram.read(0x2FF0, 24 * size + 1) == wanted + b"\0"
        assert not left


def test_an_integer_answers_each_element_of_a_rep():
    with guest("cld; mov di, 0x2000; mov cx, 6; mov dx, 0x300; rep insw; hlt") as (vcpu, ram):
        exits_until_hlt(vcpu, lambda exit: 0x1234)
        assert ram.read(0x2000, 14) == b"\x34\x12" * 6 + bytes(2)


def test_a_read_only_slot_exits_on_writes_only(system):
    if not system.check_extension("KVM_CAP_READONLY_MEM"):
        pytest.skip("no KVM_CAP_READONLY_MEM")
    with GuestMemory.of_size("64K") as ram, system.create_vm() as vm:
        rom = ram.add(0x20000, 0x1000, readonly=True)
        ram.write(0x20000, b"\x5a")
        ram.write(0x1000, asm("mov ax, 0x2000; mov ds, ax; mov al, [0]; mov [1], al; mov al, [1]; out 0xf4, al", bits=16))
        vm.add_memory(ram)
        vcpu = vm.create_vcpu()
        mode_named("real").apply(vcpu, ram, 0x1000)
        assert vcpu.run(TIMEOUT) == MmioWrite(0x20001, b"\x5a")
        assert vcpu.run(TIMEOUT) == IoOut(0xF4, 1, b"\0")
        assert ram.read(rom.gpa, 2) == b"\x5a\0"


# --- registers and translation ----------------------------------------------------------------------------------------

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))


def test_regs_roundtrip_and_reach_the_guest():
    with guest("add rax, rbx; mov [r15], rax; hlt", "long") as (vcpu, ram):
        regs = vcpu.get_regs()
        for number, name in enumerate(GENERAL, 1):
            setattr(regs, name, number << 32 | number)
        regs.r15, regs.rflags = 0x9F000, 2 | 1 << 6
        vcpu.set_regs(regs)
        assert vcpu.get_regs() == regs
        assert vcpu.run(TIMEOUT) == Hlt()
        assert ram.read_u64(0x9F000) == 3 << 32 | 3
        after = vcpu.get_regs()
        assert after.rip == regs.rip + len(asm("add rax, rbx; mov [r15], rax; hlt"))
        assert [getattr(after, n) for n in GENERAL[1:]] == [getattr(regs, n) for n in GENERAL[1:]]


@pytest.mark.parametrize("mode", ["real", "protected", "long", "user"])
def test_sregs_roundtrip(mode):
    with guest("hlt", mode) as (vcpu, _):
        before = vcpu.get_sregs()
        changed = before.copy()
        changed.cr2, changed.gdt.base, changed.gdt.limit, changed.idt.base = 0x1234, 0x5000, 0x7F, 0x6000
        assert changed != before
        vcpu.set_sregs(changed)
        after = vcpu.get_sregs()
        assert after == changed
        assert (after.cr2, after.gdt.base, after.gdt.limit, after.idt.base) == (0x1234, 0x5000, 0x7F, 0x6000)
        vcpu.set_sregs(before)
        assert vcpu.get_sregs() == before


def control_registers(vcpu):
    sregs = vcpu.get_sregs()
    return {name: getattr(sregs, name) for name in ("cr0", "cr3", "cr4", "efer")}


@pytest.mark.shadow
@pytest.mark.parametrize("mode", ["long", "user"])
def test_kvm_translate_agrees_with_the_walk(mode):
    with guest("hlt", mode) as (vcpu, ram):
        control = control_registers(vcpu)
        some = (0, 0xFFF, 0x1000, 0x9123, 0x100000, 0x1FFFFF, 0x200000, 0xBFFFFFFF, 0xD0000123, 0xFFFFFFFF, 1 << 32, 1 << 46)
        for gva in some:
            assert vcpu.translate(gva) == walk(ram, gva, **control).gpa, hex(gva)
        assert vcpu.translate(0xD0000123) == 0xD0000123
        assert vcpu.translate(1 << 32) is None
        assert vcpu.translate(0) == (None if mode == "user" else 0)


@pytest.mark.shadow
def test_kvm_translate_follows_tables_of_ones_own():
    with guest("mov rbx, [rax]; hlt", "long") as (vcpu, ram):
        builder = PageTableBuilder(ram, 0x180000, 0x1A0000)
        builder.map(0x100000, 0x100000, 0x1000, page_size=0x1000)
        builder.map(0xFFFF_8000_0000_0000, 0x3000, 0x2000, page_size=0x1000)
        builder.map(0x40000000, 0x200000, 0x400000, page_size=0x200000)
        sregs = vcpu.get_sregs()
        sregs.cr3 = builder.cr3
        vcpu.set_sregs(sregs)
        control = control_registers(vcpu)
        expected = {
            0x100000: 0x100000,
            0x101000: None,
            0xFFFF_8000_0000_0FFF: 0x3FFF,
            0xFFFF_8000_0000_1234: 0x4234,
            0xFFFF_8000_0000_2000: None,
            0xFFFF_FFFF_FFFF_F000: None,
            0x40000000: 0x200000,
            0x401FFFFF: 0x3FFFFF,
            0x40234567: 0x434567,
            0x40400000: None,
        }
        for gva, gpa in expected.items():
            assert walk(ram, gva, **control).gpa == gpa, hex(gva)
            assert vcpu.translate(gva) == gpa, hex(gva)
        ram.write_u64(0x4230, 0x1122334455667788)
        regs = vcpu.get_regs()
        regs.rax = 0xFFFF_8000_0000_1230
        vcpu.set_regs(regs)
        assert vcpu.run(TIMEOUT) == Hlt()  # and the CPU agrees with both
        assert vcpu.get_regs().rbx == 0x1122334455667788


def test_kvm_translate_without_paging():
    with guest("hlt") as (vcpu, ram):
        for gva in (0, 0x1234, 0xFFFFF):
            assert vcpu.translate(gva) == walk(ram, gva, **control_registers(vcpu)).gpa == gva


# --- host memory that cannot be reached -------------------------------------------------------------------------------


def protect(slot, protection):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(slot.hva), ctypes.c_size_t(slot.size), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


@contextmanager
def guest_with_protected_slot(source, mode, protection):
    """(vcpu, slot): at 3 GiB, a page of 0x5a bytes with this host protection."""
    with System() as system, GuestMemory.of_size("2M") as ram, system.create_vm() as vm:
        slot = ram.add(HOLE, 0x1000)
        ram.write(HOLE, b"\x5a" * 0x1000)
        protect(slot, protection)
        vm.add_memory(ram)
        ram.write(0x100000, asm(source, org=0x100000))
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
        mode_named(mode).apply(vcpu, ram, 0x100000)
        yield vcpu, slot


@pytest.mark.shadow
@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("mode", ["long", "user"])
def test_a_slot_that_the_host_may_not_touch(mode, access):
    """EFAULT where the CPU runs the guest, an MMIO exit where KVM's emulator does; then the guest can go on."""
    insn = "mov al, [rbx]" if access == "read" else "mov byte ptr [rbx], 7; mov al, 0x5a"
    with guest_with_protected_slot(f"mov ebx, {HOLE}; {insn}; out 0xf4, al; hlt", mode, 0) as (vcpu, slot):
        outcome = []
        try:
            outcome.append(vcpu.run(TIMEOUT))
        except KvmError as error:
            assert (error.ioctl, error.errno) == ("KVM_RUN", errno.EFAULT)
            assert "host memory" in str(error)
        protect(slot, mmap.PROT_READ | mmap.PROT_WRITE)
        match outcome:
            case [] | [pykvm.MemoryFault()]:
                assert all(exit.gpa <= HOLE < exit.gpa + exit.size for exit in outcome)
                written = 7
            case [MmioRead(gpa=0xC000_0000, size=1) as question] if access == "read":
                question.reply(0x5A)
                written = None
            case [MmioWrite(gpa=0xC000_0000, data=b"\x07")] if access == "write":
                written = 0x5A  # by nobody: the VMM has the data
            case _:
                pytest.fail(f"unexpected {outcome!r}")
        if mode == "user" or not probe.cpl0_emulated():
            assert written == 7, "the CPU itself runs this code: the host memory is missing, not a device"
        assert vcpu.run(TIMEOUT) == IoOut(0xF4, 1, b"\x5a")
        if access == "write":
            assert slot.map[0] == written


@pytest.mark.parametrize("mode", ["long", "user"])
def test_a_slot_that_the_host_may_only_read(mode):
    source = f"mov ebx, {HOLE}; mov al, [rbx]; out 0xf4, al; mov byte ptr [rbx], 7; hlt"
    with guest_with_protected_slot(source, mode, mmap.PROT_READ) as (vcpu, slot):
        assert vcpu.run(TIMEOUT) == IoOut(0xF4, 1, b"\x5a")
        try:
            exit = vcpu.run(TIMEOUT)
        except KvmError as error:
            assert (error.ioctl, error.errno) == ("KVM_RUN", errno.EFAULT)
        else:
            assert exit == MmioWrite(HOLE, b"\x07") or isinstance(exit, pykvm.MemoryFault)
        assert slot.map[0] == 0x5A


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts():
    system = System()
    ram = GuestMemory.of_size("64K")
    vm = system.create_vm()
    vm.add_memory(ram)
    ram.write(0x1000, asm("hlt", bits=16))
    vcpu = vm.create_vcpu()
    mode_named("real").apply(vcpu, ram, 0x1000)
    made = {"system": system, "vm": vm, "vcpu": vcpu, "ram": ram}
    yield made
    for part in ("vcpu", "vm", "ram", "system"):
        made[part].close()


@pytest.mark.parametrize(
    "order", ["system vm vcpu ram", "vcpu vm system ram", "vm vcpu ram system", "vm ram system vcpu", "vcpu system ram vm"]
)
def test_any_order_of_closing(order, parts):
    assert parts["vcpu"].run(TIMEOUT) == Hlt()
    fds = [parts[p].fd for p in ("system", "vm", "vcpu")]
    for part in order.split():
        parts[part].close()
        parts[part].close()  # and twice
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_vcpu_runs_on_without_dev_kvm_and_with_its_vm_fd_closed(parts):
    """The kernel keeps a VM while anything of it is open; /dev/kvm is not needed at all (System.close says so)."""
    parts["system"].close()
    os.close(parts["vm"].fd)
    parts["vm"].handle.fd = -1
    assert parts["vcpu"].run(TIMEOUT) == Hlt()


def test_a_vm_lives_on_after_its_system():
    with GuestMemory.of_size("64K") as ram, System() as system, system.create_vm() as vm:
        readonly = vm.check_extension("KVM_CAP_READONLY_MEM")
        system.close()
        vm.add_memory(ram)
        if readonly:
            vm.add_slot(ram.add(0x20000, 0x1000, readonly=True))
        ram.write(0x1000, asm("hlt", bits=16))
        vcpu = vm.create_vcpu()
        mode_named("real").apply(vcpu, ram, 0x1000)
        assert vcpu.run(TIMEOUT) == Hlt()


@pytest.mark.parametrize(
    ("part", "use"),
    [
        ("system", lambda system: system.check_extension("KVM_CAP_MAX_VCPUS")),
        ("system", System.get_vcpu_mmap_size),
        ("system", System.create_vm),
        ("system", System.get_supported_cpuid),
        ("system", System.get_msr_index_list),
        ("vm", VM.create_vcpu),
        ("vm", lambda vm: vm.add_slot(vm.memory.slots[0])),
        ("vm", lambda vm: vm.set_user_memory_region(0, 0, 0, 0, 0)),
        ("vm", lambda vm: vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", 1)),
        ("vcpu", VCPU.get_regs),
        ("vcpu", VCPU.get_sregs),
        ("vcpu", lambda vcpu: vcpu.translate(0)),
        ("vcpu", lambda vcpu: vcpu.get_msr(0x10)),
        ("vcpu", lambda vcpu: vcpu.run(TIMEOUT)),
        ("vcpu", VCPU.run),
    ],
)
def test_use_after_close_says_so(part, use, parts):
    parts[part].close()
    with pytest.raises(pykvm.PykvmError, match=r"closed|Bad file descriptor") as caught:
        use(parts[part])
    assert "another thread" not in str(caught.value)  # a hint that would send the reader the wrong way
    if isinstance(caught.value, KvmError):
        assert caught.value.errno == errno.EBADF
        assert str(caught.value).startswith("KVM_")


def test_kick_after_close_does_nothing(parts):
    parts["vcpu"].close()
    parts["vcpu"].kick()


def test_objects_that_are_dropped_close_themselves():
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    system = System()
    vm = system.create_vm()
    vcpu = vm.create_vcpu()
    assert len(os.listdir("/proc/self/fd")) == len(before) + 3
    del system, vm, vcpu
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_reprs(parts):
    system, vm, vcpu, ram = (parts[p] for p in ("system", "vm", "vcpu", "ram"))
    assert repr(system) == f"<System /dev/kvm fd {system.fd}>"
    assert repr(vm) == f"<VM fd {vm.fd}, 1 vCPU, memory <GuestMemory 64K in 1 slot>>"
    assert repr(vcpu) == f"<VCPU 0 fd {vcpu.fd} rip=0x1000 rsp=0x7c00 rflags=0x2>"
    assert repr(ram.slots[0]) == "<MemSlot 0: gpa 0x0-0xffff 64K anonymous>"
    assert repr(vcpu.get_regs()).startswith("<kvm_regs rax=0 ") and "rip=0x1000" in repr(vcpu.get_regs())
    assert "cs=<kvm_segment base=0 limit=0xffff selector=0 " in repr(vcpu.get_sregs())
    for part in (vcpu, vm, system):
        part.close()
        assert "closed" in repr(part)
        assert str(part.fd) not in repr(part)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_check_extension(system):
    assert system.check_extension("KVM_CAP_USER_MEMORY") == 1
    assert system.check_extension("KVM_CAP_NR_VCPUS") >= 1
    assert system.require("KVM_CAP_USER_MEMORY", "the test") == 1
    with system.create_vm() as vm:
        assert vm.check_extension("KVM_CAP_USER_MEMORY") == 1


def test_a_capability_that_the_host_lacks_is_named(system):
    absent = [cap for cap in dir(lib) if cap.startswith("KVM_CAP_") and not system.check_extension(cap)]
    if not absent:
        pytest.skip("this host has every capability that pykvm knows")
    with pytest.raises(pykvm.CapabilityError, match=f"the test needs {absent[0]}, ") as caught:
        system.require(absent[0], "the test")
    assert caught.value.cap == absent[0]


@pytest.mark.parametrize("where", ["system", "vm"])
def test_a_capability_that_does_not_exist_is_named(where, parts):
    with pytest.raises(pykvm.ConfigError, match=r"unknown capability.*KVM_CAP_SYNC_REG'"):
        parts[where].check_extension("KVM_CAP_SYNC_REG")


def contradictory(vcpu):
    sregs = vcpu.get_sregs()
    sregs.cr0 |= 1 << 31  # paging without protection
    vcpu.set_sregs(sregs)


@pytest.mark.parametrize(
    ("name", "number", "part", "use"),
    [
        ("KVM_CREATE_VCPU", errno.EEXIST, "vm", lambda vm: vm.create_vcpu(0)),
        ("KVM_CREATE_VCPU", errno.EINVAL, "vm", lambda vm: vm.create_vcpu(1 << 20)),
        ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL, "vm", lambda vm: vm.set_user_memory_region(1, 0, 0x20123, 0x1000, 0)),
        ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST, "vm", lambda vm: vm.set_user_memory_region(1, 0, 0xF000, 0x2000, 0x10000)),
        ("KVM_ENABLE_CAP", errno.EINVAL, "vm", lambda vm: vm.enable_cap("KVM_CAP_USER_MEMORY")),
        ("KVM_SET_SREGS", errno.EINVAL, "vcpu", contradictory),
        ("KVM_GET_MSRS", errno.EINVAL, "vcpu", lambda vcpu: vcpu.get_msr(0x12345678)),
    ],
)
def test_a_failing_ioctl_is_named(name, number, part, use, parts):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KvmError) as caught:
        use(parts[part])
    error = caught.value
    assert (error.ioctl, error.errno) == (name, number)
    assert isinstance(error, OSError) and isinstance(error, pykvm.PykvmError)
    assert str(error).startswith(f"{name}: {os.strerror(number)} (")  # and what was tried
    assert len(os.listdir("/proc/self/fd")) == before
    assert parts["vcpu"].run(TIMEOUT) == Hlt()  # nothing else has suffered


@pytest.mark.parametrize(("path", "why"), [("/nonexistent/kvm", "modprobe"), ("/dev/null", "is it a KVM device"), ("/", "directory")])
def test_a_path_that_is_not_kvm(path, why):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(pykvm.KvmUnavailableError, match=why) as caught:
        System(path)
    assert caught.value.path == path
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tick_after_the_last_exit_is_not_the_next_runs():
    with pykvm.Machine(pykvm.asm("1: hlt; jmp 1b", bits=64, org=0x100000), mode="long", memory="2M") as m:
        assert m.vcpu.run(timeout=1) == pykvm.Hlt()
        m.vcpu.begin(0.001, 1)
        time.sleep(0.01)  # the timer fires while no KVM_RUN is there to be interrupted
        lib.pykvm_end(m.vcpu.native)
        assert m.vcpu.run(timeout=1) == pykvm.Hlt()
        m.vcpu.kick()  # a kick, though, is for the next run
        assert m.vcpu.run(timeout=1) == pykvm.Intr(kicked=True)


def test_cpuid_that_was_read_can_be_given_again(system):
    """Older kernels leave the count of entries at the room there was."""
    with system.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
        table = vcpu.get_cpuid2()
        assert len(table) == len(system.get_supported_cpuid())
        vcpu.set_cpuid2(table)
