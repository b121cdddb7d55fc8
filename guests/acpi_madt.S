# acpi_madt: ACPI's tables from the RSDP to the MADT, which lists a LAPIC for each vCPU
#
# Firmware leaves the root pointer at a multiple of 16 bytes below 1 MiB. It leads to the RSDT, a list of tables; each begins with four letters
# and its length, and its bytes add up to 0. The MADT's entries say how many LAPICs there are, and where the IOAPIC is.
# Exits: IO out 0x3f8, IO out 0xf4.
# See: ACPI 6.5 sections 5.2.5 (RSDP), 5.2.7 (RSDT), 5.2.12 (MADT).
# Exit code: 0; 1 no RSDP; 2 a wrong checksum; 3 no MADT; 4 the processor that runs this is not the first LAPIC.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=platform\nmode=long\nmemory=2M\ncpus=3\nplatform=pc-test\nend=exit\nexit=0\n"
    .ascii "console=FACP APIC: 3 LAPICs, IOAPIC at fec00000\n"
note_end

.set BIOS, 0xe0000
.set BIOS_END, 0x100000
.set RSDP_LENGTH, 20            # of the first version, which has a checksum of its own
.set TABLE_LENGTH, 4
.set TABLE_BODY, 36
.set MADT_ENTRIES, 44

    .code64
    .text
    .globl _start
_start:
    mov ebx, BIOS
    movabs rax, 0x2052545020445352      # "RSD PTR "
1:  cmp [rbx], rax
    je found
    add ebx, 16
    cmp ebx, BIOS_END
    jb 1b
    exit 1
found:
    mov ecx, RSDP_LENGTH
    call check
    mov ebx, [rbx + 16]     # the RSDT
    call check_table

    lea r12, [rbx + TABLE_BODY] # its 32-bit pointers
    mov r13d, [rbx + TABLE_LENGTH]
    add r13, rbx
    xor r14d, r14d              # the MADT
next_table:
    cmp r12, r13
    jae listed
    mov ebx, [r12]
    add r12, 4
    call check_table
    mov eax, [rbx]
    mov [rip + letters], eax
    cmp eax, 0x43495041         # "APIC"
    cmovz r14, rbx
    lea rsi, [rip + letters]
    call puts
    mov al, ' '
    cmp r12, r13
    jb 1f
    mov al, ':'
1:  out dx, al                  # puts has left COM1 in DX
    jmp next_table
listed:
    test r14, r14
    jz no_madt

    lea r12, [r14 + MADT_ENTRIES]
    mov r13d, [r14 + TABLE_LENGTH]
    add r13, r14
    xor ebx, ebx                # LAPICs
    xor r14d, r14d              # the IOAPIC's gpa
next_entry:
    cmp byte ptr [r12], 0           # a LAPIC
    jne 1f
    test ebx, ebx
    jnz 2f
    apic_read APIC_ID
    shr eax, 24
    cmp al, [r12 + 3]
    jne not_first
2:  inc ebx
1:  cmp byte ptr [r12], 1           # an IOAPIC
    jne 1f
    mov r14d, [r12 + 4]
1:  movzx eax, byte ptr [r12 + 1]       # each entry says how long it is
    add r12, rax
    cmp r12, r13
    jb next_entry
    print " "
    mov eax, ebx
    call put_dec
    print " LAPICs, IOAPIC at "
    mov eax, r14d
    mov ecx, 8
    call put_hex_n
    print "\n"
    exit 0
no_madt:
    exit 3
not_first:
    exit 4

# All bytes of the table at RBX, or ECX bytes there, add up to 0. Changes RAX, RCX.
check_table:
    mov ecx, [rbx + TABLE_LENGTH]
check:
    xor eax, eax
1:  add al, [rbx + rcx - 1]
    loop 1b
    jnz wrong
    ret
wrong:
    exit 2

define_puts
define_put_dec
define_put_hex

.lcomm letters, 8
