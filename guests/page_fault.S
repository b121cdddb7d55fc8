# page_fault: the guest's own IDT and #PF handler, which checks CR2 and the error code and returns past the access
#
# Exits: IO out 0x3f8, IO out 0xf4. The page fault itself stays inside the guest.
# See: SDM vol. 3 sections 4.7 (error code), 6.14.1 (64-bit gates), 6.15 interrupt 14.
# Exit code: 0; 1 no fault came; 2 wrong CR2; 3 wrong error code for the read; 4 for the write.

.include "guest.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=two page faults, both as expected\n"
note_end

.set HOLE, 0x5000000000      # mapped by nothing

    .code64
    .text
    .globl _start
_start:
    gate 14, handler
    lidt [rip + idtr]

    movabs rbx, HOLE + 0x123
    xor r8d, r8d                # faults seen
    mov r9d, 0                  # the error code to come: not present, read, supervisor
    mov r10b, 3
    mov eax, [rbx]
after_read:
    cmp r8d, 1
    jne no_fault
    mov r9d, 2                  # now a write
    mov r10b, 4
    mov [rbx], eax
after_write:
    cmp r8d, 2
    jne no_fault
    lea rsi, [rip + text]
    call puts
    exit 0
no_fault:
    exit 1

handler:
    pop rax                     # the error code
    cmp eax, r9d
    jne wrong_code
    mov rax, cr2
    cmp rax, rbx
    jne wrong_cr2
    inc r8d
    lea rax, [rip + after_read]
    lea rcx, [rip + after_write]
    cmp r8d, 2
    cmove rax, rcx
    mov [rsp], rax              # return there
    iretq
wrong_cr2:
    exit 2
wrong_code:
    mov al, r10b
    out DEBUG_EXIT, al
    hlt

define_puts
define_idt 15

text: .asciz "two page faults, both as expected\n"
