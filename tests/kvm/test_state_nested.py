"""States of guests that are hypervisors, saved between VMXON and VMXOFF and while their own guest, L2, runs; they go on elsewhere."""

import pytest

from pykvm import StateError
from pykvm.abi import ffi, lib
from pykvm.debug.reach import run_until
from tests.conftest import TIMEOUT
from tests.kvm.states import again, end, start, stop_at


def nested(state):
    """The flags of the nested state (KVM_GET_NESTED_STATE), or None."""
    data = state.vcpus[0]["nested"]
    return None if data is None else ffi.from_buffer("struct kvm_nested_state *", bytes.fromhex(data)).flags


def goes_on(machine, how):
    """The machine that is restored from this one is what this one was, and ends in that way."""
    state = machine.save()
    with again(machine) as restored:
        assert state.diff(restored.save()) == []
        assert end(restored) == how


@pytest.mark.parametrize("name", ["vmx_l2", "svm_l2"])
def test_l2_goes_on(name):
    """Saved at L2's own exit to user space."""
    with start(name) as machine:
        how = end(machine)
    assert how[:2] == ("exit", 0)
    with start(name) as machine:
        assert run_until(machine, "port=0xe0", TIMEOUT) == "until"
        assert nested(machine.save()) & lib.KVM_STATE_NESTED_GUEST_MODE
        goes_on(machine, how)
        with pytest.raises(StateError, match="nested virtualization"):
            machine.checkpoint()
        assert end(machine) == how  # it has been saved, no more


@pytest.mark.parametrize(
    ("name", "line"), [("vmxon", "VMXON"), ("vmxon", "VMWRITE"), ("vmxon", "VMXOFF"), ("vmx_l2", "18"), ("svm_l2", "072")]
)
def test_a_hypervisor_goes_on(name, line):
    """Saved amid a line that it prints: in VMX operation without and with a current VMCS, and out of it; between two exits of L2."""
    with start(name) as machine:
        how = end(machine)
    assert how[:2] == ("exit", 0)
    with start(name) as machine:
        l2 = line == "18"  # L2's OUT has been before
        assert stop_at(machine, how[2].index(line) + 1 + l2)
        flags = nested(machine.save())
        assert (flags is None) == (line in ("VMXOFF", "072"))  # with SVM, all that there is outside of L2 is in MSRs
        goes_on(machine, how)
