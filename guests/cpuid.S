# cpuid: prints the CPU's vendor and the hypervisor's signature
#
# Exits: IO out 0x3f8, IO out 0xf4. CPUID itself is handled inside KVM: it costs an exit from the guest, but not one to user space.
# See: SDM vol. 2, CPUID leaf 0; Linux Documentation/virt/kvm/x86/cpuid.rst (leaf 0x40000000).
# Exit code: 0, or 1 without the hypervisor bit (leaf 1, ECX bit 31).

.include "guest.inc"

note_begin
    .ascii "group=cpu\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=vendor: \n"
note_end

    .code64
    .text
    .globl _start
_start:
    lea rsi, [rip + vendor]
    call puts
    xor eax, eax
    cpuid
    mov [rip + buffer], ebx
    mov [rip + buffer + 4], edx
    mov [rip + buffer + 8], ecx
    call put_buffer

    mov eax, 1
    cpuid
    bt ecx, 31
    jnc bare
    lea rsi, [rip + hypervisor]
    call puts
    mov eax, 0x40000000
    cpuid
    mov [rip + buffer], ebx
    mov [rip + buffer + 4], ecx
    mov [rip + buffer + 8], edx
    call put_buffer
    exit 0
bare:
    exit 1

put_buffer:
    lea rsi, [rip + buffer]
    call puts
    mov al, '\n'
    out dx, al
    ret

define_puts

vendor:     .asciz "vendor: "
hypervisor: .asciz "hypervisor: "

    .bss
buffer: .skip 16
