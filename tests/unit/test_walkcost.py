"""The computed memory references of a TLB miss, against the published numbers and against counting them one by one."""

import pytest

from pykvm.bench.walkcost import PAGE_SIZES, native, nested, shadow, table
from pykvm.errors import ConfigError

K4, M2, G1 = PAGE_SIZES


def counted(guest_levels, host_levels):
    """A two-dimensional walk, step by step: each guest entry's address is translated, then the entry is read; then the data's address."""
    references = 0
    for _ in range(guest_levels):
        references += host_levels  # where is this entry?
        references += 1  # the entry itself
    return references + host_levels  # where is the data?


def test_published_numbers():
    assert nested(K4, K4) == 24  # Bhargava et al. 2008; APM vol. 2 section 15.25
    assert nested(M2, M2) == 15
    assert nested(G1, G1) == 8
    assert nested(K4, K4, 5, 5) == 35
    assert [native(page) for page in PAGE_SIZES] == [4, 3, 2]
    assert native(K4, 5) == 5


@pytest.mark.parametrize("guest", PAGE_SIZES)
@pytest.mark.parametrize("host", PAGE_SIZES)
@pytest.mark.parametrize("levels", [(4, 4), (4, 5), (5, 4), (5, 5)])
def test_nested_is_what_counting_gives(guest, host, levels):
    g, h = levels
    assert nested(guest, host, g, h) == counted(native(guest, g), native(host, h))


def test_shadow_tables_have_the_smaller_page():
    assert shadow(M2, K4) == shadow(K4, M2) == 4
    assert shadow(M2, M2) == shadow(G1, M2) == 3
    assert shadow(G1, G1) == 2


def test_table_has_every_pair_once():
    rows = table(4, 5)
    assert len({(row["guest_page"], row["host_page"]) for row in rows}) == len(rows) == 9
    assert all(row["native"] <= row["shadow"] < row["nested"] for row in rows)
    assert all(row["tlb_entry"] == min(row["guest_page"], row["host_page"]) for row in rows)
    assert rows[0]["nested"] == 29


@pytest.mark.parametrize("wrong", [lambda: native(8192), lambda: nested(K4, 0), lambda: native(K4, 3), lambda: shadow(K4, K4, 6)])
def test_what_cannot_be(wrong):
    with pytest.raises(ConfigError):
        wrong()
