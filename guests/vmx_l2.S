# vmx_l2: a hypervisor as the guest, on VT-x: it runs a guest of its own, L2, which executes CPUID, OUT and VMCALL
#
# This guest, L1, answers the CPUID, moves L2's RIP on and resumes it; L2 gives back what it got with VMCALL. KVM, L0, keeps L1's VMCS
# in memory and runs L2 itself, with a VMCS made of L1's and its own. OUT is no VM exit to L1, so L2's goes to L0 and user space.
# Exits: IO out 0x3f8, IO out 0xf4, from L1; IO out 0xe0, once, from L2.
# See: SDM vol. 3 chapters 25 (VMCS), 27 (VM entries), 28 (VM exits), appendices A (capability MSRs), B (field encodings), C (reasons).
# Exit code: 0; 1 a VMX instruction failed; 2 VMLAUNCH or VMRESUME did; 3 the first exit was not CPUID; 4 the second was not VMCALL;
# 5 L2 got another answer.

.include "guest.inc"
.include "vmx.inc"

note_begin
    .ascii "group=nested\nmode=long\nmemory=2M\nneeds=vmx\nend=exit\nexit=0\nconsole=VM exit 18: VMCALL\n"
note_end

.set ANSWER, 0x4c32564d

    .code64
    .text
    .globl _start
_start:
    permit_vmxon denied=failed
    vmxon [rip + vmxon_pointer]
    check
    vmclear [rip + vmcs_pointer]
    check
    vmptrld [rip + vmcs_pointer]
    check

    set_control PIN_BASED, 0x481
    set_control PROC_BASED, 0x482
    set_control EXIT_CTLS, 0x483, 1 << 9    # to 64-bit mode
    set_control ENTRY_CTLS, 0x484, 1 << 9   # to IA-32e mode
    lea rsi, [rip + fields]
    lea rdi, [rip + fields_end]
1:  mov ecx, [rsi]              # all the rest: a field and its value
    movsxd rax, [rsi + 4]
    vmwrite rcx, rax
    check
    add rsi, 8
    cmp rsi, rdi
    jne 1b
    set_field GUEST_CR0, cr0    # L2 has L1's control registers and page tables
    set_field HOST_CR0
    set_field GUEST_CR3, cr3
    set_field HOST_CR3
    set_field GUEST_CR4, cr4
    set_field HOST_CR4
    set_field HOST_RSP, rsp     # where L1 goes on after a VM exit
    set_field HOST_RIP, "offset on_exit"
    set_field GUEST_RSP, "offset l2_stack_top"
    set_field GUEST_RIP, "offset l2"
    xor r13d, r13d              # VM exits
    vmlaunch
    exit 2                      # it comes here only when it has failed

# VM exits come here. The general registers are still L2's, which leaves R13 to L1.
on_exit:
    mov rbx, rax
    print "VM exit "
    mov ecx, EXIT_REASON
    vmread r12, rcx
    mov eax, r12d
    call put_dec
    test r13d, r13d
    jnz second
    inc r13d
    cmp r12d, 10                # CPUID
    jne not_cpuid
    print ": CPUID\n"
    mov ecx, EXIT_LENGTH
    vmread rdx, rcx
    mov ecx, GUEST_RIP
    vmread rax, rcx
    add rax, rdx
    vmwrite rcx, rax
    mov eax, ANSWER
    vmresume
    exit 2
second:
    cmp r12d, 18                # VMCALL
    jne not_vmcall
    print ": VMCALL\n"
    cmp ebx, ANSWER + 1
    jne other_answer
    vmxoff
    exit 0

l2: xor eax, eax
    cpuid
    inc eax
    out SCRATCH_PORT, al
    vmcall
    ud2

failed:
    exit 1
not_cpuid:
    exit 3
not_vmcall:
    exit 4
other_answer:
    exit 5

define_puts
define_put_dec
define_vmx_regions
define_vmx_fields

    .bss
    .skip 256
l2_stack_top:
