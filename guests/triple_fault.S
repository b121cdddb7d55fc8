# triple_fault: #UD without an IDT: no handler for the fault, none for the double fault, and the CPU shuts down
#
# Exits: SHUTDOWN.
# See: SDM vol. 3 section 6.15, interrupt 8 (double fault) and its "shutdown mode".

.include "guest.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nend=crash\n"
note_end

    .code64
    .text
    .globl _start
_start:
    ud2
