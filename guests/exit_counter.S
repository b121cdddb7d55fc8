# exit_counter: the guest asks its host how many exits it has caused, by kind: what is an exit, and what is none
#
# Exits: IO out 0xe0 (5), MMIO at 0xd0000000 (3), IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4. Its computing, its memory accesses
# and CPUID make none that user space sees.
# See: api.rst 5 (the exit reasons); SDM vol. 3 chapter 26 (what exits to KVM).
# Exit code: 0; 1 wrong count of port exits; 2 wrong count of MMIO exits; 3 something else has exited.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=start\nmode=long\nmemory=2M\nhypercalls=yes\nend=exit\nexit=0\n"
note_end

    .code64
    .text
    .globl _start
_start:
    hypercall EXITS, 2          # KVM_EXIT_IO
    mov esi, eax
    mov ecx, 5
1:  out SCRATCH_PORT, al
    dec ecx
    jnz 1b
    mov ebx, SCRATCH_MMIO
    mov [rbx], eax
    mov eax, [rbx]
    mov [rbx + 8], rax
    xor eax, eax
    cpuid                       # an exit to KVM, not to user space
    mov [rip + somewhere], eax
    hypercall EXITS, 2
    sub eax, esi
    cmp eax, 5 + 1 + 2          # and the IN of the first call, and this one's OUTs
    jne wrong_io
    hypercall EXITS, 6          # KVM_EXIT_MMIO
    cmp eax, 3
    jne wrong_mmio
    hypercall EXITS, 2
    mov esi, eax
    hypercall EXITS, -1
    sub eax, esi
    cmp eax, 3 + 3              # all but IO: MMIO; and three more of IO by now
    jne others
    exit 0
wrong_io:
    exit 1
wrong_mmio:
    exit 2
others:
    exit 3

    .data
somewhere: .long 0
