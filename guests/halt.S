# halt: the shortest run: HLT with interrupts off ends it
#
# Exits: HLT.
# See: SDM vol. 2, HLT; api.rst 5, KVM_EXIT_HLT (without an in-kernel irqchip).

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=real\nmemory=64K\nend=halted\n"
note_end

    .code16
    .text
    .globl _start
_start:
    hlt
