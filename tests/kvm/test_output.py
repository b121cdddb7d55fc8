"""A guest's output on its way to ``on_output``, which may fail: each byte is kept once and passed on once, whichever loop runs."""

import pytest

from pykvm import Machine, asm

TEXT = "first\nsecond\n"


def printer(port):
    source = f"mov dx, {port}; mov si, offset text; mov cx, {len(TEXT)}; cld; 1: lodsb; out dx, al; loop 1b; hlt; text: .ascii {TEXT!r}"
    return asm(source.replace("'", '"'), bits=16, org=0x7C00)


class Taker:
    """Takes output and raises at the chosen calls, after it has taken what it got."""

    def __init__(self, *at, failure=OSError):
        self.pieces, self.at, self.failure = [], at, failure

    def __call__(self, data):
        self.pieces.append(bytes(data))
        if len(self.pieces) in self.at:
            raise self.failure("nobody reads this")


@pytest.mark.parametrize("port", [0xE9, 0x3F8])
@pytest.mark.parametrize("at", [(1,), (1, 2), range(1, 100)])
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_output_that_raises(loop, port, at, failure):
    """The caller hears of each failure once, and the guest goes on behind what it printed."""
    taker = Taker(*at, failure=failure)
    with Machine(printer(port), mode="real", memory="64K", loop=loop, on_output=taker) as machine:
        failures = 0
        while True:
            try:
                result = machine.run(timeout=20)
                break
            except failure:
                failures += 1
        assert (result.reason, result.console) == ("halted", TEXT)
        assert b"".join(taker.pieces).decode() == TEXT
        assert failures == sum(n in at for n in range(1, len(taker.pieces) + 1)) > 0
