# coalesced: MMIO writes that wait in a ring inside KVM until the guest exits for another reason, and reach the device in order
#
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4. The writes to the coalesced page make no exit.
# See: api.rst 4.116 (KVM_REGISTER_COALESCED_MMIO).
# Exit code: 0; 1 the page could not be had; 2 not all writes arrived; 3 they arrived in another order; 4 a write exited.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=io\nmode=long\nmemory=2M\nhypercalls=yes\nneeds=cap:KVM_CAP_COALESCED_MMIO\nend=exit\nexit=0\n"
note_end

.set WHERE, 0xd0020000
.set TIMES, 20

    .code64
    .text
    .globl _start
_start:
    hypercall COALESCE, WHERE
    test eax, eax
    jnz refused
    mov ebx, WHERE
    xor ecx, ecx
1:  lea eax, [ecx * 2 + 1000]
    mov [rbx + 4 * rcx], eax
    inc ecx
    cmp ecx, TIMES
    jne 1b
    hypercall COALESCED, -1     # this exit brings them all
    cmp eax, TIMES
    jne missing
    xor ecx, ecx
1:  hypercall COALESCED, ecx
    lea esi, [ecx * 2 + 1000]
    cmp eax, esi
    jne disorder
    inc ecx
    cmp ecx, TIMES
    jne 1b
    hypercall EXITS, 6          # KVM_EXIT_MMIO
    test eax, eax
    jnz exited
    exit 0
refused:
    exit 1
missing:
    exit 2
disorder:
    exit 3
exited:
    exit 4
