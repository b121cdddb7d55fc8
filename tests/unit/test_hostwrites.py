"""What the host writes into guest memory is noted, whichever way it is written."""

import gc

import pytest

from pykvm import GuestMemory
from pykvm.units import PAGE_SIZE


@pytest.fixture
def memory():
    with GuestMemory.of_size("64K") as memory:
        yield memory


def taken(log, memory):
    return [list(log.take(slot)) for slot in memory.slots]


def test_writes_and_clears_are_noted_once(memory):
    memory.write(0x1000, b"before the log")
    log = memory.log_writes()
    assert taken(log, memory) == [[]]
    memory.write(0x2FFE, b"over an edge")
    memory.write_u64(0x8000, 1)
    memory.clear(0xA000, 2 * PAGE_SIZE)
    memory.write(0x5000, b"")
    assert taken(log, memory) == [[2, 3, 8, 10, 11]]
    assert taken(log, memory) == [[]]
    memory.mark_written(0xFFFF, 1)
    memory.stop_log()
    memory.write(0, b"after the log")
    assert taken(log, memory) == [[15]]


def test_a_write_over_two_slots(memory):
    memory.add(0x10000, 0x2000)
    log = memory.log_writes()
    memory.write(0xFFFF, b"ab")
    assert taken(log, memory) == [[15], [0]]


def test_a_view_counts_as_written_while_it_lives_and_once_more(memory):
    old = memory.view(0x1000, 16)
    log = memory.log_writes()
    part = memory.view(0x4000, (2, PAGE_SIZE // 4), "u4")[1, 8:].reshape(-1, 4).T  # views of a view, of a view
    memory.mark_views()
    assert taken(log, memory) == [[1, 4, 5]]
    memory.mark_views()
    assert taken(log, memory) == [[1, 4, 5]]
    part[0, 0] = 7
    del part
    gc.collect()
    assert taken(log, memory) == [[4, 5]]
    memory.mark_views()
    assert taken(log, memory) == [[1]]
    assert old.sum() == 0


def test_a_view_of_a_readonly_file_writes_nothing(tmp_path):
    (tmp_path / "rom").write_bytes(bytes(PAGE_SIZE))
    with GuestMemory() as memory:
        memory.add(0, PAGE_SIZE, tmp_path / "rom", readonly=True)
        log = memory.log_writes()
        view = memory.view(0, 16)
        memory.mark_views()
        assert taken(log, memory) == [[]]
        del view


def test_views_are_forgotten_when_they_go(memory):
    for _ in range(100):
        memory.view(0, 64)[3:]
    assert not memory._views


def test_a_slot_that_came_later_is_not_in_the_log(memory):
    log = memory.log_writes()
    slot = memory.add(0x100000, PAGE_SIZE)
    memory.write(0x100000, b"x")
    assert log.take(slot) is None
