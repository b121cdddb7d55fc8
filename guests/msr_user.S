# msr_user: an MSR that user space keeps: RDMSR and WRMSR exit, and Python answers
#
# First one that no CPU has, then STAR, which KVM would keep by itself: a filter hands it to user space.
# Exits: X86_WRMSR and X86_RDMSR for both, IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4.
# See: api.rst 7.21 (KVM_CAP_X86_USER_SPACE_MSR), 4.97 (KVM_X86_SET_MSR_FILTER), 5 (KVM_EXIT_X86_RDMSR).
# Exit code: 0; 1 the host refused; 2 the invented MSR answered wrong; 3 STAR did; 4 the accesses did not exit.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=msr\nmode=long\nmemory=2M\nhypercalls=yes\n"
    .ascii "needs=cap:KVM_CAP_X86_USER_SPACE_MSR,cap:KVM_CAP_X86_MSR_FILTER\nend=exit\nexit=0\n"
note_end

.set INVENTED, 0x12345
.set STAR,     0xc0000081

    .code64
    .text
    .globl _start
_start:
    mov ebx, INVENTED
    mov bp, 2
1:  hypercall MSR_ANSWER, ebx
    test eax, eax
    jnz refused
    mov ecx, ebx
    mov eax, 0x11223344
    mov edx, 0x55667788
    wrmsr
    rdmsr
    not eax                     # the host gives back all bits inverted
    not edx
    cmp eax, 0x11223344
    jne wrong
    cmp edx, 0x55667788
    jne wrong
    mov ebx, STAR
    inc bp
    cmp bp, 3
    je 1b
    hypercall EXITS, 29         # KVM_EXIT_X86_RDMSR
    cmp eax, 2
    jne no_exits
    hypercall EXITS, 30         # KVM_EXIT_X86_WRMSR
    cmp eax, 2
    jne no_exits
    exit 0
refused:
    exit 1
wrong:
    mov eax, ebp
    out DEBUG_EXIT, al
no_exits:
    exit 4
