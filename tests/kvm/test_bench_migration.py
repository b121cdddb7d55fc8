"""bench state's migrations: they are real ones, and what is printed of them is what was measured."""

import pytest

from pykvm.abi import lib
from pykvm.bench.migration import DIRTY_RATE, MigrationRow, bench_migration
from pykvm.memory import GuestMemory
from pykvm.state.migrate import DOWNTIME

pytestmark = pytest.mark.slow
SIZE = 16 << 20


@pytest.fixture(scope="module")
def row():
    return bench_migration(SIZE, 2)


def test_all_of_memory_moves(row):
    assert isinstance(row, MigrationRow)
    assert len(row.idle) == len(row.busy) == 2  # the round to warm up is not among them
    for report in row.idle:
        assert report["memory"] == SIZE
        assert report["pages"] - report["zeros"] >= (SIZE - (2 << 20)) // 4096  # no page above 2 MiB is zero
        assert report["bytes"] > SIZE - (2 << 20)
    for report in row.busy:
        assert 0 < report["wrote"] < 2 * DIRTY_RATE
        assert len(report["rounds"]) >= 1


def test_what_is_printed(row):
    text = str(row)
    assert "migration of 16M of memory" in text
    assert f"goal {DOWNTIME * 1e3:g} ms" in text
    answer = row.as_dict()
    assert answer["size"] == SIZE and answer["goal"] == DOWNTIME
    assert answer["ratio"]["low"] <= answer["ratio"]["median"] <= answer["ratio"]["high"]
    assert answer["migration"]["median"] > 0 and answer["downtime_busy"]["median"] > 0


def test_the_c_copy_copies(row):
    """It compares checksums at its far end, and says what is wrong when it cannot."""
    with GuestMemory.of_size("1M") as memory:
        memory.write(0, bytes(range(256)) * 4096)
        assert lib.pykvm_bench_copy(memory.slots[0].hva, 1 << 20, 3 << 10) > 0
        assert lib.pykvm_bench_copy(memory.slots[0].hva, (1 << 20) - 1, 256 << 10) > 0
        assert lib.pykvm_bench_copy(memory.slots[0].hva, 1 << 62, 256 << 10) < 0  # no room for that
