# slot_remap: the host memory behind a memslot is exchanged under the guest's feet, and the guest cannot tell
#
# All of RAM is one slot: code, stack and page tables move too. The second level of translation (EPT, NPT or shadow) is made anew.
# Exits: IO out/in 0x5e0-0x5f7 (hypercalls), IO out 0xf4.
# See: api.rst 4.35 (KVM_SET_USER_MEMORY_REGION: size 0 deletes a slot).
# Exit code: 0; 1 the host refused; 2 memory lost what was in it; 3 it does not keep what is written afterwards.

.include "guest.inc"
.include "host.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=2M\nhypercalls=yes\nend=exit\nexit=0\n"
note_end

.set WHERE, 0x180000
.set PAGES, 16

    .code64
    .text
    .globl _start
_start:
    mov r12d, 0x1000            # what is in the pages: this, and the page's number
    call fill
    mov r13d, 3                 # rounds
1:  hypercall REMAP, WHERE
    test eax, eax
    jnz refused
    call check
    jne lost
    add r12d, 0x1000
    call fill
    call check
    jne forgetful
    dec r13d
    jnz 1b
    exit 0
refused:
    exit 1
lost:
    exit 2
forgetful:
    exit 3

fill:
    mov ebx, WHERE
    xor ecx, ecx
1:  lea eax, [r12 + rcx]
    mov [rbx], eax
    add ebx, PAGE
    inc ecx
    cmp ecx, PAGES
    jne 1b
    ret

check:                          # ZF: all as filled
    mov ebx, WHERE
    xor ecx, ecx
1:  lea eax, [r12 + rcx]
    cmp [rbx], eax
    jne 2f
    add ebx, PAGE
    inc ecx
    cmp ecx, PAGES
    jne 1b
2:  ret
