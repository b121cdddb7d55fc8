# svm_l2: a hypervisor as the guest, on AMD-V: it runs a guest of its own, L2, which executes CPUID, OUT and VMMCALL
#
# This guest, L1, answers the CPUID, moves L2's RIP on and runs it again; L2 gives back what it got with VMMCALL. KVM, L0, carries out
# VMRUN by running L2 itself, with a VMCB made of L1's and its own. L1 does not intercept OUT, so L2's goes to L0 and user space.
# Exits: IO out 0x3f8, IO out 0xf4, from L1; IO out 0xe0, once, from L2. VMRUN and #VMEXIT are exits to KVM, none reaches user space.
# See: APM vol. 2 sections 15.3 to 15.6 (enabling SVM, VMRUN, #VMEXIT), appendices B (VMCB), C (exit codes).
# Exit code: 0; 1 no SVM in CPUID; 2 the first #VMEXIT was not CPUID; 3 the second was not VMMCALL; 4 L2 got another answer.

.include "guest.inc"

note_begin
    .ascii "group=nested\nmode=long\nmemory=2M\nneeds=svm\nend=exit\nexit=0\nconsole=#VMEXIT 081: VMMCALL\n"
note_end

.set EFER,        0xc0000080
.set VM_HSAVE_PA, 0xc0010117
.set ANSWER,      0x4c325356
.set INTERCEPT_3, 0x00c         # bit 18: CPUID
.set INTERCEPT_4, 0x010         # bit 0: VMRUN, which must be; bit 1: VMMCALL
.set L2_RIP,      0x578
.set L2_RAX,      0x5f8
.set ASID,        0x058
.set EXITCODE,    0x070

# A segment of the VMCB: selector, attributes (access byte, then AVL, L, D/B, G), limit; the base is 0.
.macro segment at, selector, attributes
    mov dword ptr [rbx + \at], \selector | \attributes << 16
    mov dword ptr [rbx + \at + 4], 0xffffffff
.endm

    .code64
    .text
    .globl _start
_start:
    mov eax, 0x80000001
    cpuid
    bt ecx, 2
    jnc no_svm
    mov ecx, EFER
    rdmsr
    bts eax, 12                 # SVME
    wrmsr
    mov ebp, eax
    lea rax, [rip + hsave]      # where VMRUN puts L1's state
    xor edx, edx
    mov ecx, VM_HSAVE_PA
    wrmsr
    # L2 starts in 64-bit mode with L1's page tables
    lea rbx, [rip + vmcb]
    mov dword ptr [rbx + INTERCEPT_3], 1 << 18
    mov dword ptr [rbx + INTERCEPT_4], 3
    mov dword ptr [rbx + ASID], 1
    segment 0x400, DATA, 0xc93  # ES
    segment 0x410, CODE64, 0xa9b
    segment 0x420, DATA, 0xc93  # SS
    segment 0x430, DATA, 0xc93  # DS
    mov [rbx + 0x4d0], rbp      # EFER
    mov rax, cr4
    mov [rbx + 0x548], rax
    mov rax, cr3
    mov [rbx + 0x550], rax
    mov rax, cr0
    mov [rbx + 0x558], rax
    mov qword ptr [rbx + 0x570], 2  # RFLAGS
    lea rax, [rip + l2]
    mov [rbx + L2_RIP], rax
    lea rax, [rip + l2_stack_top]
    mov [rbx + 0x5d8], rax      # RSP

    call run
    print "CPUID\n"
    cmp dword ptr [rip + vmcb + EXITCODE], 0x72
    jne not_cpuid
    mov qword ptr [rip + vmcb + L2_RAX], ANSWER
    add qword ptr [rip + vmcb + L2_RIP], 2
    call run
    print "VMMCALL\n"
    cmp dword ptr [rip + vmcb + EXITCODE], 0x81
    jne not_vmmcall
    cmp qword ptr [rip + vmcb + L2_RAX], ANSWER + 1
    jne other_answer
    exit 0

# Runs L2 until its next #VMEXIT and prints the code. L2 shares all registers but RAX and RSP with L1.
run:
    lea rax, [rip + vmcb]
    vmrun
    stgi                        # #VMEXIT has cleared the global interrupt flag
    print "#VMEXIT "
    mov eax, [rip + vmcb + EXITCODE]
    mov ecx, 3
    call put_hex_n
    print ": "
    ret

l2:
    xor eax, eax
    cpuid
    inc eax
    out SCRATCH_PORT, al
    vmmcall
    ud2

no_svm:
    exit 1
not_cpuid:
    exit 2
not_vmmcall:
    exit 3
other_answer:
    exit 4

define_puts
define_put_hex
    .bss
    .balign PAGE
vmcb:  .skip PAGE
hsave: .skip PAGE
    .skip 256
l2_stack_top:
