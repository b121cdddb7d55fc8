"""States by hypothesis: any guest saved at any exit, any field changed to anything, any writes before a reset."""

import json
from functools import cache

import pytest

from pykvm import Machine, StateError, gallery
from pykvm.state.machinestate import MachineState
from pykvm.units import PAGE_SIZE
from tests.conftest import TIMEOUT
from tests.kvm.states import a_state, copy
from tests.kvm.test_fork_reset import COUNTS, same
from tests.kvm.test_state import check_guest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

STATE = cache(a_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", gallery.names())
def test_a_guest_goes_on_from_anywhere(name):
    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(st.floats(0, 1))
    @example(0.0)
    @example(1.0)
    def anywhere(point):
        check_guest(name, point)

    anywhere()


def _leaves(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*path, i))
    else:
        yield path


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_any_field_may_be_anything(data):
    """A state with a wild field is refused with its name, or restored: no other exception, no crash."""
    tree, memory = STATE()
    tree = json.loads(json.dumps(tree))
    path = data.draw(st.sampled_from(list(_leaves(tree))))
    value = data.draw(
        st.one_of(
            st.integers(-(1 << 65), 1 << 65), st.none(), st.text(max_size=8), st.just([]), st.just({}), st.booleans(), st.just("ff" * 5000)
        )
    )
    at = tree
    for key in path[:-1]:
        at = at[key]
    if data.draw(st.booleans()):
        at[path[-1]] = value
    else:
        del at[path[-1]]
    try:
        Machine.restore(MachineState.from_json(json.dumps(tree)), copy(memory)).close()
    except StateError as error:
        assert str(error)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0x200, 0x3FE), st.integers(0, 0xFFFFFFFF)), max_size=20), st.integers(0, 3))
def test_whatever_is_written(writes, runs):
    with Machine(COUNTS, mode="user", memory="4M") as machine:
        machine.run(TIMEOUT)
        machine.checkpoint()
        state, memory = machine.save(), copy(machine.memory)
        for page, value in writes:
            machine.memory.write_u32(page * PAGE_SIZE + value % 1000 * 4, value)
        for _ in range(runs):
            machine.run(TIMEOUT)
        machine.reset()
        same(machine, state, memory)
