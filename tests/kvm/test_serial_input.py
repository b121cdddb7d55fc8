"""Input for a guest that sleeps until the UART interrupts it, brought in by the heartbeat."""

import pytest

from pykvm import Machine, asm

# IRQ 4 through the PIC; the handler takes one byte an interrupt, and the main program only halts.
GUEST = """
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7000
        mov word ptr [0x24 * 4], offset handler
        mov word ptr [0x24 * 4 + 2], ax
        mov al, 0x11            # ICW1 to ICW4: vectors from 0x20
        out 0x20, al
        mov al, 0x20
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov al, 0xef            # all but IRQ 4 masked
        out 0x21, al
        mov dx, 0x3fc
        mov al, 8               # MCR.OUT2
        out dx, al
        mov dx, 0x3f9
        mov al, 1               # IER.RX
        out dx, al
        sti
1:      hlt
        jmp 1b
handler:
        mov dx, 0x3f8
        in al, dx
        out 0xe9, al
        cmp al, 10
        je done
        mov al, 0x20            # EOI
        out 0x20, al
        iret
done:   xor al, al
        out 0xf4, al
"""


@pytest.mark.parametrize("pieces", [[b"hello\n"], [b"", b"h", b"", b"ello", b"", b"\n"]])
def test_input_wakes_a_guest_that_waits(loop, pieces):
    waiting = list(pieces)
    poll = lambda: waiting.pop(0) if waiting else b""  # noqa: E731
    image = asm(GUEST, bits=16, org=0x7C00)
    with Machine(image, mode="real", memory="64K", irqchip="kernel", loop=loop, poll_input=poll) as machine:
        machine.runner.on_heartbeat = machine.uart.tick
        result = machine.run(timeout=20)
        assert (result.reason, result.exit_code, result.console) == ("exit", 0, "hello\n")
