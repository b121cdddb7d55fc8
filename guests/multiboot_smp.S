# multiboot_smp: every vCPU started by one INIT and one SIPI to all others, as multiboot kernels and test suites do it
#
# How many there should be comes from fw_cfg. The startup code is copied to gpa 0, which SIPI vector 0 means; each vCPU goes to protected mode
# there and counts itself. pykvm run multiboot_smp --cpus 8 starts eight.
# Exits: IO out 0x510 and IO in 0x511 (fw_cfg); IO out 0x3f8, one for each character; IO out 0xf4.
# See: SDM vol. 3 sections 9.4.4 (INIT, SIPI), 11.6.1 (interrupt command register), 10.9.1 (to protected mode).
# Exit code: 0, or 1: fw_cfg says that there is no CPU.

.include "guest.inc"

note_begin
    .ascii "group=boot\nformat=multiboot\nmode=protected\nmemory=2M\nend=exit\nexit=0\ncpus=3\n"
    .ascii "console=00000003 vCPUs\n"
note_end

.set FW_CFG_SELECT, 0x510       # QEMU's docs/specs/fw_cfg.rst
.set FW_CFG_DATA,   0x511
.set NB_CPUS,       5

.set LAPIC_SVR,     0xfee000f0
.set LAPIC_ICR,     0xfee00300
.set ALL_BUT_SELF,  3 << 18
.set ASSERT,        1 << 14
.set INIT,          5 << 8
.set STARTUP,       6 << 8      # with vector 0

    .code32
    .text
    .balign 4
    .long 0x1badb002, 0, -0x1badb002

    .globl _start
_start:
    mov esp, offset stack_top
    mov ax, NB_CPUS
    mov dx, FW_CFG_SELECT
    out dx, ax
    mov dx, FW_CFG_DATA
    in al, dx
    mov bl, al
    in al, dx
    mov bh, al
    movzx ebx, bx
    test ebx, ebx
    jz fail

    cld
    mov esi, offset startup
    xor edi, edi
    mov ecx, offset startup_end - startup
    rep movsb
    or dword ptr [LAPIC_SVR], 0x100         # software enable
    mov dword ptr [LAPIC_ICR], ALL_BUT_SELF | ASSERT | INIT
    mov dword ptr [LAPIC_ICR], ALL_BUT_SELF | ASSERT | STARTUP
1:  pause
    cmp [online], ebx
    jne 1b

    mov eax, ebx
    call put_hex32
    print32 " vCPUs\n"
    exit 0
fail:
    exit 1

    .code16
startup:                        # at 0000:0000, DS is 0 too
    .byte 0x66                  # a 32-bit base
    lgdt [gdtr - startup]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea            # jmp far
    .long protected
    .word 0x08
gdtr:
    .word 3 * 8 - 1
    .long gdt
startup_end:

    .code32
protected:
    mov ax, 0x10
    mov ds, ax
    lock inc dword ptr [online]
1:  cli
    hlt
    jmp 1b

define_puts
define_put_hex32

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # flat 32-bit code
    .quad 0x00cf93000000ffff    # flat data
online:
    .long 1                     # this one
    .lcomm stack, 1024
    .set stack_top, stack + 1024
