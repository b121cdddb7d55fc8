# exceptions: #DE, #UD, #GP and #PF, raised on purpose and handled by the guest's own IDT, each resumed past its instruction
#
# A fault's saved RIP is that of the instruction itself: it would run again, so the handler moves it on.
# Exits: IO out 0x3f8, IO out 0xf4. Exceptions stay inside the guest.
# See: SDM vol. 3 sections 6.5 (faults), 6.13 (error codes), 6.14 (64-bit mode), 6.15 (each of them).
# Exit code: 0; 1 an exception did not come; 2 another one came; 3 wrong error code; 4 wrong saved RIP; 5 wrong CR2.

.include "guest.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=#PF 0x0000000000000002\n"
note_end

.set HOLE,         0x5000000000 # mapped by nothing
.set BAD_SELECTOR, 0x1230       # beyond the GDT's limit

# What must come next: the vector, its error code, where it is raised and where to go on.
.macro expect vector, code
    mov r12d, \vector
    mov r13d, \code
    lea r14, [rip + 1f]
    lea r15, [rip + 2f]
.endm

.macro came
    test r12d, r12d             # the handler clears it
    jnz missing
.endm

    .code64
    .text
    .globl _start
_start:
    gate 0, on_de
    gate 6, on_ud
    gate 13, on_gp
    gate 14, on_pf
    lidt [rip + idtr]

    expect 0, 0
    xor ecx, ecx
    mov eax, 1
    cdq
1:  div ecx
2:  came

    expect 6, 0
1:  ud2
2:  came

    expect 13, BAD_SELECTOR     # a selector that does not fit is the error code
    mov eax, BAD_SELECTOR
1:  mov fs, ax
2:  came

    expect 13, 0                # a non-canonical address
    mov rbx, 0x800000000000
1:  mov eax, [rbx]
2:  came

    expect 14, 2                # not present, write, supervisor
    mov rbx, HOLE
1:  mov [rbx], eax
2:  came
    exit 0
missing:
    exit 1

on_de:                          # these two push no error code
    push 0
    push 0
    jmp common
on_ud:
    push 0
    push 6
    jmp common
on_gp:
    push 13
    jmp common
on_pf:
    mov rax, cr2
    cmp rax, rbx
    jne wrong_cr2
    push 14
common:                         # on the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS
    cmp [rsp], r12
    jne wrong_vector
    cmp [rsp + 8], r13
    jne wrong_code
    cmp [rsp + 16], r14
    jne wrong_rip
    lea rsi, [rip + names]
    lea rsi, [rsi + r12 * 4]
    call puts
    print " 0x"
    mov rax, [rsp + 8]
    call put_hex
    print "\n"
    xor r12d, r12d
    mov [rsp + 16], r15
    add rsp, 16
    iretq
wrong_vector:
    exit 2
wrong_code:
    exit 3
wrong_rip:
    exit 4
wrong_cr2:
    exit 5

define_puts
define_put_hex
define_idt

names: .asciz "#DE"
       .org names + 6 * 4
       .asciz "#UD"
       .org names + 13 * 4
       .asciz "#GP", "#PF"
