# inject_exception: the host makes the guest take exceptions that no instruction of its own has raised
#
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls: the guest asks its host for KVM_SET_VCPU_EVENTS), IO out 0xf4.
# See: api.rst 4.32 (KVM_SET_VCPU_EVENTS); SDM vol. 3 sections 6.13 (error codes), 25.5 (event injection).
# Exit code: 0; 1 #UD did not come; 2 #GP did not come; 3 #GP came without its error code.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nhypercalls=yes\nend=exit\nexit=0\n"
note_end

.set CODE, 0x1230

    .code64
    .text
    .globl _start
_start:
    gate 6, on_ud
    gate 13, on_gp
    lidt [rip + idtr]
    xor ebx, ebx

    hypercall EXCEPTION, 6, -1  # without an error code
    nop
    cmp ebx, 6
    jne no_ud
    hypercall EXCEPTION, 13, CODE
    nop
    cmp ebx, 13
    jne no_gp
    exit 0
no_ud:
    exit 1
no_gp:
    exit 2
wrong_code:
    exit 3

on_ud:
    mov ebx, 6
    iretq
on_gp:
    cmp dword ptr [rsp], CODE
    jne wrong_code
    add rsp, 8
    mov ebx, 13
    iretq

define_idt
