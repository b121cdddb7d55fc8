# pm_timer: ACPI's timer, which every PC has at the same rate, and power-off through ACPI
#
# The timer counts 3579545 times a second, in 24 bits, whatever the CPU does. The guest waits for a millisecond of it, and asks then for sleep
# state S5: sleep type 0 on this platform, as the DSDT says. Nothing comes after that.
# Exits: IO in 0x608, IO out 0x3f8, IO out 0x604.
# See: ACPI 6.5 sections 4.8.3.3 (power management timer), 4.8.3.2.1 (PM1 control: SLP_TYP, SLP_EN), 7.4.2 (\_Sx).

.include "guest.inc"

note_begin
    .ascii "group=platform\nmode=long\nmemory=2M\nplatform=pc-test\nend=power-off\nconsole=3580 ticks or more have passed: good night\n"
note_end

.set PM_CONTROL, 0x604
.set PM_TIMER, 0x608
.set TIMER_MASK, 0xffffff
.set MILLISECOND, 3580
.set SLP_EN, 1 << 13
.set SLP_TYP_S5, 0 << 10

    .code64
    .text
    .globl _start
_start:
    mov dx, PM_TIMER
    in eax, dx
    mov ebx, eax
1:  pause
    in eax, dx
    sub eax, ebx
    and eax, TIMER_MASK         # also where it has begun again from 0
    cmp eax, MILLISECOND
    jb 1b
    mov eax, MILLISECOND
    call put_dec
    print " ticks or more have passed: good night\n"
    mov dx, PM_CONTROL
    mov ax, SLP_TYP_S5 | SLP_EN
    out dx, ax
1:  hlt
    jmp 1b

define_puts
define_put_dec
