# exec_hole: a jump to where there is no memory: KVM cannot fetch the instruction it would have to emulate
#
# Exits: INTERNAL_ERROR, suberror 1 (emulation failure).
# See: api.rst 5, KVM_EXIT_INTERNAL_ERROR.

.include "guest.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nend=crash\n"
note_end

    .code64
    .text
    .globl _start
_start:
    mov eax, 0xd0100000
    jmp rax
