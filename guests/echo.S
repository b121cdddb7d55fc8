# echo: reads COM1 and writes back what comes, in upper case, until a line end or Ctrl-D (0x04)
#
# Try: echo hello | pykvm run echo
# Exits: IO in 0x3fd (line status, polled), IO in 0x3f8, IO out 0x3f8; IO out 0xf4.
# See: PC16550D datasheet, section 8.6.3 (line status register).
# Exit code: 0.

.include "guest.inc"

note_begin
    .ascii "group=io\nmode=protected\nmemory=2M\nend=exit\nexit=0\n"
note_end

    .code32
    .text
    .globl _start
_start:
    mov dx, COM1_LSR
    in al, dx
    test al, 1                  # data ready?
    jz _start
    mov dx, COM1
    in al, dx
    cmp al, 4
    je done
    cmp al, 'a'
    jb 1f
    cmp al, 'z'
    ja 1f
    sub al, 'a' - 'A'
1:  out dx, al
    cmp al, '\n'
    jne _start
done:
    exit 0
