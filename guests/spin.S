# spin: a guest that never exits: only the time limit or Ctrl-C ends it
#
# Interrupts are on: Bochs' VT-x does not leave a guest for the host's interrupts while RFLAGS.IF is clear, real CPUs do.
# Exits: none. KVM_RUN comes back with EINTR when the host sends its thread a signal.
# See: api.rst 5, immediate_exit.

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=long\nmemory=2M\nend=timeout\n"
note_end

    .code64
    .text
    .globl _start
_start:
    sti
1:  jmp 1b
