# two_vms: a guest that shares its thread with others: it prints its command line's first letter again and again, computing in between
#
# Two machines with this image, run in turn for some milliseconds each (pykvm.take_turns), finish both: a VM is only a file descriptor and
# its state, and time-slicing is nothing more than calling KVM_RUN on another one. Alone, it prints dots.
# Exits: IO out 0x3f8, IO out 0xf4, and EINTR at the end of each slice.
# See: api.rst 4.10 (KVM_RUN, EINTR), 5 (immediate_exit).
# Exit code: 0.

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=long\nmemory=2M\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    mov bl, [rsi]               # the command line
    test bl, bl
    jnz 1f
    mov bl, '.'
1:  sti                         # the time slice's end must reach every host
    mov r12d, 20
2:  mov al, bl
    mov dx, COM1
    out dx, al
    mov ecx, 2000
3:  dec ecx
    jnz 3b
    dec r12d
    jnz 2b
    mov al, '\n'
    out dx, al
    exit 0
