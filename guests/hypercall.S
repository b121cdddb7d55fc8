# hypercall: VMCALL straight to user space, for the one hypercall that KVM passes on, and the port-based way beside it
#
# KVM answers hypercalls itself; KVM_CAP_EXIT_HYPERCALL hands it KVM_HC_MAP_GPA_RANGE (12), with which a guest says which of its pages
# are shared. Everything else goes through ports.
# Exits: HYPERCALL, IO out/in 0x5e0-0x5f7, IO out 0xf4.
# See: api.rst 7.26 (KVM_CAP_EXIT_HYPERCALL); Linux Documentation/virt/kvm/x86/hypercalls.rst; SDM vol. 3 VMCALL; APM vol. 3 VMMCALL.
# Exit code: 0; 1 the hypercall failed; 2 it made no exit; 3 the host heard other arguments; 4 an unknown one was not refused.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=cpu\nmode=long\nmemory=2M\nhypercalls=yes\nneeds=hypercalls,cap:KVM_CAP_EXIT_HYPERCALL\nend=exit\nexit=0\n"
note_end

.set MAP_GPA_RANGE, 12
.set ENOSYS,        1000

    .code64
    .text
    .globl _start
_start:
    mov eax, MAP_GPA_RANGE
    mov ebx, 0x180000           # gpa
    mov ecx, 3                  # pages
    xor edx, edx                # attributes: shared, 4 KiB
    vmcall
    test rax, rax
    jnz failed
    hypercall EXITS, 3          # KVM_EXIT_HYPERCALL
    cmp eax, 1
    jne no_exit
    hypercall ANNOUNCED
    cmp eax, 3
    jne other
    mov eax, 99
    vmcall                      # KVM answers this one
    cmp rax, -ENOSYS
    jne accepted
    hypercall 99                # and the host this one
    cmp eax, -ENOSYS
    jne accepted
    exit 0
failed:
    exit 1
no_exit:
    exit 2
other:
    exit 3
accepted:
    exit 4
