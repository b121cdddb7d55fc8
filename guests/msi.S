# msi: message-signalled interrupts: a write of data to an address in 0xfee00000-0xfeefffff is the interrupt
#
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls: the guest asks its host for KVM_SIGNAL_MSI), IO out 0xf4. The LAPIC is KVM's own.
# See: api.rst 4.70 (KVM_SIGNAL_MSI); SDM vol. 3 section 11.11 (message address and data).
# Exit code: 0; 1 the interrupt did not come; 2 it came on the wrong vector.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=interrupts\nmode=long\nmemory=2M\nhypercalls=yes\nirqchip=kernel\nneeds=cap:KVM_CAP_SIGNAL_MSI\nend=exit\nexit=0\n"
note_end

.set LAPIC, 0xfee00000
.set SVR,   0xf0                # bit 8 enables it, bits 0-7 are the spurious vector
.set EOI,   0xb0

    .code64
    .text
    .globl _start
_start:
    gate 0x41, on_41
    gate 0x42, on_42
    lidt [rip + idtr]
    mov r12d, LAPIC
    mov dword ptr [r12 + SVR], 0x1ff
    xor ebx, ebx                # the vector that came
    sti

    mov r13d, 0x41
next:
    hypercall MSI, LAPIC, r13d  # physical destination 0, fixed delivery, edge
    mov ecx, 1000
2:  test ebx, ebx
    jnz 3f
    dec ecx
    jnz 2b
    exit 1
3:  cmp ebx, r13d
    jne wrong
    xor ebx, ebx
    inc r13d
    cmp r13d, 0x42
    je next
    exit 0
wrong:
    exit 2

on_41:
    mov ebx, 0x41
    mov dword ptr [r12 + EOI], 0
    iretq
on_42:
    mov ebx, 0x42
    mov dword ptr [r12 + EOI], 0
    iretq

define_idt 0x43
