# io_rep: REP OUTSB and REP INSW: strings through a port
#
# Exits: IO out 0xe9, one or more with a count (KVM decides how many elements an exit carries); IO in 0xe0; IO out 0xf4.
# See: SDM vol. 2, INS, OUTS, REP; api.rst 5, KVM_EXIT_IO (count).
# Exit code: 0, or 1 when INSW read wrong.

.include "guest.inc"

note_begin
    .ascii "group=io\nmode=protected\nmemory=2M\nend=exit\nexit=0\nconsole=one string, one instruction\n"
note_end

    .code32
    .text
    .globl _start
_start:
    cld
    mov esi, offset text
    mov ecx, offset text_end - text
    mov dx, DEBUG_CONSOLE
    rep outsb

    mov ax, 0xbeef
    mov dx, SCRATCH_PORT
    out dx, ax
    mov edi, offset buffer
    mov ecx, 100
    rep insw

    mov esi, offset buffer
    mov ecx, 100
1:  lodsw
    cmp ax, 0xbeef
    jne wrong
    dec ecx
    jnz 1b
    exit 0
wrong:
    exit 1

text:     .ascii "one string, one instruction\n"
text_end:

    .bss
buffer:   .skip 200
