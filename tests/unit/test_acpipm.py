"""ACPI's PM registers without KVM: timer, events, power-off."""

import pytest

from pykvm.devices.acpipm import AcpiPm
from pykvm.errors import StateError


class World:
    def __init__(self):
        self.ns, self.level, self.stopped, self.woken = 0, 0, [], 0
        self.pm = AcpiPm(lambda reason, code: self.stopped.append((reason, code)), self.set_level, lambda: self.ns, self.wake)

    def wake(self):
        self.woken += 1

    def set_level(self, level):
        assert level != self.level
        self.level = level


@pytest.fixture
def world():
    return World()


def test_the_timer_counts_at_its_rate_in_24_bits(world):
    assert world.pm.read(8, 4) == 0
    world.ns = 1_000_000_000
    assert world.pm.read(8, 4) == 3579545
    world.ns = 10_000_000_000
    assert world.pm.read(8, 4) == 35795450 % (1 << 24)
    assert world.pm.read(8, 2) == 35795450 % (1 << 16)
    assert world.pm.read(10, 1) == 35795450 >> 16 & 0xFF
    assert world.pm.read(11, 1) == 0


def test_the_timer_never_goes_back(world):
    world.ns = -5
    assert world.pm.read(8, 4) == 0


def test_the_timers_top_bit_makes_the_sci(world):
    world.pm.write(2, 2, 1)
    world.pm.tick()
    assert world.level == 0
    world.ns = 2_400_000_000  # bit 23 changes after 2.343 s
    world.pm.tick()
    assert world.level == 1 and world.pm.read(0, 2) == 1
    world.pm.write(0, 2, 0)
    assert world.level == 1  # zeros clear nothing
    world.pm.write(0, 2, 1)
    assert world.level == 0 and world.pm.read(0, 2) == 0
    world.ns = 4_700_000_000  # and back, after 4.687 s
    assert world.pm.read(0, 4) == 1 << 16 | 1


def test_the_power_button(world):
    world.pm.press_power_button()
    assert world.level == 0 and world.pm.read(1, 1) == 1
    world.pm.write(3, 1, 1)
    assert world.level == 1
    world.pm.write(1, 1, 1)
    assert world.level == 0


def test_sci_is_always_enabled(world):
    assert world.pm.read(4, 2) == 1
    world.pm.write(4, 2, 0)
    assert world.pm.read(4, 2) == 1


@pytest.mark.parametrize(("offset", "size", "value"), [(4, 2, 0x2000), (4, 2, 0x2001), (5, 1, 0x20), (4, 4, 0x2000)])
def test_sleep_type_0_is_power_off(world, offset, size, value):
    world.pm.write(offset, size, value)
    assert world.stopped == [("power-off", None)]


@pytest.mark.parametrize("value", [0x0000, 0x1C00, 0x2800, 0x3C00, 0x0400])
def test_other_sleep_types_are_not(world, value):
    world.pm.write(4, 2, value)
    assert world.stopped == []
    assert world.pm.read(4, 2) == value & 0x1C00 | 1


def test_sleep_type_1_suspends_and_the_alarm_wakes(world):
    world.pm.alarm()
    assert world.pm.read(0, 2) == 0  # awake, nobody is told
    world.pm.write(2, 2, 0x400)
    world.pm.write(4, 2, 0x2400)
    assert world.stopped == [("sleep", None)] and not world.pm.asleep
    world.pm.fall_asleep()
    world.pm.alarm()
    assert world.woken == 1 and not world.pm.asleep
    assert [world.pm.read(offset, 2) for offset in (0, 2, 4)] == [0x8400, 0, 1]
    world.pm.write(0, 2, 0x8400)
    assert world.pm.read(0, 2) == 0


def test_what_wakes_and_what_does_not(world):
    world.pm.fall_asleep()
    world.pm.alarm()  # it is not enabled
    world.ns = 2_400_000_000
    world.pm.tick()
    assert world.pm.asleep and not world.woken
    saved = world.pm.save()
    world.pm.press_power_button()
    assert world.woken == 1 and world.pm.read(0, 2) == 0x8100
    other = World()
    other.pm.load(saved)
    assert other.pm.asleep
    other.pm.load({name: value for name, value in saved.items() if name != "asleep"} | {"version": 1})  # from before there was S3
    assert not other.pm.asleep
    with pytest.raises(StateError, match="asleep"):
        other.pm.load(saved | {"asleep": 7})
