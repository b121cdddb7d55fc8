# user_compute: a CPL3 program that computes with x87, SSE2 and, where the CPU and the kernel offer it, AVX2
#
# Exits: IO out 0x3f8, straight from CPL3 (the TSS's I/O bitmap allows it); IO out 0xf4.
# See: SDM vol. 1 chapter 8 (x87), 11 (SSE2), 14.3 (finding AVX), 19.5.2 (I/O bitmap).
# Exit code: 0, or 1, 2, 3 when x87, SSE2 or AVX2 gave a wrong sum.

.include "guest.inc"

note_begin
    .ascii "group=cpu\nmode=user\nmemory=4M\nend=exit\nexit=0\nconsole=SSE2 ok\n"
note_end

    .code64
    .text
    .globl _start
_start:
    # x87: 1 + 2 + ... + 100
    fninit
    fldz
    mov ecx, 100
1:  mov [rip + number], ecx
    fiadd dword ptr [rip + number]
    dec ecx
    jnz 1b
    fistp dword ptr [rip + number]
    cmp dword ptr [rip + number], 5050
    jne wrong_x87
    lea rsi, [rip + ok_x87]
    call puts

    # SSE2: eight 32-bit products in two registers, added up
    movdqu xmm0, [rip + vector]
    movdqu xmm1, [rip + vector + 16]
    paddd xmm0, xmm1
    pshufd xmm1, xmm0, 0x4e
    paddd xmm0, xmm1
    pshufd xmm1, xmm0, 0xb1
    paddd xmm0, xmm1
    movd eax, xmm0
    cmp eax, 36
    jne wrong_sse
    lea rsi, [rip + ok_sse]
    call puts

    # AVX2: the kernel must save the registers (OSXSAVE, XCR0) and the CPU must have it (leaf 7)
    mov eax, 1
    cpuid
    bt ecx, 27
    jnc no_avx
    xor ecx, ecx
    xgetbv
    and eax, 6
    cmp eax, 6
    jne no_avx
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ebx, 5
    jnc no_avx
    vmovdqu ymm0, [rip + vector]
    vpaddd ymm0, ymm0, ymm0
    vextracti128 xmm1, ymm0, 1
    vpaddd xmm0, xmm0, xmm1
    vphaddd xmm0, xmm0, xmm0
    vphaddd xmm0, xmm0, xmm0
    vmovd eax, xmm0
    vzeroupper
    cmp eax, 72
    jne wrong_avx
    lea rsi, [rip + ok_avx]
    call puts
    exit 0

no_avx:
    lea rsi, [rip + without_avx]
    call puts
    exit 0
wrong_x87:
    exit 1
wrong_sse:
    exit 2
wrong_avx:
    exit 3

define_puts

ok_x87:      .asciz "x87 ok\n"
ok_sse:      .asciz "SSE2 ok\n"
ok_avx:      .asciz "AVX2 ok\n"
without_avx: .asciz "no AVX2 here\n"

    .data
    .balign 32
vector: .long 1, 2, 3, 4, 5, 6, 7, 8
number: .long 0
