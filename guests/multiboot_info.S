# multiboot_info: what a multiboot loader hands over: command line, memory map, modules
#
# Any multiboot loader can start this image, such as GRUB or qemu-system-x86_64 -kernel. Give it a command line with --append and modules
# with --initrd, and it prints them.
# Exits: IO out 0x3f8, one for each character; IO out 0xf4.
# See: Multiboot Specification 0.6.96 sections 3.1 (header), 3.2 (machine state), 3.3 (boot information).
# Exit code: 0, or 1: EAX is not the loader's magic; 2: paging or interrupts are on; 3: bit 20 of addresses is masked (A20); 4: there is
# no memory map.

.include "guest.inc"

note_begin
    .ascii "group=boot\nformat=multiboot\nmode=protected\nmemory=2M\nend=exit\nexit=0\n"
    .ascii "console=loader: pykvm\n"
note_end

.set FLAGS, 1 << 0 | 1 << 1     # modules on page boundaries; memory information wanted

    .code32
    .text
    .balign 4
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)

    .globl _start
_start:
    mov esp, offset stack_top   # ESP is undefined at the start
    mov ebp, ebx                # the information structure
    mov bl, 1
    cmp eax, 0x2badb002
    jne fail
    inc bl
    mov eax, cr0
    and eax, 1 << 31 | 1
    cmp eax, 1
    jne fail
    pushfd
    pop eax
    test eax, 1 << 17 | 1 << 9  # VM, IF
    jnz fail
    inc bl
    mov eax, [probe - 0x100000]
    not eax
    mov [probe], eax
    cmp [probe - 0x100000], eax
    je fail
    inc bl
    test dword ptr [ebp], 1 << 6
    jz fail

    print32 "loader: "
    mov esi, [ebp + 64]
    call puts
    print32 "\ncommand line: "
    mov esi, [ebp + 16]
    call puts
    print32 "\n"
    mov eax, [ebp + 4]
    call put_hex32
    print32 " KiB below 1 MiB, "
    mov eax, [ebp + 8]
    call put_hex32
    print32 " KiB above\n"

    mov ebx, [ebp + 48]         # the memory map, and its length
    mov edi, [ebp + 44]
    add edi, ebx
region:
    cmp ebx, edi
    jae regions_done
    mov eax, [ebx + 4]          # an entry: size, base, length, type
    call put_hex32
    print32 " + "
    mov eax, [ebx + 12]
    call put_hex32
    print32 " type "
    mov eax, [ebx + 20]
    call put_hex32
    print32 "\n"
    add ebx, [ebx]
    add ebx, 4                  # the size does not count itself
    jmp region
regions_done:

    mov edi, [ebp + 20]         # modules: count and table
    mov ebx, [ebp + 24]
module:
    sub edi, 1
    jb done
    print32 "module "
    mov esi, [ebx + 8]
    call puts
    print32 ": "
    mov esi, [ebx]              # start, end
    mov ecx, [ebx + 4]
    sub ecx, esi
    mov dx, COM1
    rep outsb
    add ebx, 16
    jmp module
done:
    exit 0
fail:
    exit bl

define_puts
define_put_hex32

    .lcomm stack, 1024
    .set stack_top, stack + 1024
    .lcomm probe, 4
