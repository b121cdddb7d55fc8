# hello_prot: a greeting from flat 32-bit protected mode, without paging
#
# Exits: IO out 0x3f8, one for each character; IO out 0xf4.
# See: SDM vol. 3 section 3.2.1 (the flat model).
# Exit code: 0.

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=protected\nmemory=2M\nend=exit\nexit=0\nconsole=Hello from protected mode.\n"
note_end

    .code32
    .text
    .globl _start
_start:
    mov esi, offset greeting
    call puts
    exit 0

define_puts

greeting:
    .asciz "Hello from protected mode.\n"
