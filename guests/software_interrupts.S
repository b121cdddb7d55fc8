# software_interrupts: INT3 and INT 0x80 through the guest's own IDT: traps, whose handlers return behind the instruction
#
# Each goes through its gate with the address behind it in the frame, where a fault would have its own. An interrupt gate clears
# RFLAGS.IF, a trap gate does not. Where KVM has to emulate CPL0 code its emulator knows none of them: they are finished in user space,
# and run --stats counts them.
# Exits: IO out 0x3f8, IO out 0xf4; INTERNAL_ERROR where CPL0 code is emulated.
# See: SDM vol. 3 sections 6.4.4 (INT n), 6.5 (traps), 6.12.1.3 (flags); vol. 2 at INT n; docs/assist.md.
# Exit code: 0; 1 a handler was not entered; 2 a wrong saved RIP; 3 RFLAGS.IF is wrong in the handler.

.include "guest.inc"

note_begin
    .ascii "group=exceptions\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=INT 0x80\n"
note_end

    .code64
    .text
    .globl _start
_start:
    gate 3, on_int3
    gate 0x80, on_int80
    mov byte ptr [rip + idt + 16 * 0x80 + 5], 0x8f  # present, DPL 0, a trap gate
    lidt [rip + idtr]
    sti                         # nothing will come: there is no interrupt controller

    lea r14, [rip + 1f]
    xor r12d, r12d
    int3
1:  cmp r12d, 3
    jne missing
    lea r14, [rip + 2f]
    int 0x80
2:  cmp r12d, 0x80
    jne missing
    exit 0
missing:
    exit 1

on_int3:                        # an interrupt gate
    mov r12d, 3
    pushfq
    pop rax
    test eax, 1 << 9
    jnz wrong_if
    cmp [rsp], r14
    jne wrong_rip
    print "INT3\n"
    iretq
on_int80:
    mov r12d, 0x80
    pushfq
    pop rax
    test eax, 1 << 9
    jz wrong_if
    cmp [rsp], r14
    jne wrong_rip
    print "INT 0x80\n"
    iretq
wrong_rip:
    exit 2
wrong_if:
    exit 3

define_puts
define_idt vectors=256
