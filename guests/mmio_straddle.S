# mmio_straddle: one 8-byte access, half of it on a device's last bytes, half beyond: KVM makes two exits of it
#
# Exits: MMIO write and MMIO read, 4 bytes each, at 0xd0000ffc (claimed) and 0xd0001000 (nobody's); IO out 0xf4.
# See: api.rst 5, KVM_EXIT_MMIO (len is at most 8, and an access is split at a page).
# Exit code: 0, 1 low or 2 high half wrong.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=2M\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    mov ebx, SCRATCH_MMIO + 0xffc
    movabs rax, 0x1122334455667788
    mov [rbx], rax
    mov rcx, [rbx]
    cmp ecx, 0x55667788         # the device has kept its half
    jne wrong_low
    shr rcx, 32
    cmp ecx, 0xffffffff         # where nobody is, reads give all ones
    jne wrong_high
    exit 0
wrong_low:
    exit 1
wrong_high:
    exit 2
