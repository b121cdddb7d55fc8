# ioeventfd: a doorbell: writes that signal an eventfd inside KVM and never reach user space, unless the value is another one
#
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0x600 once, for the value that does not match, IO out 0xf4.
# See: api.rst 4.59 (KVM_IOEVENTFD, datamatch).
# Exit code: 0; 1 the doorbell could not be had; 2 it rang another number of times; 3 another number of writes exited.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=io\nmode=long\nmemory=2M\nhypercalls=yes\nneeds=cap:KVM_CAP_IOEVENTFD\nend=exit\nexit=0\n"
note_end

.set BELL,  0x600
.set MATCH, 7
.set TIMES, 100

    .code64
    .text
    .globl _start
_start:
    hypercall DOORBELL, BELL, 2, MATCH
    test eax, eax
    jnz refused
    mov dx, BELL
    mov eax, MATCH
    mov ecx, TIMES
1:  out dx, ax                  # no exit to user space
    dec ecx
    jnz 1b
    mov eax, MATCH + 1
    out dx, ax                  # one exit
    hypercall RUNG
    cmp eax, TIMES
    jne wrong_count
    mov dx, HYPERCALL_PORT + 20
    in eax, dx
    cmp eax, 1
    jne wrong_exits
    exit 0
refused:
    exit 1
wrong_count:
    exit 2
wrong_exits:
    exit 3
