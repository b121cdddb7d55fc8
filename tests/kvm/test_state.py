"""States saved and restored: every gallery guest at random exits, what the fields say, what is refused."""

import json

import pytest

from pykvm import ConfigError, GuestMemory, Machine, StateError, asm, gallery
from pykvm.state.compat import Host, check, demand
from pykvm.state.machinestate import MachineState
from tests.conftest import TIMEOUT
from tests.kvm.states import POLLING, TIMED, Doubler, a_state, add_devices, again, copy, end, start, stop_at

_ends = {}


def uninterrupted(name):
    """(exits, end) of a run from start to end; None for guests that never end."""
    if name not in _ends:
        with start(name) as machine:
            if machine.info.note["end"] == "timeout":
                return None
            how = end(machine)
            _ends[name] = sum(machine.exit_counts().values()), how
    return _ends[name]


def check_guest(name, point):
    """Save it at ``point`` of its run (0 to 1), restore it, and let it go on: it ends as one that was never stopped."""
    whole = uninterrupted(name)
    if whole is None:
        pytest.skip("it never ends")
    exits, how = whole
    if exits < 2:
        pytest.skip("it has no exit before its last")
    with start(name) as machine:
        fewer = min(5, exits - 2) if name in TIMED else 0  # another run may print a time of fewer digits, each of which is an exit
        if not stop_at(machine, 1 + int(point * (exits - 2 - fewer))):
            return  # with several vCPUs, the number of exits is not the same in each run
        state = machine.save()
        with Machine.restore(MachineState.from_json(state.to_json()), copy(machine.memory)) as restored:
            add_devices(restored, name)
            same = state.diff(restored.save())
            assert [d for d in same if not d.path.startswith("vm.pics")] == []  # the PIT goes on counting
            got = end(restored)
            # One that polls a timer may have stood at its last exit, whose power-off has gone with the stop: then the machine itself halts.
            assert got == how or (name in TIMED and got[:2] == how[:2]) or (name in POLLING and got == end(machine))


# One of each kind, for the emulated hosts, where all would take too long; the slow test below has all.
KINDS = """hello_real user_compute xsave_live checksum pic_pit ioapic_eoi lapic_timer kvmclock ipi smp_user echo io_rep mmio_straddle
    msr_user coalesced irq_window inject_exception ten_line_device fw_cfg vmx_l2 svm_l2"""


@pytest.mark.parametrize("name", KINDS.split())
def test_a_guest_goes_on(name):
    check_guest(name, 0.5)


@pytest.mark.parametrize(("name", "irqchip"), [("user_compute", "none"), ("pic_pit", "kernel"), ("ioapic_eoi", "split")])
def test_the_saved_machine_may_go_on(name, irqchip):
    if name not in gallery.names():
        pytest.skip(f"the gallery has no {name}")
    exits, how = uninterrupted(name)
    with start(name) as machine:
        assert machine.vm.irqchip == irqchip
        assert stop_at(machine, exits // 2)
        machine.save()
        machine.save()
        assert end(machine) == how


def test_states_are_data():
    with start("hello") as machine:
        assert stop_at(machine, 5)
        state = machine.save()
        with pytest.raises(AttributeError):
            state.vcpus = []
        assert state == MachineState.from_json(state.to_json())
        assert "hello" in repr(state)
        assert f"vcpus[0].regs.rip = {state.vcpus[0]['regs']['rip']:#x}" in str(state)
        assert stop_at(machine, 6)
        later = machine.save()
        paths = [d.path for d in state.diff(later)]
        assert "vcpus[0].regs.rax" in paths
        assert "console.data" in paths
        assert not [p for p in paths if "TSC" in p]
        assert "vcpus[0].msrs[IA32_TSC]" in [d.path for d in state.diff(later, running=True)]


def test_interrupts_that_wait_are_saved():
    with start("irq_window") as machine:
        assert stop_at(machine, 8)
        waiting = list(machine.runner.vectors)
        with again(machine) as restored:
            assert restored.runner.vectors == waiting
            assert bool(restored.vcpu.native.run.request_interrupt_window) == bool(waiting)


def test_cr8_without_a_lapic_survives():
    """KVM takes CR8 from kvm_run at each entry then."""
    with start("halt") as machine:
        sregs = machine.vcpu.get_sregs()
        sregs.cr8 = 7
        machine.vcpu.set_sregs(sregs)
        machine.vcpu.native.run.cr8 = 7
        with again(machine) as restored:
            assert restored.save().vcpus[0]["sregs"]["cr8"] == 7


PORTS_BY_BITMAP = """
        mov qword ptr [0x3004], 0x1f0000        # the TSS: RSP0, and where the I/O bitmap is, all zero
        mov word ptr [0x3066], 104
        mov byte ptr [0x103d], 0x89             # its descriptor is available, as LTR wants it
        mov ax, 0x38
        ltr ax
        mov rax, cr3                            # the 2 MiB at gva 0 are CPL3's too: PML4[0], PDPT[0], PD[0]
        mov ecx, 3
1:      or byte ptr [rax], 4
        mov rax, [rax]
        and rax, -4096
        loop 1b
        mov rax, cr3
        mov cr3, rax
        push 0x2b
        push 0x1ff000
        push 2                                  # RFLAGS: IOPL 0
        push 0x33
        lea rax, [rip + program]
        push rax
        iretq
program: out 0xe0, al
        out 0xe0, al
        mov al, 42
        out 0xf4, al
"""


@pytest.mark.parametrize("how", ["restore", "reset"])
def test_the_io_bitmap_of_a_guest_goes_on_counting(how):
    """CPL3 may use ports by its TSS alone, of which KVM does not tell all that the CPU has loaded on every host."""
    code = asm(PORTS_BY_BITMAP, bits=64, org=0x100000)
    with Machine(code, mode="long", memory="2M", entry=0x100000) as machine:
        if end(machine)[0] == "crash":
            pytest.skip("this host lets no I/O bitmap count")
    with Machine(code, mode="long", memory="2M", entry=0x100000) as machine:
        assert stop_at(machine, 1)
        if how == "reset":
            machine.checkpoint()
            assert end(machine)[:2] == ("exit", 42)
            machine.reset()
            assert end(machine)[:2] == ("exit", 42)
        else:
            with again(machine) as restored:
                assert machine.save().vcpus[0]["sregs"] == restored.save().vcpus[0]["sregs"]
                assert end(restored)[:2] == ("exit", 42)


def test_devices_that_are_added_later_get_their_state():
    with start("ten_line_device") as machine:
        assert stop_at(machine, 1)
        state = machine.save()
        with Machine.restore(state, copy(machine.memory)) as restored:
            assert ("pio", 0x200) in restored.waiting_devices
            assert state.diff(restored.save()) == []  # who saves it again keeps what waits
            doubler = Doubler()
            restored.add_device(doubler, port=0x200, length=4)
            assert doubler.number == 21
            assert restored.waiting_devices == {}


def test_a_running_machine_is_not_saved():
    from threading import Thread

    with start("spin") as machine:
        run = Thread(target=machine.run, kwargs={"timeout": TIMEOUT, "explain": False})
        run.start()
        try:
            while not machine.vcpu.native.tid:
                pass
            with pytest.raises(ConfigError, match="pause"):
                machine.save()
            machine.pause()
            paused = machine.save()
            with Machine.restore(paused, copy(machine.memory)) as restored:
                assert paused.diff(restored.save()) == []
            machine.resume()
        finally:
            machine.stop()
            run.join()


# --- hostile states ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved():
    return a_state()


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '{"version": 1}', '{"version": "x"}', '{"version": 99}'])
def test_what_is_no_state_is_refused(text):
    with pytest.raises(StateError):
        MachineState.from_json(text)


def test_memory_must_be_the_states(saved):
    tree, _ = saved
    with pytest.raises(StateError, match="slots"):
        Machine.restore(MachineState.from_json(json.dumps(tree)), GuestMemory.of_size("64K"))


# --- other hosts ------------------------------------------------------------------------------------------------------


def _elsewhere(system, **changes):
    values = Host.of(system).as_dict()
    return Host.from_dict(values | changes)


def test_a_host_can_run_its_own_states(system):
    for name in ("hello", "user_compute", "ipi"):
        with start(name) as machine:
            stop_at(machine, 3)
            assert check(machine.save(), Host.of(system))[0] == []


def test_what_a_host_lacks_is_named(system):
    with start("user_compute") as machine:
        stop_at(machine, 3)
        state = machine.save()
    vcpu = state.vcpus[0]
    avx512 = {**vcpu, "xcrs": [[0, 0xE7]]}
    problems, _ = check(state.replace(vcpus=[avx512]), _elsewhere(system, xcr0=7))
    assert "AVX-512 (XCR0 bits 5-7)" in [p.what for p in problems]
    problems, _ = check(state, _elsewhere(system, features=[f for f in Host.of(system).features if f not in ("cx16", "smap")]))
    found = {p.key: p for p in problems if p.kind == "feature"}
    assert "cx16" in found
    assert not found["cx16"].droppable  # an instruction that nothing has to switch on
    assert all(p.droppable for name, p in found.items() if name == "smap")  # CR4.SMAP is off
    khz = vcpu["tsc_khz"]
    if khz:
        slow = _elsewhere(system, tsc_khz=khz // 2, tsc_scales=False)
        assert [p.kind for p in check(state, slow)[0]] == ["tsc"]
        with pytest.raises(StateError, match="accept-tsc"):
            demand(state, slow)
        assert demand(state, slow, accept_tsc=True).problems == []
        assert check(state, _elsewhere(system, tsc_khz=khz // 2, tsc_scales=True))[0] == []
    wild = {**vcpu, "msrs": [*vcpu["msrs"], [0x12345678, 7]]}
    problems, _ = check(state.replace(vcpus=[wild]), Host.of(system))
    assert [p.what for p in problems] == ["MSR 0x12345678 = 0x7"]


def test_dropping_what_is_not_in_use(system):
    with start("hello") as machine:
        stop_at(machine, 3)
        state = machine.save()
        memory = copy(machine.memory)
    here = Host.of(system)
    gone = [f for f in ("smep", "smap", "pge", "erms") if f in here.features]
    lacking = _elsewhere(system, features=[f for f in here.features if f not in gone])
    verdict = demand(state, lacking, adapt=True)
    assert len(verdict.dropped) == len([p for p in check(state, lacking)[0] if p.droppable])
    assert check(verdict.state, lacking)[0] == []
    with Machine.restore(verdict.state, memory) as restored:
        assert end(restored)[0] == "exit"
