# far_modes: real mode to protected mode to 64-bit mode, by the guest itself: the way that every boot goes
#
# Paging goes on together with long mode: 64-bit mode needs PAE, page tables, EFER.LME and CR0.PG, and a far jump to a CS with L set.
# Exits: IO out 0x3f8, one for each character, in three modes; IO out 0xf4. The mode switches need none on hosts with unrestricted guest.
# See: SDM vol. 3 sections 10.9.1 (to protected mode), 10.8.5 (to IA-32e mode), 3.4.5 (descriptors).
# Exit code: 0; 1 when EFER.LMA is not set at the end.

.include "guest.inc"

note_begin
    .ascii "group=start\nmode=real\nmemory=1M\nend=exit\nexit=0\nconsole=real, protected, long\n"
note_end

.set EFER,  0xc0000080
.set TABLES, 0x10000            # three pages of zeros to start with

    .code16
    .text
    .globl _start
_start:
    cli
    mov si, offset in_real
    call puts16
    lgdt [gdtr]
    mov eax, cr0
    or al, 1                    # PE
    mov cr0, eax
    ljmp 0x08, protected        # CS is still a real mode one until here

    .code32
protected:
    mov ax, 0x18
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esi, offset in_protected
    call puts32

    # the first 2 MiB mapped to themselves: PML4[0], PDPT[0], PD[0]
    mov dword ptr [TABLES], TABLES + 0x1000 + 3         # present, writable
    mov dword ptr [TABLES + 0x1000], TABLES + 0x2000 + 3
    mov dword ptr [TABLES + 0x2000], 0x83               # and a 2 MiB page
    mov eax, TABLES
    mov cr3, eax
    mov eax, cr4
    or eax, 1 << 5              # PAE
    mov cr4, eax
    mov ecx, EFER
    rdmsr
    or eax, 1 << 8              # LME: long mode, when paging comes
    wrmsr
    mov eax, cr0
    or eax, 1 << 31             # PG
    mov cr0, eax
    ljmp 0x10, offset long_mode # in compatibility mode until here

    .code64
long_mode:
    mov esi, offset in_long
    call puts64
    mov ecx, EFER
    rdmsr
    bt eax, 10                  # LMA
    jnc inactive
    mov rax, 0x123456789abcdef0 # registers have 64 bits now
    shr rax, 60
    cmp eax, 1
    jne inactive
    exit 0
inactive:
    exit 1

    .code16
define_puts puts16
    .code32
define_puts puts32
    .code64
define_puts puts64

in_real:      .asciz "real, "
in_protected: .asciz "protected, "
in_long:      .asciz "long\n"

    .data
    .balign 8
gdt:  .quad 0
      .quad 0x00cf9b000000ffff  # 0x08: 32-bit code, base 0, limit 4 GiB
      .quad 0x00af9b000000ffff  # 0x10: 64-bit code
      .quad 0x00cf93000000ffff  # 0x18: data
gdtr: .word gdtr - gdt - 1
      .long gdt
