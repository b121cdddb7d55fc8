# irq_window: without an irqchip, an interrupt that comes while the guest cannot take it waits for the window to open
#
# User space has KVM_INTERRUPT for a vector, and may use it only while the guest can take one. If it cannot, user space sets
# request_interrupt_window, and the guest's STI makes an exit of its own.
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls), IRQ_WINDOW_OPEN, IO out 0xf4.
# See: api.rst 4.16 (KVM_INTERRUPT), 5 (request_interrupt_window); SDM vol. 3 section 6.8.1 (IF).
# Exit code: 0; 1 it came with interrupts off; 2 it never came; 3 no window exit was seen; 4 of two that waited one was lost.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=interrupts\nmode=long\nmemory=2M\nhypercalls=yes\nirqchip=none\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    gate 0x40, handler
    lidt [rip + idtr]
    xor ebx, ebx                # interrupts so far

    hypercall INTERRUPT, 0x40   # interrupts are off: it must wait
    mov ecx, 50
1:  dec ecx
    jnz 1b
    test ebx, ebx
    jnz too_early
    sti
    mov ecx, 1000
1:  test ebx, ebx
    jnz 2f
    dec ecx
    jnz 1b
    exit 2
2:  cli
    hypercall EXITS, 7          # KVM_EXIT_IRQ_WINDOW_OPEN
    test eax, eax
    jz no_window

    hypercall INTERRUPT, 0x40   # two wait: each gets its own window
    hypercall INTERRUPT, 0x40
    sti
    mov ecx, 1000
1:  cmp ebx, 3
    je 2f
    dec ecx
    jnz 1b
    exit 4
2:  exit 0
too_early:
    exit 1
no_window:
    exit 3

handler:
    inc ebx
    iretq

define_idt 0x41
