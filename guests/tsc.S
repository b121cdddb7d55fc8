# tsc: the time stamp counter never goes back, also across exits; how far it moves while one OUT is carried out
#
# KVM lets RDTSC run without an exit and adds the VM's TSC offset; what passes in the host is seen by the guest.
# Exits: IO out 0xe0, 100 times, between two RDTSC; IO out 0x3f8; IO out 0xf4.
# See: SDM vol. 3 sections 17.17 (the counter), 25.3 (RDTSC and the TSC offset).
# Exit code: 0; 1 the counter went back or stood still.

.include "guest.inc"

note_begin
    .ascii "group=time\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=smallest \n"
note_end

.set ROUNDS, 100

# The counter in RAX. Changes RDX.
.macro read_tsc
    rdtsc                       # EDX:EAX
    shl rdx, 32
    or rax, rdx
.endm

    .code64
    .text
    .globl _start
_start:
    mov r12, -1                 # smallest distance
    xor r13d, r13d              # largest
    mov ebx, ROUNDS
    read_tsc
    mov r15, rax                # the last one seen
1:  read_tsc
    cmp rax, r15
    jbe back
    mov r14, rax
    out SCRATCH_PORT, al
    read_tsc
    mov r15, rax
    sub rax, r14
    jbe back
    cmp rax, r12
    cmovb r12, rax
    cmp rax, r13
    cmova r13, rax
    dec ebx
    jnz 1b

    print "smallest "
    mov rax, r12
    call put_dec
    print ", largest "
    mov rax, r13
    call put_dec
    print "\n"
    exit 0
back:
    exit 1

define_puts
define_put_dec
