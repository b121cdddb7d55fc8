# ring3: a CPL3 program runs privileged instructions: #GP goes to the guest's own kernel, and no exit is made
#
# HLT, MOV to CR3, CLI, LGDT and RDMSR each fault with error code 0. The program calls the kernel with INT3, whose saved RIP is past it.
# Exits: IO out 0x3f8, from the kernel's report; IO out 0xf4. None while the program runs.
# See: SDM vol. 3 sections 5.9 (privileged instructions), 6.12.1.1 (protection of handlers), 6.14.2 (stack switch), 8.7 (64-bit TSS).
# Exit code: 0; 1 not all of them faulted; 2 wrong error code; 3 the fault came from another place or not from CPL3.

.include "guest.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=5 privileged instructions at CPL3, 5 #GP\n"
note_end

    .code64
    .text
    .globl _start
_start:
    gate 3, on_int3, dpl=3      # the program's way back
    gate 13, on_gp
    lidt [rip + idtr]
    user_low_2m
    load_tss kernel_stack_top
    xor r12d, r12d              # faults
    lea r13, [rip + places]     # where the next one must come from, and the instruction's length
    enter_user program, user_stack_top

program:
privileged_1:
    hlt
privileged_2:
    mov cr3, rax
privileged_3:
    cli                         # with IOPL 0
privileged_4:
    lgdt [rip + idtr]
privileged_5:
    rdmsr
program_end:
    int3

on_gp:                          # on the stack: error code, RIP, CS, RFLAGS, RSP, SS
    cmp qword ptr [rsp], 0
    jne wrong_code
    mov rax, [rsp + 8]
    cmp rax, [r13]
    jne wrong_place
    mov eax, [rsp + 16]         # CPL is CS's low two bits
    and eax, 3
    cmp eax, 3
    jne wrong_place
    inc r12d
    add r13, 8
    mov rax, [r13]              # the next one
    mov [rsp + 8], rax
    add rsp, 8
    iretq

on_int3:                        # RIP, CS, RFLAGS, RSP, SS
    lea rax, [rip + program_end + 1]
    cmp [rsp], rax
    jne wrong_place
    print "5 privileged instructions at CPL3, "
    lea eax, [r12 + '0']
    out dx, al
    print " #GP\n"
    cmp r12d, 5
    jne missing
    exit 0
missing:
    exit 1
wrong_code:
    exit 2
wrong_place:
    exit 3

define_puts
define_idt

    .data
    .balign 8
places: .quad privileged_1, privileged_2, privileged_3, privileged_4, privileged_5, program_end

    .bss
    .balign 16
    .skip 1024
kernel_stack_top:
    .skip 256
user_stack_top:
