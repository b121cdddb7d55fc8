# irqfd: interrupts that user space signals through an eventfd, edge-triggered, and level-triggered with resampling
#
# Whoever has the eventfd needs no KVM ioctl to interrupt the guest. A level-triggered GSI stays high until the guest's EOI, which
# signals another eventfd (resample): the device looks whether it still has something to say.
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4. IOAPIC and LAPIC are KVM's own.
# See: api.rst 4.75 (KVM_IRQFD); 82093AA datasheet section 3.2.4 (redirection entries); SDM vol. 3 section 11.8.5 (EOI).
# Exit code: 0; 1 the EOI was not told to the host. An interrupt that never comes leaves the guest halted, with interrupts on.

.include "guest.inc"
.include "host.inc"
.include "apic.inc"

note_begin
    .ascii "group=interrupts\nmode=long\nmemory=2M\nhypercalls=yes\nirqchip=kernel\n"
    .ascii "needs=cap:KVM_CAP_IRQFD,cap:KVM_CAP_IRQFD_RESAMPLE\nend=exit\nexit=0\n"
note_end

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
    apic_write APIC_SVR, APIC_ENABLE
    mov r13d, IOAPIC
    mov dword ptr [r13], 0x10 + 2 * 10
    mov dword ptr [r13 + 0x10], 0x41            # pin 10: vector 0x41, edge, unmasked, to LAPIC 0
    mov dword ptr [r13], 0x10 + 2 * 11
    mov dword ptr [r13 + 0x10], 0x42 | LEVEL    # pin 11
    sti

    hypercall IRQFD, 10
    halt_until came, 1          # the eventfd's way may take another thread of KVM's, which needs a CPU
    hypercall IRQFD, 11, 1
    halt_until came, 2
    hypercall RESAMPLED, 11
    cmp eax, 1
    jne no_resample
    exit 0
no_resample:
    exit 1

handler:
    inc dword ptr [rip + came]
    eoi
    iretq

define_idt 0x43

.lcomm came, 4                  # interrupts so far
