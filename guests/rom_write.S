# rom_write: a read-only memslot: reads never exit, a write exits as MMIO and changes nothing
#
# Exits: MMIO write at 0xc0100000; IO out 0xf4.
# See: api.rst 4.35, KVM_MEM_READONLY.
# Exit code: 0, or 1 when the write went through.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=2M\nrom=0xc0100000:4K\nend=exit\nexit=0\n"
note_end

.set ROM, 0xc0100000

    .code64
    .text
    .globl _start
_start:
    mov ebx, ROM
    mov ecx, [rbx]
    mov edx, ecx
    not edx
    mov [rbx], edx
    cmp ecx, [rbx]
    jne written
    exit 0
written:
    exit 1
