# walk_two_level: the guest walks its own page tables by hand, and finds at the gpa what is at the gva
#
# Two virtual addresses at odd places for one frame, then one in the 2 MiB pages that pykvm has made. Each line shows an entry: level,
# index, content, and the gpa it leads to. With EPT or NPT the CPU walks a second level for each of these gpas: up to 24 reads for one.
# Exits: IO out 0x3f8, IO out 0xf4. Neither level makes one once KVM has mapped the memory.
# See: SDM vol. 3 sections 4.5 (4-level paging), 29.3 (EPT); APM vol. 2 section 15.25 (nested paging).
# Exit code: 0; 1 an entry is not present; 2 the data differ.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=4M\nend=exit\nexit=0\nconsole=the same at gva and gpa\n"
note_end

.set ODD,  0x123456789000       # PML4[36], PDPT[209], PD[179], PT[393]
.set HIGH, 0xffffffffdeadb000   # PML4[511], PDPT[511], PD[245], PT[219]
.set BIG,  0x234568             # inside the second 2 MiB page, of RAM

    .code64
    .text
    .globl _start
_start:
    lea rbx, [rip + tables]
    lea rsi, [rip + frame]
    movabs rdi, ODD
    call map
    movabs rdi, HIGH            # the same frame once more
    call map
    mov dword ptr [rip + frame + 0x123], 0x600df00d
    mov dword ptr [rip + frame + 0xeef], 0x0ddba115
    mov dword ptr [BIG], 0x5eed
    .irp gva, ODD + 0x123, HIGH + 0xeef, BIG
    movabs r12, \gva
    call walk
    .endr
    print "the same at gva and gpa\n"
    exit 0

# Maps the page at gva RDI to the frame RSI, with three tables from RBX on.
map:
    mov rax, cr3
    mov cl, 39
1:  mov rdx, rdi                # the entry in the table at RAX
    shr rdx, cl
    and edx, 511
    lea rdx, [rax + rdx * 8]
    mov rax, rbx
    cmp cl, 12
    cmove rax, rsi              # the last one leads to the frame
    lea r8, [rax + 3]           # present, writable
    mov [rdx], r8
    je 2f
    add rbx, PAGE
    sub cl, 9
    jmp 1b
2:  ret

# Prints the walk for gva R12; compares what is there with what is at the gpa.
walk:
    print "gva "
    mov rax, r12
    call put_hex
    mov rbx, cr3
    mov r13d, 39                # the lowest bit of this level's index
    lea r14, [rip + names]
level:
    mov rsi, r14
    call puts
    mov r14, rsi                # the next level's name
    mov rax, r12
    mov ecx, r13d
    shr rax, cl
    and eax, 511
    lea r15, [rbx + rax * 8]
    mov ecx, 3
    call put_hex_n
    print "] "
    mov rax, [r15]
    call put_hex
    mov rax, [r15]
    test al, 1                  # P
    jz not_present
    movabs rbx, 0x000ffffffffff000
    and rbx, rax
    cmp r13d, 12                # a page table's entry has no PS
    je 1f
    test al, 0x80               # PS: a large page
    jz 2f
1:  mov rax, -1                 # the last level: what is left of the gva is the offset
    mov ecx, r13d
    mov r13d, 12
    shl rax, cl
    and rbx, rax
    not rax
    and rax, r12
    or rbx, rax
2:  print " -> gpa "
    mov rax, rbx
    call put_hex
    sub r13d, 9
    cmp r13d, 12
    jae level
    print "\n"
    mov eax, [r12]
    cmp eax, [rbx]              # RAM is mapped to itself
    jne different
    ret
not_present:
    exit 1
different:
    exit 2

define_puts
define_put_hex
names: .asciz "\n  PML4[", "\n  PDPT[", "\n  PD  [", "\n  PT  ["

    .bss
    .balign PAGE
frame:  .skip PAGE
tables: .skip 6 * PAGE
