# reset_vector: the first instructions of a CPU, at F000:FFF0 with CS based at 0xffff0000
#
# As firmware it ends at 4 GiB and is read only; its end is below 1 MiB too, as RAM. The first far jump leaves the top of the address space
# for that copy: from then on CS's base is 16 times its selector. Flat files start the same way: pykvm run --firmware FILE.
# Hosts without unrestricted guest emulate every instruction of it.
# Exits: IO out 0x3f8, one for each character; IO out 0xf4.
# See: SDM vol. 3 sections 10.1.1 (state after reset), 10.1.4 (the first instruction).
# Exit code: 0, or 1: EDX has no CPU signature; 2: what the copy says differs from the ROM; 3: the copy below 1 MiB cannot be written.

.include "guest.inc"

note_begin
    .ascii "group=boot\nformat=firmware\nmode=real\nmemory=1M\nend=exit\nexit=0\nconsole=Hello from the reset vector.\n"
note_end

.set SEGMENT, 0xf000
.set HERE,    0xf000            # this page's offset in that segment

    .code16
    .text
    .globl _start
first:
    mov bl, 1
    test dx, dx                 # family, model, stepping
    jz fail
    mov ax, cs:[mark - first + HERE]        # the ROM: CS's base is still 0xffff0000
    .byte 0xea                  # jmp far
    .word low - first + HERE, SEGMENT
low:
    mov cx, cs
    mov ds, cx
    inc bl
    cmp ax, [mark - first + HERE]
    jne fail
    inc bl
    mov word ptr [mark - first + HERE], 0x1234
    cmp word ptr [mark - first + HERE], 0x1234
    jne fail
    mov si, offset greeting - first + HERE
    call puts
    exit 0
fail:
    mov al, bl
    out DEBUG_EXIT, al
    hlt

define_puts

mark:
    .word 0xcafe
greeting:
    .asciz "Hello from the reset vector.\n"

    .org 0xff0
_start:
    jmp first
    .org 0x1000
