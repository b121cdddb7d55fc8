# msr_filter: an MSR that the guest may use until the host denies it; from then on the guest gets #GP
#
# Exits: X86_RDMSR and X86_WRMSR once the filter is there (user space answers with #GP), IO out/in 0x5e0-0x5f7, IO out 0xf4.
# See: api.rst 4.97 (KVM_X86_SET_MSR_FILTER); SDM vol. 2 RDMSR, WRMSR (#GP).
# Exit code: 0; 1 #GP came too early; 2 STAR does not keep its value; 3 no #GP from RDMSR; 4 none from WRMSR; 5 another MSR is denied too.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=msr\nmode=long\nmemory=2M\nhypercalls=yes\n"
    .ascii "needs=cap:KVM_CAP_X86_USER_SPACE_MSR,cap:KVM_CAP_X86_MSR_FILTER\nend=exit\nexit=0\n"
note_end

.set STAR,  0xc0000081
.set CSTAR, 0xc0000083

    .code64
    .text
    .globl _start
_start:
    gate 13, on_gp
    lidt [rip + idtr]
    xor ebx, ebx                # #GPs so far
    mov ecx, STAR
    mov eax, 0x1234
    xor edx, edx
    wrmsr
    rdmsr
    test ebx, ebx
    jnz early
    cmp eax, 0x1234
    jne lost
    hypercall MSR_DENY, STAR
    mov ecx, STAR
    rdmsr
    cmp ebx, 1
    jne no_read
    wrmsr
    cmp ebx, 2
    jne no_write
    mov ecx, CSTAR
    rdmsr
    cmp ebx, 2
    jne too_much
    exit 0
early:
    exit 1
lost:
    exit 2
no_read:
    exit 3
no_write:
    exit 4
too_much:
    exit 5

on_gp:
    inc ebx
    add rsp, 8                  # the error code
    add qword ptr [rsp], 2      # RDMSR and WRMSR have two bytes
    iretq

define_idt
