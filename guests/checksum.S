# checksum: a CPL3 program that keeps its whole state in vector registers, with timer interrupts on, and knows what must come out
#
# It mixes eight XMM registers with each other, and makes an exit now and then. Whoever stops it there, saves it, and lets it go on somewhere
# else must bring every register along, and the LAPIC's timer: the sum is the same as in one run from start to end.
# Exits: IO out 0xe0, 40 times, straight from CPL3; IO out 0x3f8, IO out 0xf4. None for the timer.
# See: SDM vol. 1 chapter 11 (SSE2), 13 (XSAVE-managed state); vol. 3 sections 11.5.4 (APIC timer), 5.8.7 (to CPL3 by IRETQ).
# Exit code: 0; 1 the sum is wrong; 2 no timer interrupt came.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=cpu\nmode=long\nmemory=2M\nirqchip=kernel\nend=exit\nexit=0\nconsole=checksum 8ca889b13b76f579\n"
note_end

.set STEPS,  40
.set ROUNDS, 500
.set TICK,   0x40
.set PERIOD, 300000             # of the APIC's timer: 0.3 ms
.set USER_FLAGS, 0x3202         # IF, and IOPL 3: not every host has the TSS's I/O bitmap

# xmm\a takes in xmm\b: added, turned by 13 bits, its halves exchanged. Changes xmm8.
.macro mix a, b
    paddq xmm\a, xmm\b
    movdqa xmm8, xmm\a
    psllq xmm8, 13
    psrlq xmm\a, 51
    pxor xmm\a, xmm8
    pshufd xmm\a, xmm\a, 0x4e
.endm

    .code64
    .text
    .globl _start
_start:
    gate TICK, on_tick
    lidt [rip + idtr]
    user_low_2m
    load_tss kernel_stack_top
    mov al, 0xff                # the PICs' lines are nobody's
    out 0x21, al
    out 0xa1, al
    apic_write APIC_SVR, APIC_ENABLE
    apic_write APIC_DIVIDE, DIVIDE_BY_1
    apic_write APIC_LVT_TIMER, TIMER_PERIODIC | TICK
    apic_write APIC_INITIAL, PERIOD
    enter_user program, user_stack_top, USER_FLAGS

on_tick:
    inc dword ptr [rip + ticks]
    eoi
    iretq

program:
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7
    movdqu xmm\n, [rip + seed + 16 * \n]
    .endr
    mov ebx, STEPS
step:
    mov ecx, ROUNDS
1:  mix 0, 1
    mix 1, 2
    mix 2, 3
    mix 3, 4
    mix 4, 5
    mix 5, 6
    mix 6, 7
    mix 7, 0
    dec ecx
    jnz 1b
    mov eax, ebx
    out SCRATCH_PORT, al
    dec ebx
    jnz step

    .irp n, 1, 2, 3, 4, 5, 6, 7
    paddq xmm0, xmm\n
    .endr
    movdqu [rip + sum], xmm0
    mov rbx, [rip + sum]
    add rbx, [rip + sum + 8]
    print "checksum "
    mov rax, rbx
    call put_hex
    print "\n"
    mov rax, 0x8ca889b13b76f579
    cmp rax, rbx
    jne wrong
    cmp dword ptr [rip + ticks], 0
    je no_ticks
    exit 0
wrong:
    exit 1
no_ticks:
    exit 2

define_puts
define_put_hex
define_idt 0x41

    .data
    .balign 16
seed:
    .irp n, 1, 2, 3, 4, 5, 6, 7, 8
    .quad 0x9e3779b97f4a7c15 * \n, 0xbf58476d1ce4e5b9 * \n
    .endr
ticks: .long 0

    .bss
    .balign 16
sum: .skip 16
    .skip 512
kernel_stack_top:
    .skip 512
user_stack_top:
