# smc: self-modifying code: an instruction writes over the next ones, and the new ones must run
#
# An immediate changes 100 times just before it is used, in place; then a routine is copied over another through a second mapping of the
# same frame, where only the physical address tells the CPU that code has changed: CPUID serializes, as the manual asks.
# Exits: IO out 0xf4. A KVM that emulates must look at the code afresh each time.
# See: SDM vol. 3 section 8.1.3 (self- and cross-modifying code), 11.6 (self-modifying code).
# Exit code: 0; 1 an old immediate was used; 2 the old routine ran.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=4M\nend=exit\nexit=0\n"
note_end

.set ALIAS, 0x40000000          # its 2 MiB page will show the code's

    .code64
    .text
    .globl _start
_start:
    xor ecx, ecx
    mov ebx, 100
1:  inc ecx
    mov [rip + immediate], cl   # a byte of an instruction to come
    jmp 2f
2:  .byte 0xb0                  # mov al, imm8
immediate:
    .byte 0
    cmp al, cl
    jne old_immediate
    dec ebx
    jnz 1b

    # PD of the second GiB, first entry: the 2 MiB at gpa 0 once more
    mov rax, cr3
    mov rax, [rax]
    and rax, -PAGE
    mov rax, [rax + 8]          # PDPT[1]
    and rax, -PAGE
    mov qword ptr [rax], 0x83   # present, writable, 2 MiB
    mov rax, cr3
    mov cr3, rax
    call routine
    lea rsi, [rip + other]
    lea rdi, [rip + routine + ALIAS]
    mov ecx, other_end - other
    cld
    rep movsb
    xor eax, eax
    cpuid
    call routine
    cmp eax, 2
    jne old_routine
    exit 0
old_immediate:
    exit 1
old_routine:
    exit 2

routine:
    mov eax, 1
    ret
other:
    mov eax, 2
    ret
other_end:
