"""Hypercalls through registers: arguments, the call, its result in two halves."""

from pykvm.devices.hypercall import LENGTH, HypercallPort


class Kernel:
    """What is called, and what it answers."""

    def __init__(self, answer=0):
        self.calls, self.answer = [], answer
        self.port = HypercallPort(self)

    def __call__(self, number, arguments):
        self.calls.append((number, arguments))
        return self.answer


def test_a_call():
    kernel = Kernel(0x1122334455667788)
    for i, value in enumerate((1, 0xFFFFFFFF, 3, 4)):
        kernel.port.write(4 * i, 4, value)
    assert kernel.calls == []
    kernel.port.write(16, 4, 12)
    assert kernel.calls == [(12, (1, 0xFFFFFFFF, 3, 4))]
    assert (kernel.port.read(16, 4), kernel.port.read(20, 4)) == (0x55667788, 0x11223344)
    assert kernel.port.read(16, 8) == 0x1122334455667788
    assert [kernel.port.read(4 * i, 4) for i in range(4)] == [1, 0xFFFFFFFF, 3, 4]


def test_a_negative_errno_has_64_bits():
    kernel = Kernel(-1000)
    kernel.port.write(16, 4, 0)
    assert kernel.port.read(16, 8) == (1 << 64) - 1000


def test_before_any_call():
    assert [Kernel().port.read(offset, 4) for offset in range(0, LENGTH, 4)] == [0] * 6


def test_arguments_stay_for_the_next_call():
    kernel = Kernel()
    kernel.port.write(0, 4, 7)
    kernel.port.write(16, 4, 1)
    kernel.port.write(4, 4, 8)
    kernel.port.write(16, 4, 2)
    assert kernel.calls == [(1, (7, 0, 0, 0)), (2, (7, 8, 0, 0))]


def test_other_writes_do_nothing():
    kernel = Kernel()
    for offset, size in [(16, 1), (16, 2), (16, 8), (17, 4), (20, 4), (1, 4), (0, 1), (0, 2), (0, 8)]:
        kernel.port.write(offset, size, 1)
    assert (kernel.calls, kernel.port.arguments, kernel.port.result) == ([], [0, 0, 0, 0], 0)


def test_parts_can_be_read():
    kernel = Kernel(0x8877665544332211)
    kernel.port.write(16, 4, 0)
    assert [kernel.port.read(16 + i, 1) for i in range(8)] == [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]
    assert kernel.port.read(18, 2) == 0x4433
    assert kernel.port.read(20, 8) == 0x88776655  # past the end there is nothing
