# inject_nmi: a non-maskable interrupt comes with interrupts off, and another one waits until the first one's IRET
#
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls: the guest asks its host for KVM_NMI), IO out 0xf4.
# See: api.rst 4.64 (KVM_NMI); SDM vol. 3 sections 6.7 and 6.7.1 (NMIs block NMIs).
# Exit code: 0; 1 no NMI came; 2 an NMI interrupted the NMI handler; 3 the second one was lost.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=interrupts\nmode=long\nmemory=2M\nhypercalls=yes\nneeds=cap:KVM_CAP_USER_NMI\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    gate 2, handler
    lidt [rip + idtr]
    xor ebx, ebx                # NMIs so far
    xor esi, esi                # in the handler

    hypercall NMI, 0
    call wait
    cmp ebx, 1
    jb none
    call wait
    cmp ebx, 2
    jne lost
    exit 0
none:
    exit 1
nested:
    exit 2
lost:
    exit 3

wait:
    mov ecx, 100
1:  dec ecx
    jnz 1b
    ret

handler:
    test esi, esi
    jnz nested
    inc esi
    inc ebx
    cmp ebx, 1
    jne 1f
    push rax
    push rdx
    push rcx
    hypercall NMI, 0            # blocked until IRET
    call wait
    pop rcx
    pop rdx
    pop rax
1:  dec esi
    iretq

define_idt
