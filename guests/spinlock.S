# spinlock: two vCPUs count in the same place, under a lock that none is lost, and beside it without one
#
# XCHG with memory locks the bus without being asked to. The counters are read, incremented and written by three instructions, so that
# without the lock one vCPU can overwrite what the other has counted. How much is lost is the host's affair: one CPU for both may lose nothing.
# Exits: IO out 0x3f8, IO out 0xf4.
# See: SDM vol. 3 sections 9.1 (locked atomic operations), 9.10.6.1 (PAUSE in spin loops).
# Exit code: 0; 1 counts are missing under the lock.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=smp\nmode=long\nmemory=2M\ncpus=2\nirqchip=kernel\nend=exit\nexit=0\nconsole=with the lock 4000 of 4000\n"
note_end

.set ROUNDS, 2000               # of each

    .code64
    .text
    .globl _start
_start:
    apic_write APIC_SVR, APIC_ENABLE
    sti                         # nothing will interrupt; but a host with one CPU has to get at a vCPU that spins
    start_ap ap_main, ap_stack_top
    wait_for ap_there
    call count
    wait_for ap_done

    print "with the lock "
    mov rax, [rip + locked]
    call put_dec
    print " of 4000, without "
    mov rax, [rip + unlocked]
    call put_dec
    print "\n"
    cmp qword ptr [rip + locked], 2 * ROUNDS
    jne lost
    exit 0
lost:
    exit 1

ap_main:
    sti
    mov dword ptr [rip + ap_there], 1
    call count
    mov dword ptr [rip + ap_done], 1
    cli
1:  hlt
    jmp 1b

count:
    mov ecx, ROUNDS
1:  mov eax, 1
2:  xchg eax, [rip + lock_word] # take it: 0 was there
    test eax, eax
    jz 3f
    pause
    jmp 2b
3:  mov rbx, [rip + locked]
    inc rbx
    mov [rip + locked], rbx
    mov dword ptr [rip + lock_word], 0      # x86 keeps stores in order

    mov rbx, [rip + unlocked]
    inc rbx
    mov [rip + unlocked], rbx
    dec ecx
    jnz 1b
    ret

define_puts
define_put_dec

    .bss
    .balign 64
lock_word: .skip 64             # a cache line each
locked:    .skip 64
unlocked:  .skip 64
ap_there:  .skip 64
ap_done:   .skip 64
    .skip 512
ap_stack_top:
