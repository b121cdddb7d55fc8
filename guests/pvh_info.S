# pvh_info: what a PVH loader hands over: command line, memory map, modules
#
# Linux' vmlinux starts this way in light hypervisors: a note names an entry in 32-bit mode without paging. Give it a command line with
# --append and modules with --initrd, and it prints them.
# Exits: IO out 0x3f8, one for each character; IO out 0xf4.
# See: Xen docs/misc/pvh.pandoc (x86/HVM direct boot ABI), include/public/arch-x86/hvm/start_info.h.
# Exit code: 0, or 1: EBX does not point at a hvm_start_info of version 1; 2: CR0 has more than PE and ET, or CR4 has anything; 3: TF, IF
# or VM is set; 4: the task register has another limit than 0x67; 5: there is no memory map.

.include "guest.inc"

note_begin
    .ascii "group=boot\nformat=pvh\nmode=protected\nmemory=2M\nend=exit\nexit=0\n"
    .ascii "console=00000000 + 0009fc00 type 00000001\n"
note_end

    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long _start
    .popsection

    .code32
    .text
    .globl _start
_start:
    mov esp, offset stack_top
    mov ebp, ebx
    mov bl, 1
    cmp dword ptr [ebp], 0x336ec578
    jne fail
    cmp dword ptr [ebp + 4], 1
    jne fail
    inc bl
    mov eax, cr0
    and eax, ~(1 << 4)          # ET cannot be cleared
    cmp eax, 1
    jne fail
    mov eax, cr4
    test eax, eax
    jnz fail
    inc bl
    pushfd
    pop eax
    test eax, 1 << 17 | 1 << 9 | 1 << 8     # VM, IF, TF
    jnz fail
    inc bl
    inc bl
    cmp dword ptr [ebp + 48], 0
    je fail

    print32 "command line: "
    mov esi, [ebp + 24]
    call puts
    print32 "\n"
    mov ebx, [ebp + 40]         # the memory map, and its entries
    mov edi, [ebp + 48]
region:
    mov eax, [ebx]              # an entry: base, size, type, reserved
    call put_hex32
    print32 " + "
    mov eax, [ebx + 8]
    call put_hex32
    print32 " type "
    mov eax, [ebx + 16]
    call put_hex32
    print32 "\n"
    add ebx, 24
    dec edi
    jnz region

    mov edi, [ebp + 12]         # modules: count and table
    mov ebx, [ebp + 16]
module:
    sub edi, 1
    jb done
    print32 "module "
    mov esi, [ebx + 16]
    test esi, esi               # no command line of its own
    jz 1f
    call puts
1:  print32 ": "
    mov esi, [ebx]              # base, size
    mov ecx, [ebx + 8]
    mov dx, COM1
    rep outsb
    add ebx, 32
    jmp module
done:
    exit 0
fail:
    exit bl

define_puts
define_put_hex32

    .lcomm stack, 1024
    .set stack_top, stack + 1024
