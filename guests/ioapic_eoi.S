# ioapic_eoi: with a split irqchip the IOAPIC is user space's, and ending a level-triggered interrupt exits
#
# The guest raises line 9 and does not serve it at first: after its EOI the line is still high, so the interrupt comes again. (A KVM that
# emulates CPL0 code was seen to end a level-triggered interrupt by itself, when it is taken: it is left out.)
# Exits: MMIO at 0xfec00000 (the IOAPIC in user space), IOAPIC_EOI once for each EOI, IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4.
# See: api.rst 7.5 (KVM_CAP_SPLIT_IRQCHIP), 5 (KVM_EXIT_IOAPIC_EOI); 82093AA datasheet section 3.2.4; SDM vol. 3 section 11.8.5.
# Exit code: 0; 1 the interrupt did not come; 2 it came once only; 3 it came although the line was low; 4 the EOIs did not exit.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=interrupts\nmode=long\nmemory=2M\nhypercalls=yes\nirqchip=split\nneeds=cap:KVM_CAP_SPLIT_IRQCHIP,cpl0\nend=exit\nexit=0\n"
note_end

.set LAPIC,  0xfee00000
.set SVR,    0xf0
.set EOI,    0xb0
.set IOAPIC, 0xfec00000
.set LEVEL,  1 << 15

    .code64
    .text
    .globl _start
_start:
    gate 0x41, handler
    lidt [rip + idtr]
    mov r12d, LAPIC
    mov dword ptr [r12 + SVR], 0x1ff
    mov r13d, IOAPIC
    mov dword ptr [r13], 0x10 + 2 * 9
    mov dword ptr [r13 + 0x10], 0x41 | LEVEL
    xor ebx, ebx                # interrupts so far
    sti
    hypercall IRQ_RAISE, 9
    mov ecx, 10000
1:  cmp ebx, 2
    je 2f
    dec ecx
    jnz 1b
    test ebx, ebx
    jnz once
    exit 1
2:  mov ecx, 1000
1:  dec ecx
    jnz 1b
    cmp ebx, 2
    jne too_many
    hypercall EXITS, 26         # KVM_EXIT_IOAPIC_EOI
    cmp eax, 2
    jne no_exits
    exit 0
once:
    exit 2
too_many:
    exit 3
no_exits:
    exit 4

handler:
    inc ebx
    cmp ebx, 2
    jne 1f
    push rax
    push rdx
    hypercall IRQ_LOWER, 9      # served at last
    pop rdx
    pop rax
1:  mov dword ptr [r12 + EOI], 0
    iretq

define_idt 0x42
