# string_copy: REP MOVS, STOS, CMPS and SCAS in RAM, backwards over themselves, across a page fault, and into and out of MMIO
#
# REP is interruptible: registers say how far it has come, and after a fault in the middle it goes on where it stopped. With one side in
# MMIO, KVM's instruction emulator carries it out, an exit for each element.
# Exits: MMIO write and MMIO read, 16 each of 4 bytes, at 0xd0000000; IO out 0xf4.
# See: SDM vol. 2, REP, MOVS, STOS, CMPS, SCAS; api.rst 5, KVM_EXIT_MMIO.
# Exit code: 0; 1 STOS or SCAS wrong; 2 the overlapping copy; 3 registers at the fault, or what was copied; 4 through MMIO.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=4M\nend=exit\nexit=0\n"
note_end

.set HOLE, 0x200000             # the second 2 MiB page, until the #PF handler maps it
.set LENGTH, 64

    .code64
    .text
    .globl _start
_start:
    gate 14, on_pf
    lidt [rip + idtr]
    lea rsp, [rip + stack_top]
    mov rbx, cr3                # PD[1] at RBX: take the page away
    mov rbx, [rbx]
    and rbx, -PAGE
    mov rbx, [rbx]
    and rbx, -PAGE
    mov r12, [rbx + 8]
    mov qword ptr [rbx + 8], 0
    mov rax, cr3
    mov cr3, rax
    cld

    lea rdi, [rip + buffer]     # 1000 times 0x5a, then a zero to be found
    mov ecx, 1000
    mov al, 0x5a
    rep stosb
    lea rdi, [rip + buffer]
    mov ecx, 2000
    xor eax, eax
    repne scasb
    jne wrong_scan
    cmp ecx, 2000 - 1001
    jne wrong_scan

    lea rdi, [rip + buffer]     # 0, 1, ... 63
1:  stosb
    inc al
    cmp al, LENGTH
    jne 1b
    lea rsi, [rip + buffer + LENGTH - 1]    # 8 bytes up, over itself: from the end down
    lea rdi, [rsi + 8]
    mov ecx, LENGTH
    std
    rep movsb
    cld
    xor eax, eax
2:  lea rdi, [rip + buffer + 8]
    cmp [rdi + rax], al
    jne wrong_overlap
    inc eax
    cmp eax, LENGTH
    jne 2b

    lea rsi, [rip + buffer + 8] # half of it before the hole, half in it
    mov edi, HOLE - LENGTH / 2
    mov ecx, LENGTH
    rep movsb
    test r12, r12               # the handler clears it
    jnz wrong_fault
    mov esi, HOLE - LENGTH / 2
    lea rdi, [rip + buffer + 8]
    mov ecx, LENGTH
    repe cmpsb
    jne wrong_fault

    mov esi, HOLE - LENGTH / 2
    mov edi, SCRATCH_MMIO
    mov ecx, LENGTH / 4
    rep movsd
    mov esi, SCRATCH_MMIO
    lea rdi, [rip + copy]
    mov ecx, LENGTH / 4
    rep movsd
    lea rsi, [rip + copy]
    mov edi, HOLE - LENGTH / 2
    mov ecx, LENGTH
    repe cmpsb
    jne wrong_mmio
    exit 0

on_pf:
    add rsp, 8                  # the error code
    cmp ecx, LENGTH / 2         # half is done
    jne wrong_fault
    cmp edi, HOLE
    jne wrong_fault
    mov [rbx + 8], r12
    xor r12d, r12d
    iretq

wrong_scan:
    exit 1
wrong_overlap:
    exit 2
wrong_fault:
    exit 3
wrong_mmio:
    exit 4

define_idt

    .bss
    .balign 16
buffer: .skip 2048
copy:   .skip LENGTH
    .skip 512
stack_top:
