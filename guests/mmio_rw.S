# mmio_rw: writes and reads of 1, 2, 4 and 8 bytes to memory that is not there
#
# Exits: MMIO write and MMIO read, each size, at 0xd0000000 (the scratch page); IO out 0xf4.
# See: api.rst 5, KVM_EXIT_MMIO; SDM vol. 3 section 29.3.3 (EPT violations).
# Exit code: 0, or the size that came back wrong.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=2M\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    mov ebx, SCRATCH_MMIO
    mov byte ptr [rbx], 0x11
    movzx eax, byte ptr [rbx]
    cmp eax, 0x11
    jne wrong_1

    mov word ptr [rbx + 2], 0x2233
    movzx eax, word ptr [rbx + 2]
    cmp eax, 0x2233
    jne wrong_2

    mov dword ptr [rbx + 4], 0x44556677
    mov eax, [rbx + 4]
    cmp eax, 0x44556677
    jne wrong_4

    movabs rax, 0x8899aabbccddeeff
    mov [rbx + 8], rax
    mov rcx, [rbx + 8]
    cmp rax, rcx
    jne wrong_8

    mov eax, [rbx + 6]          # across two of the writes above
    cmp eax, 0xeeff4455
    jne wrong_8
    exit 0
wrong_1:
    exit 1
wrong_2:
    exit 2
wrong_4:
    exit 4
wrong_8:
    exit 8
