# smp_user: two vCPUs at CPL3, each counts the primes in its half of the numbers below 20000
#
# Both run the same program in the same address space, with the range in registers. vCPU 1 gets along without a TSS: it neither traps nor takes
# interrupts, and waits at CPL3 when it is done.
# Exits: IO out 0x3f8 and IO out 0xf4 at CPL3, by vCPU 0.
# See: SDM vol. 3 sections 5.8.7 (to CPL3 by IRETQ), 9.4 (multiple processors); vol. 1 section 19.5.2 (I/O bitmap).
# Exit code: 0; 1 the number of primes is wrong.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=smp\nmode=long\nmemory=2M\ncpus=2\nirqchip=kernel\nend=exit\nexit=0\nconsole=1229 and 1033 primes: 2262 below 20000\n"
note_end

.set HALF, 10000
.set USER_FLAGS, 0x3202         # IF, and IOPL 3: not every host has the TSS's I/O bitmap

    .code64
    .text
    .globl _start
_start:
    user_low_2m
    load_tss kernel_stack_top
    apic_write APIC_SVR, APIC_ENABLE
    start_ap ap_main, ap_stack_top
    mov edi, 2
    mov esi, HALF
    enter_user program, user_stack_top, USER_FLAGS

ap_main:
    mov edi, HALF
    mov esi, 2 * HALF
    enter_user ap_program, ap_user_stack_top, USER_FLAGS

program:
    call primes
    mov ebx, eax
    wait_for ap_result
    mov eax, ebx
    call put_dec
    print " and "
    mov eax, [rip + ap_result]
    add ebx, eax
    call put_dec
    print " primes: "
    mov eax, ebx
    call put_dec
    print " below 20000\n"
    cmp ebx, 2262
    jne wrong
    exit 0
wrong:
    exit 1

ap_program:
    call primes
    mov [rip + ap_result], eax
1:  pause
    jmp 1b

# The number of primes from EDI up to ESI in EAX. Changes RCX, RDX, RDI, R8, R9.
primes:
    xor r8d, r8d
1:  mov ecx, 2                  # divisors, while their square is not above the number
2:  mov eax, ecx
    mul ecx
    cmp eax, edi
    ja 3f
    mov eax, edi
    xor edx, edx
    div ecx
    test edx, edx
    jz 4f
    inc ecx
    jmp 2b
3:  inc r8d
4:  inc edi
    cmp edi, esi
    jb 1b
    mov eax, r8d
    ret

define_puts
define_put_dec

    .data
ap_result: .long 0

    .bss
    .balign 16
    .skip 512
kernel_stack_top:
    .skip 512
user_stack_top:
    .skip 512
ap_stack_top:
    .skip 512
ap_user_stack_top:
