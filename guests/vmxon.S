# vmxon: into VMX root operation and out again, the first steps of every hypervisor on VT-x
#
# CR4.VMXE and IA32_FEATURE_CONTROL permit VMXON; firmware sets and locks the latter, so without firmware the guest does. A VMCS is
# cleared, made current, written and read. Without VMX root operation VMREAD is #UD, before and after.
# Exits: IO out 0x3f8, IO out 0xf4. Each VMX instruction exits to KVM, which carries it out; none reaches user space.
# See: SDM vol. 3 sections 24.6 to 24.8 (VMX and VMXON), 25.11 (VMXON region, VMCS), 31.2 (conventions), appendix A.1 (IA32_VMX_BASIC).
# Exit code: 0; 1 no VMX in CPUID; 2 IA32_FEATURE_CONTROL is locked without VMXON; 3 a VMX instruction failed;
# 4 VMPTRST or VMREAD gave something else than was written; 5 VMREAD was no #UD outside VMX operation.

.include "guest.inc"
.include "vmx.inc"

note_begin
    .ascii "group=nested\nmode=long\nmemory=2M\nneeds=vmx\nend=exit\nexit=0\nconsole=VMXOFF\n"
note_end

.set VALUE, 0x1234567890

# VMREAD outside VMX operation: the handler counts in R12, and goes on at R13.
.macro expect_ud
    xor r12d, r12d
    lea r13, [rip + 1f]
    vmread rax, rbx
1:  cmp r12d, 1
    jne no_ud
.endm

    .code64
    .text
    .globl _start
_start:
    gate 6, on_ud
    lidt [rip + idtr]
    mov eax, 1
    cpuid
    bt ecx, 5
    jnc no_vmx
    permit_vmxon denied=not_permitted
    mov ebx, GUEST_RIP
    expect_ud

    print "VMCS revision 0x"
    mov eax, [rip + vmcs]
    mov ecx, 8
    call put_hex_n
    print "\n"

    vmxon [rip + vmxon_pointer]
    check
    print "VMXON\n"
    vmclear [rip + vmcs_pointer]
    check
    vmptrld [rip + vmcs_pointer]
    check
    vmptrst [rip + stored]
    mov rax, [rip + vmcs_pointer]
    cmp rax, [rip + stored]
    jne different
    movabs rcx, VALUE
    vmwrite rbx, rcx
    check
    vmread rdx, rbx
    check
    cmp rdx, rcx
    jne different
    print "VMWRITE, VMREAD\n"
    vmclear [rip + vmcs_pointer]
    check
    vmxoff
    check
    print "VMXOFF\n"
    expect_ud
    exit 0

on_ud:
    inc r12d
    mov [rsp], r13
    iretq

no_vmx:
    exit 1
not_permitted:
    exit 2
failed:
    exit 3
different:
    exit 4
no_ud:
    exit 5

define_puts
define_put_hex
define_idt

define_vmx_regions

    .lcomm stored, 8
