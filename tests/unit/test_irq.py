"""Lines, MSI messages, routes and eventfds: what needs no KVM."""

import pytest

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError
from pykvm.irq import EventFd, IrqLine, Route, default_routes, msi_message


def test_a_line_remembers_its_level():
    driven = []
    line = IrqLine(5, driven.append)
    assert (line.level, repr(line)) == (0, "<IrqLine GSI 5 low>")
    line.set(7)
    assert (line.level, driven, repr(line)) == (1, [1], "<IrqLine GSI 5 high>")
    line.set(1)  # KVM may be told twice
    line.set(0)
    line.pulse()
    assert (line.level, driven) == (0, [1, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0x30,), {}, (0xFEE00000, 0x30)),
        ((0xFF, 0xFF), {}, (0xFEEFF000, 0xFF)),
        ((0x40, 1), {"level": True}, (0xFEE01000, 0xC040)),
        ((0x41, 2), {"logical": True}, (0xFEE02004, 0x41)),
        ((0, 3), {"nmi": True}, (0xFEE03000, 0x400)),
    ],
)
def test_msi_message(arguments, options, message):
    """SDM vol. 3, "Message Address Register Format" and "Message Data Register Format"."""
    assert msi_message(*arguments, **options) == message


@pytest.mark.parametrize("arguments", [(-1,), (256,), (0x30, -1), (0x30, 256)])
def test_msi_message_refuses(arguments):
    with pytest.raises(ConfigError, match="8 bits"):
        msi_message(*arguments)


def filled(route):
    entry = ffi.new("struct kvm_irq_routing_entry *")
    route.fill(entry)
    return entry


def test_a_route_to_an_msi():
    entry = filled(Route.to_msi(30, 0x1_FEE0_1004, 0xC031))
    assert (entry.gsi, entry.type) == (30, lib.KVM_IRQ_ROUTING_MSI)
    assert (entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data) == (0xFEE01004, 1, 0xC031)


@pytest.mark.parametrize(("chip", "number"), [("pic-master", 0), ("pic-slave", 1), ("ioapic", 2)])
def test_a_route_to_a_chip(chip, number):
    entry = filled(Route.to_chip(9, chip, 1))
    assert (entry.gsi, entry.type) == (9, lib.KVM_IRQ_ROUTING_IRQCHIP)
    assert (entry.u.irqchip.irqchip, entry.u.irqchip.pin) == (number, 1)


def test_a_chip_that_is_not_there():
    with pytest.raises(ConfigError, match="unknown irqchip 'pic': use one of"):
        Route.to_chip(9, "pic", 1)


def test_default_routes():
    """GSI n reaches IOAPIC pin n, and below 16 a PIC's pin too."""
    got = {(route.gsi, route.chip, route.pin) for route in default_routes()}
    pic = {(n, n // 8, n % 8) for n in range(16)}
    assert got == pic | {(n, 2, n) for n in range(24)}
    assert len(default_routes()) == 40


def test_routes_say_where_they_lead():
    assert repr(Route.to_msi(3, *msi_message(0x31, 2))) == "<Route GSI 3: MSI 0x31 to 0xfee02000>"
    assert repr(Route.to_chip(3, "ioapic", 4)) == "<Route GSI 3: chip 2 pin 4>"


def test_eventfd():
    with EventFd() as event:
        assert event.take() == 0
        event.signal()
        event.signal(5)
        assert (event.take(), event.take()) == (6, 0)
        assert event.wait(0.001) == 0
        event.signal()
        assert event.wait() == 1
    assert (event.fd, repr(event)) == (-1, "<EventFd closed>")
    event.close()
