# ten_line_device: talks to the device of the README, a doubler at port 0x200: write a number, read it back doubled
#
# Exits: IO out 0x200, IO in 0x200; IO out 0xf4.
# See: "A device" in the README; api.rst 5, KVM_EXIT_IO.
# Exit code: 42, what the device makes of 21; 1, with a message, without the device.

.include "guest.inc"

note_begin
    .ascii "group=io\nmode=protected\nmemory=2M\nend=exit\nexit=42\n"
note_end

    .code32
    .text
    .globl _start
_start:
    mov dx, 0x200
    mov eax, 21
    out dx, eax
    in eax, dx
    cmp eax, 0xffffffff         # nobody there
    je missing
    out DEBUG_EXIT, eax
    hlt
missing:
    mov esi, offset text
    call puts
    exit 1

define_puts

text: .asciz "There is no device at port 0x200. The README shows one of ten lines.\n"
