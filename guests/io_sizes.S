# io_sizes: IN and OUT of 1, 2 and 4 bytes, to a port in DX and to one in the instruction
#
# Exits: IO out and IO in, sizes 1, 2 and 4, on the scratch ports 0xe0 to 0xe7; IO out 0xf4.
# See: SDM vol. 2, IN and OUT.
# Exit code: 0, or the size that came back wrong.

.include "guest.inc"

note_begin
    .ascii "group=io\nmode=protected\nmemory=2M\nend=exit\nexit=0\n"
note_end

    .code32
    .text
    .globl _start
_start:
    mov dx, SCRATCH_PORT
    mov al, 0x11
    out dx, al
    xor eax, eax
    in al, SCRATCH_PORT
    cmp eax, 0x11
    jne wrong_1

    mov ax, 0x2233
    out SCRATCH_PORT + 2, ax
    xor eax, eax
    mov dx, SCRATCH_PORT + 2
    in ax, dx
    cmp eax, 0x2233
    jne wrong_2

    mov eax, 0x44556677
    mov dx, SCRATCH_PORT + 4
    out dx, eax
    xor eax, eax
    in eax, SCRATCH_PORT + 4
    cmp eax, 0x44556677
    jne wrong_4

    in al, SCRATCH_PORT + 6     # bytes of a wider write are little-endian
    cmp al, 0x55
    jne wrong_4
    exit 0
wrong_1:
    exit 1
wrong_2:
    exit 2
wrong_4:
    exit 4
