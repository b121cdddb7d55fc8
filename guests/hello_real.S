# hello_real: a greeting from 16-bit real mode, as a boot sector would print it
#
# Hosts without unrestricted guest emulate every instruction of it.
# Exits: IO out 0x3f8, one for each character; IO out 0xf4.
# See: SDM vol. 3 chapter 21 (8086 emulation).
# Exit code: 0.

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=real\nmemory=1M\nend=exit\nexit=0\nconsole=Hello from real mode.\n"
note_end

    .code16
    .text
    .globl _start
_start:
    mov si, offset greeting
    call puts
    exit 0

define_puts

greeting:
    .asciz "Hello from real mode.\n"
