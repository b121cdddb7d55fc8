# pic_pit: the PC's old pair: an 8253 timer at 1 kHz into an 8259 interrupt controller, as every PC since 1981 could do it
#
# The master PIC's IRQ 0 to 7 get the vectors 0x20 to 0x27; after reset they would lie on the exceptions'. Its output reaches the CPU through
# the APIC's LINT0. In the handler the in-service register has IRQ 0's bit; the end of interrupt clears it. The handler masks IRQ 0 at the
# tenth tick: KVM delivers later those ticks that found the guest busy.
# Exits: IO out 0x3f8, IO out 0xf4. None for the ports of PIC and PIT, which KVM has, or for HLT.
# See: Intel 8259A (ICW1 to ICW4, OCW2, OCW3) and 8254 (mode 2) data sheets; SDM vol. 3 section 11.5.1 (LINT0, ExtINT).
# Exit code: 0; 1 IRQ 0 was not in service in its handler; 2 it still was afterwards; 3 the PIT's count does not change.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=time\nmode=long\nmemory=2M\nirqchip=kernel\nend=exit\nexit=0\nconsole=10 ticks of IRQ 0\n"
note_end

.set PIC1, 0x20                 # command port; data port above
.set PIC2, 0xa0
.set PIT0, 0x40                 # channel 0
.set PIT_CONTROL, 0x43
.set DIVISOR, 1193              # of 1.193182 MHz: 1 kHz
.set TICKS, 10

# out \port, \value with ports that fit the instruction. Changes AL.
.macro outb port, value
    mov al, \value
    out \port, al
.endm

# The in-service register of the master in AL.
.macro in_service
    outb PIC1, 0x0b             # OCW3: the next read gives ISR
    in al, PIC1
.endm

    .code64
    .text
    .globl _start
_start:
    gate 0x20, on_irq0
    lidt [rip + idtr]
    outb PIC1, 0x11             # ICW1: edge triggered, cascade, ICW4 follows
    outb PIC2, 0x11
    outb PIC1 + 1, 0x20         # ICW2: vectors from here on
    outb PIC2 + 1, 0x28
    outb PIC1 + 1, 1 << 2       # ICW3: the slave is at IRQ 2
    outb PIC2 + 1, 2
    outb PIC1 + 1, 1            # ICW4: 8086 mode, explicit end of interrupt
    outb PIC2 + 1, 1
    outb PIC1 + 1, 0xfe         # OCW1: all masked but IRQ 0
    outb PIC2 + 1, 0xff
    outb PIT_CONTROL, 0x34      # channel 0, low byte then high, mode 2: a pulse at each end of count
    outb PIT0, DIVISOR & 0xff
    outb PIT0, DIVISOR >> 8
    halt_until ticks, TICKS

    in_service
    test al, 1
    jnz not_ended
    call pit_count
    mov ebx, eax
    mov ecx, 100000
1:  call pit_count
    cmp eax, ebx
    jne counts
    loop 1b
    exit 3
counts:
    mov eax, [rip + ticks]
    call put_dec
    print " ticks of IRQ 0\n"
    exit 0
not_serviced:
    exit 1
not_ended:
    exit 2

# Channel 0's count in EAX.
pit_count:
    outb PIT_CONTROL, 0         # latch it
    xor eax, eax
    in al, PIT0
    mov ah, al
    in al, PIT0
    xchg al, ah
    ret

on_irq0:
    push rax
    in_service
    test al, 1
    jz not_serviced
    inc dword ptr [rip + ticks]
    cmp dword ptr [rip + ticks], TICKS
    jb 1f
    outb PIC1 + 1, 0xff         # enough
1:  outb PIC1, 0x20             # OCW2: end of interrupt
    pop rax
    iretq

define_puts
define_put_dec
define_idt 0x21

.lcomm ticks, 4
