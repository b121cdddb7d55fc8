# lapic_timer: the local APIC's timer: once, then again and again until it is stopped
#
# The timer counts down from its initial count at 1 GHz, which is what KVM makes of its bus clock with a divisor of 1. Each mode has a
# vector of its own, whose handler counts. The guest halts between ticks, in KVM: no HLT exits with an in-kernel APIC. On a slow host
# more ticks than waited for may have come.
# Exits: IO out 0x3f8, IO out 0xf4. None for the APIC's registers, the timer or HLT.
# See: SDM vol. 3 sections 11.5.4 (timer), 11.5.1 (local vector table), 11.8.5 (end of interrupt).
# Exit code: 0; 1 the one-shot timer fired again; 2 its count was not 0 afterwards; 3 a stopped timer still counts.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=time\nmode=long\nmemory=2M\nirqchip=kernel\nend=exit\nexit=0\nconsole=one-shot 1, periodic \n"
note_end

.set ONE_SHOT, 0x40
.set PERIODIC, 0x41
.set COUNT,    1000000          # a millisecond
.set TICKS,    5

    .code64
    .text
    .globl _start
_start:
    gate ONE_SHOT, on_one_shot
    gate PERIODIC, on_periodic
    lidt [rip + idtr]
    apic_write APIC_SVR, APIC_ENABLE
    apic_write APIC_DIVIDE, DIVIDE_BY_1

    apic_write APIC_LVT_TIMER, ONE_SHOT
    apic_write APIC_INITIAL, COUNT
    halt_once
    apic_read APIC_CURRENT
    test eax, eax
    jnz still_counting

    apic_write APIC_LVT_TIMER, TIMER_PERIODIC | PERIODIC
    apic_write APIC_INITIAL, COUNT
    halt_until ticks, TICKS
    apic_write APIC_INITIAL, 0
    apic_read APIC_CURRENT
    test eax, eax
    jnz not_stopped
    cmp dword ptr [rip + one_shots], 1
    jne again

    print "one-shot "
    mov eax, [rip + one_shots]
    call put_dec
    print ", periodic "
    mov eax, [rip + ticks]
    call put_dec
    print "\n"
    exit 0
again:
    exit 1
still_counting:
    exit 2
not_stopped:
    exit 3

on_one_shot:
    inc dword ptr [rip + one_shots]
    eoi
    return_behind_halt

on_periodic:
    inc dword ptr [rip + ticks]
    eoi
    iretq

define_puts
define_put_dec
define_idt 0x42

.lcomm one_shots, 4
.lcomm ticks, 4
