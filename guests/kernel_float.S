# kernel_float: floating point at CPL0: the square roots of 1 to 10, by SSE2 and by x87 rounding to double, which agree to the bit
#
# Where KVM has to emulate CPL0 code its emulator knows none of this: each such instruction is an exit, is executed by the CPU at CPL3 in
# a VM of its own, and run --stats counts it.
# Exits: IO out 0x3f8, IO out 0xf4; INTERNAL_ERROR where CPL0 code is emulated.
# See: SDM vol. 1 sections 8.1.5 (the x87 control word), 11.4 (SSE2); vol. 3 section 13.1 (CR0.TS, CR4.OSFXSR); docs/assist.md.
# Exit code: 0; 1 the two differ.

.include "guest.inc"

note_begin
    .ascii "group=cpu\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=sum of square roots: 403677e114472d43\n"
note_end

.set TO_DOUBLE, 0x27f           # all exceptions masked, precision control 2, round to nearest

    .code64
    .text
    .globl _start
_start:
    fninit
    mov word ptr [rip + control], TO_DOUBLE
    fldcw [rip + control]
    xorpd xmm2, xmm2            # the sum
    mov ebx, 1
1:  cvtsi2sd xmm0, ebx
    sqrtsd xmm1, xmm0
    addsd xmm2, xmm1
    mov [rip + number], ebx
    fild dword ptr [rip + number]
    fsqrt
    fstp qword ptr [rip + root]
    movq rax, xmm1
    cmp rax, [rip + root]
    jne different
    inc ebx
    cmp ebx, 10
    jbe 1b
    print "sum of square roots: "
    movq rax, xmm2
    call put_hex
    print "\n"
    exit 0
different:
    exit 1

define_puts
define_put_hex

    .lcomm control, 2
    .lcomm number, 4
    .lcomm root, 8
