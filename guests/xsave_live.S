# xsave_live: a CPL3 program's x87, XMM and, where there are any, YMM registers keep their values across 200 exits
#
# KVM and pykvm's own process use the same registers while they handle an exit: the guest's must be put aside and come back.
# Exits: IO out 0xe0, 200 times, straight from CPL3; IO out 0x3f8, IO out 0xf4.
# See: SDM vol. 1 chapters 8.1 (x87 registers), 13 (XSAVE), 14.3 (finding AVX); api.rst 4.42, KVM_GET_XSAVE.
# Exit code: 0; 1, 2, 3 when x87, XMM or the upper halves of YMM registers have changed.

.include "guest.inc"

note_begin
    .ascii "group=cpu\nmode=user\nmemory=4M\nend=exit\nexit=0\nconsole=x87 and XMM are unchanged\n"
note_end

.set EXITS, 200

    .code64
    .text
    .globl _start
_start:
    lea rdi, [rip + random]     # 512 bytes that look so
    mov eax, 12345
    mov ecx, 512 / 4
1:  imul eax, eax, 1103515245
    add eax, 54321
    stosd
    loop 1b

    # AVX: the kernel must save the registers (OSXSAVE, XCR0), and the CPU must have it
    mov eax, 1
    cpuid
    and ecx, 1 << 27 | 1 << 28
    cmp ecx, 1 << 27 | 1 << 28
    jne fill
    xor ecx, ecx
    xgetbv
    and eax, 6
    cmp eax, 6
    sete [rip + avx]

fill:
    fninit
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7
    fild qword ptr [rip + random + 8 * \n]
    .endr
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu xmm\n, [rip + random + 32 * \n]
    .endr
    cmp byte ptr [rip + avx], 0
    je run
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu ymm\n, [rip + random + 32 * \n]
    .endr

run:
    fxsave64 [rip + before]     # x87 from byte 32 on, XMM from byte 160 on
    mov ebx, EXITS
1:  mov eax, ebx
    out SCRATCH_PORT, al
    dec ebx
    jnz 1b
    fxsave64 [rip + after]

    lea rsi, [rip + before + 32]
    lea rdi, [rip + after + 32]
    mov ecx, 128
    repe cmpsb
    jne wrong_x87
    mov ecx, 256
    repe cmpsb
    jne wrong_xmm
    print "x87 and XMM are unchanged\n"
    cmp byte ptr [rip + avx], 0
    je done
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu [rip + live + 32 * \n], ymm\n
    .endr
    vzeroupper
    lea rsi, [rip + random]
    lea rdi, [rip + live]
    mov ecx, 512
    repe cmpsb
    jne wrong_ymm
    print "YMM too\n"
done:
    exit 0
wrong_x87:
    exit 1
wrong_xmm:
    exit 2
wrong_ymm:
    exit 3

define_puts

    .bss
    .balign 16
before: .skip 512
after:  .skip 512
random: .skip 512
live:   .skip 512
avx:    .skip 1
