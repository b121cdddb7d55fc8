"""Every gallery guest, with both run loops, ends as its note says."""

import pytest

from pykvm import GuestCrash, Machine, gallery
from pykvm.loaders import peek
from pykvm.needs import unmet
from pykvm.x86.paging import walk
from tests.conftest import TIMEOUT

SHORT = 0.05  # for guests that never end


class Doubler:
    """The README's device."""

    def __init__(self):
        self.number = 0

    def write(self, offset, size, value):
        self.number = value

    def read(self, offset, size):
        return 2 * self.number


def note_of(name):
    with open(gallery.find(name), "rb") as image:
        return peek(image.read(), name).note


def skip_unless_met(name, system):
    why = unmet(note_of(name), system)
    if why:
        pytest.skip(why)


def start(name, **options):
    machine = Machine(name, **options)
    if name == "ten_line_device":
        machine.add_device(Doubler(), port=0x200, length=4)
    if name == "echo":
        machine.uart.receive(b"Hello, 1 2 3\n")
    return machine


@pytest.mark.shadow
@pytest.mark.parametrize("name", gallery.names())
def test_guest(name, loop, system):
    skip_unless_met(name, system)
    with start(name, loop=loop) as machine:
        note = machine.info.note
        if note["end"] == "crash":
            with pytest.raises(GuestCrash):
                machine.run(TIMEOUT)
            return
        result = machine.run(SHORT if note["end"] == "timeout" else TIMEOUT)
        assert result.reason == note["end"]
        assert result.exit_code == {"exit": int(note.get("exit", 0)), "halted": 0, "power-off": 0, "timeout": None}[note["end"]]
        assert note.get("console", "") in result.console


def test_needs(system):
    assert unmet({}, system) is None
    assert unmet({"needs": "cap:KVM_CAP_USER_MEMORY, cap:KVM_CAP_NR_VCPUS"}, system) is None
    assert "KVM_CAP_S390_UCONTROL" in unmet({"needs": "cap:KVM_CAP_S390_UCONTROL"}, system)
    assert "KVM_CAP_NOTHING" in unmet({"needs": "cap:KVM_CAP_NOTHING"}, system)
    assert "does not know" in unmet({"needs": "flying"}, system)
    assert unmet({"needs": "vmx"}, system) or unmet({"needs": "svm"}, system)  # no CPU has both
    for name in ("avx", "avx2"):
        with Machine("xsave_live", system=system) as machine:
            assert ("YMM too" in machine.run(TIMEOUT).console) or unmet({"needs": name}, system)


def test_gallery_is_complete():
    wanted = """hello hello_real hello_prot user_compute io_sizes io_rep mmio_rw mmio_straddle rom_write halt spin triple_fault
    exec_hole page_fault cpuid echo ten_line_device far_modes exceptions ring3 demand_page walk_two_level smc xsave_live tsc
    string_copy vmxon vmx_l2 svm_l2"""
    assert set(wanted.split()) <= set(gallery.names())


def test_consoles():
    with start("echo") as machine:
        assert machine.run(TIMEOUT).console == "HELLO, 1 2 3\n"
    with start("user_compute") as machine:
        assert machine.run(TIMEOUT).console.startswith("x87 ok\nSSE2 ok\n")
    with start("cpuid") as machine:
        assert "KVMKVMKVM" in machine.run(TIMEOUT).console
    with Machine("hello", append="and a command line") as machine:
        assert machine.run(TIMEOUT).console == "Hello from long mode.\nand a command line\n"


def test_the_guests_walk_is_the_hosts():
    """What walk_two_level prints, against pykvm's own page walk (x86/paging.py) over the same tables."""
    accessed_dirty = 0x60  # set by the CPU, also after the guest has looked
    with start("walk_two_level") as machine:
        lines = machine.run(TIMEOUT).console.splitlines()
        sregs = machine.vcpu.get_sregs()
        starts = [n for n, line in enumerate(lines) if line.startswith("gva ")]
        assert len(starts) == 3
        for n in starts:
            walked = walk(machine.memory, int(lines[n].split()[1], 16), cr0=sregs.cr0, cr3=sregs.cr3, cr4=sregs.cr4, efer=sregs.efer)
            assert walked.entries
            for entry, line in zip(walked.entries, lines[n + 1 :], strict=False):
                name, index, value = line.replace("[", " ").replace("]", " ").split()[:3]
                assert (name, int(index, 16)) == (entry.level, entry.index)
                assert int(value, 16) | accessed_dirty == entry.value | accessed_dirty
            assert int(lines[n + len(walked.entries)].split()[-1], 16) == walked.gpa


def test_exits_are_those_of_the_header():
    with start("hello") as machine:
        assert machine.run(TIMEOUT).exits == {"IO": len("Hello from long mode.\n") + 1}
    with start("halt") as machine:
        assert machine.run(TIMEOUT).exits == {"HLT": 1}
    with start("mmio_straddle") as machine:
        assert machine.run(TIMEOUT).exits == {"MMIO": 4, "IO": 1}
        assert machine.bus.unclaimed == {("mmio", 0xD0001000, 4, True): 1, ("mmio", 0xD0001000, 4, False): 1}


@pytest.mark.parametrize("name", ["exceptions", "ring3", "demand_page", "page_fault", "vmxon", "vmx_l2", "svm_l2"])
def test_what_stays_inside_makes_no_exits(name, system):
    """Exceptions, and all of nested virtualization: user space sees the characters, the debug exit, and an OUT that an L2 makes."""
    skip_unless_met(name, system)
    with start(name) as machine:
        result = machine.run(TIMEOUT)
        assert result.exits == {"IO": len(result.console) + 1 + name.endswith("_l2")}


@pytest.mark.parametrize("name", ["io_sizes", "io_rep", "mmio_rw", "echo", "rom_write", "far_modes", "xsave_live", "string_copy"])
def test_loops_give_the_same_records(name):
    def records(loop):
        with start(name, loop=loop, stats=True) as machine:
            taken = []
            machine.runner.on_records = lambda ring: taken.extend(
                (r.reason, r.qualifier, r.value, r.size, r.count, r.is_write, r.rip) for r in ring.drain()
            )
            result = machine.run(TIMEOUT)
            return taken, result.exits, result.console, result.reason

    assert records("python") == records("native")
