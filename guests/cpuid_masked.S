# cpuid_masked: the CPU model hides a feature from the guest: CMPXCHG16B is there, but CPUID says no
#
# Exits: IO out 0xf4. CPUID itself is answered inside KVM, from the table that user space gave it.
# See: api.rst 4.20 (KVM_SET_CPUID2); SDM vol. 2 CPUID leaf 1 (ECX bit 13 CMPXCHG16B, bit 31 hypervisor).
# Exit code: 0; 1 the bit is still there; 2 the hypervisor bit has gone too.

.include "guest.inc"

note_begin
    .ascii "group=cpu\nmode=long\nmemory=2M\ncpu=host -cx16\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    mov eax, 1
    cpuid
    bt ecx, 13
    jc visible
    bt ecx, 31
    jnc bare
    exit 0
visible:
    exit 1
bare:
    exit 2
