# hypercall_mmio: hypercalls that work on every host: arguments in device registers, and a write that makes the call
#
# Exits: IO out/in 0x5e0-0x5f7, MMIO at 0xd0010000, IO out 0xf4.
# See: docs/architecture.md; api.rst 5 (KVM_EXIT_IO, KVM_EXIT_MMIO).
# Exit code: 0; 1 an unknown number was accepted through ports; 2 or through MMIO; 3 nonsense was; 4 the two ways do not agree.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=io\nmode=long\nmemory=2M\nhypercalls=yes\nend=exit\nexit=0\n"
note_end

.set EINVAL, 22
.set ENOSYS, 1000

    .code64
    .text
    .globl _start
_start:
    hypercall 99
    cmp eax, -ENOSYS
    jne port_accepts
    mov ebx, HYPERCALL_MMIO
    mov dword ptr [rbx + 16], 99
    cmp dword ptr [rbx + 16], -ENOSYS
    jne mmio_accepts
    cmp dword ptr [rbx + 20], -1                # the high half of a negative result
    jne mmio_accepts

    mov dword ptr [rbx], 0xfffff000             # no slot there
    mov dword ptr [rbx + 16], REMAP
    cmp dword ptr [rbx + 16], -EINVAL
    jne nonsense
    mov dword ptr [rbx], 200                    # no such vCPU
    mov dword ptr [rbx + 16], NMI
    cmp dword ptr [rbx + 16], -EINVAL
    jne nonsense

    mov dword ptr [rbx], 2                      # KVM_EXIT_IO
    mov dword ptr [rbx + 16], EXITS
    mov esi, [rbx + 16]
    hypercall EXITS, 2                          # two OUTs later
    sub eax, esi
    cmp eax, 2
    jne disagree
    exit 0
port_accepts:
    exit 1
mmio_accepts:
    exit 2
nonsense:
    exit 3
disagree:
    exit 4
