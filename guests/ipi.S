# ipi: two vCPUs wake each other by interrupts, a hundred times to and fro
#
# Each halts; what it has to do is done by the handler, which counts the other one's interrupt and answers it. vCPU 1 has its own stack, and
# the IDT, GDT and page tables of vCPU 0. Its first interrupt says that it is there.
# Exits: IO out 0x3f8, IO out 0xf4. None for the interrupts or HLT.
# See: SDM vol. 3 sections 11.6 (interprocessor interrupts), 11.8.5 (end of interrupt).
# Exit code: 0; 1 the counts differ.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=smp\nmode=long\nmemory=2M\ncpus=2\nirqchip=kernel\nend=exit\nexit=0\nconsole=100 rounds: 100 to vCPU 1, 101 to vCPU 0\n"
note_end

.set PING, 0x40                 # to vCPU 1
.set PONG, 0x41                 # to vCPU 0
.set ROUNDS, 100

    .code64
    .text
    .globl _start
_start:
    gate PING, on_ping
    gate PONG, on_pong
    lidt [rip + idtr]
    apic_write APIC_SVR, APIC_ENABLE
    start_ap ap_main, ap_stack_top
1:  sti
    hlt
    jmp 1b

ap_main:
    lidt [rip + idtr]
    apic_write APIC_SVR, APIC_ENABLE
    send_ipi 0, ICR_FIXED | PONG
1:  sti
    hlt
    jmp 1b

on_ping:                        # on vCPU 1, which does nothing else
    inc dword ptr [rip + pings]
    eoi
    send_ipi 0, ICR_FIXED | PONG
    iretq

on_pong:                        # on vCPU 0
    inc dword ptr [rip + pongs]
    eoi
    cmp dword ptr [rip + pongs], ROUNDS + 1
    jae enough
    send_ipi 1, ICR_FIXED | PING
    iretq

enough:
    mov eax, ROUNDS
    call put_dec
    print " rounds: "
    mov eax, [rip + pings]
    call put_dec
    print " to vCPU 1, "
    mov eax, [rip + pongs]
    call put_dec
    print " to vCPU 0\n"
    cmp dword ptr [rip + pings], ROUNDS
    jne differ
    exit 0
differ:
    exit 1

define_puts
define_put_dec
define_idt 0x42

.lcomm pings, 4
.lcomm pongs, 4

    .bss
    .balign 16
    .skip 512
ap_stack_top:
