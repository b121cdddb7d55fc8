# irqfd: interrupts that user space signals through an eventfd, edge-triggered, and level-triggered with resampling
#
# Whoever has the eventfd needs no KVM ioctl to interrupt the guest. A level-triggered GSI stays high until the guest's EOI, which
# signals another eventfd (resample): the device looks whether it still has something to say.
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4. IOAPIC and LAPIC are KVM's own.
# See: api.rst 4.75 (KVM_IRQFD); 82093AA datasheet section 3.2.4 (redirection entries); SDM vol. 3 section 11.8.5 (EOI).
# Exit code: 0; 1 the edge did not come; 2 the level did not come; 3 the EOI was not told to the host.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=interrupts\nmode=long\nmemory=2M\nhypercalls=yes\nirqchip=kernel\n"
    .ascii "needs=cap:KVM_CAP_IRQFD,cap:KVM_CAP_IRQFD_RESAMPLE\nend=exit\nexit=0\n"
note_end

.set LAPIC,  0xfee00000
.set SVR,    0xf0
.set EOI,    0xb0
.set IOAPIC, 0xfec00000         # index at 0, window at 0x10
.set LEVEL,  1 << 15

    .code64
    .text
    .globl _start
_start:
    gate 0x41, handler
    gate 0x42, handler
    lidt [rip + idtr]
    mov al, 0xff                # the GSIs lead to the PICs too, which nobody has set up: mask all
    out 0x21, al
    out 0xa1, al
    mov r12d, LAPIC
    mov dword ptr [r12 + SVR], 0x1ff
    mov r13d, IOAPIC
    mov dword ptr [r13], 0x10 + 2 * 10
    mov dword ptr [r13 + 0x10], 0x41            # pin 10: vector 0x41, edge, unmasked, to LAPIC 0
    mov dword ptr [r13], 0x10 + 2 * 11
    mov dword ptr [r13 + 0x10], 0x42 | LEVEL    # pin 11
    xor ebx, ebx                # interrupts so far
    sti

    hypercall IRQFD, 10
    mov r14d, 1
    call await
    jne no_edge
    hypercall IRQFD, 11, 1
    mov r14d, 2
    call await
    jne no_level
    hypercall RESAMPLED, 11
    cmp eax, 1
    jne no_resample
    exit 0
no_edge:
    exit 1
no_level:
    exit 2
no_resample:
    exit 3

await:                          # up to a while for EBX to become R14D; the eventfd's way may take KVM another thread
    mov ecx, 100000
1:  cmp ebx, r14d
    je 2f
    dec ecx
    jnz 1b
    cmp ebx, r14d
2:  ret

handler:
    inc ebx
    mov dword ptr [r12 + EOI], 0
    iretq

define_idt 0x43
