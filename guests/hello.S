# hello: the smallest guest in 64-bit mode: a greeting on COM1, then the debug exit
#
# Text given with --append is printed after the greeting: RSI points at it.
# Exits: IO out 0x3f8, one for each character; IO out 0xf4.
# See: SDM vol. 3 section 10.8.5 (what pykvm has set up before the first instruction).
# Exit code: 0.

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=long\nmemory=16M\nend=exit\nexit=0\nconsole=Hello from long mode.\n"
note_end

    .code64
    .text
    .globl _start
_start:
    mov rbx, rsi                # the command line
    lea rsi, [rip + greeting]
    call puts
    cmp byte ptr [rbx], 0
    je done
    mov rsi, rbx
    call puts
    mov al, '\n'
    out dx, al
done:
    exit 0

define_puts

greeting:
    .asciz "Hello from long mode.\n"
