# demand_page: memory made when it is touched: the kernel's #PF handler maps a frame and fills it, and the program never notices
#
# A CPL3 program adds up an array of 24 pages, twice. The first walk faults once for each page, the second not at all.
# Exits: IO out 0x3f8, IO out 0xf4. The faults stay in the guest.
# See: SDM vol. 3 sections 4.5 (4-level paging), 4.7 (#PF error code), 4.10.2.3 (not-present entries are not cached).
# Exit code: 0; 1 wrong number of faults; 2 wrong sum; 3 a fault outside the array; 4 a fault with a wrong error code.

.include "guest.inc"

note_begin
    .ascii "group=memory\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=24 faults, sum 4800\n"
note_end

.set ARRAY, 0x5000000000        # PML4[0], PDPT[320], PD[0], PT[0] and on
.set PAGES, 24
.set STEP,  512                 # the program reads 8 elements of each page, and page n is full of n
.set SUM,   2 * 8 * PAGES * (PAGES + 1) / 2

    .code64
    .text
    .globl _start
_start:
    gate 3, on_int3, dpl=3      # the program's way back
    gate 14, on_pf
    lidt [rip + idtr]
    user_low_2m
    load_tss kernel_stack_top
    mov rbx, cr3                # an empty page table for the array
    mov rbx, [rbx]
    and rbx, -PAGE
    lea rax, [rip + pd + 7]     # present, writable, user
    mov [rbx + 320 * 8], rax
    lea rax, [rip + pt + 7]
    mov [rip + pd], rax
    xor r12d, r12d              # faults
    lea r13, [rip + frames]     # the next free one
    enter_user program, user_stack_top

program:
    xor eax, eax
    mov ecx, 2
walk:
    movabs rsi, ARRAY
    mov edx, PAGES * PAGE / STEP
1:  add rax, [rsi]
    add rsi, STEP
    dec edx
    jnz 1b
    dec ecx
    jnz walk
    int3

on_pf:                          # on the stack: error code, RIP, CS, RFLAGS, RSP, SS
    push rax
    push rcx
    push rdi
    cmp qword ptr [rsp + 24], 4 # not present, read, user
    jne wrong_code
    mov rax, cr2
    movabs rcx, ARRAY
    sub rax, rcx
    cmp rax, PAGES * PAGE
    jae outside
    shr rax, 12                 # the page's number
    lea rcx, [r13 + 5]          # present, user
    lea rdi, [rip + pt]
    mov [rdi + rax * 8], rcx
    inc rax                     # fill the frame, in the kernel's own mapping
    mov rdi, r13
    mov ecx, PAGE / 8
    rep stosq
    add r13, PAGE
    inc r12d
    pop rdi
    pop rcx
    pop rax
    add rsp, 8
    iretq                       # the read runs again

on_int3:
    mov r14, rax
    mov eax, r12d
    call put_dec
    print " faults, sum "
    mov rax, r14
    call put_dec
    print "\n"
    cmp r12d, PAGES
    jne wrong_number
    cmp r14, SUM
    jne wrong_sum
    exit 0
wrong_number:
    exit 1
wrong_sum:
    exit 2
outside:
    exit 3
wrong_code:
    exit 4

define_puts
define_put_dec
define_idt

    .bss
    .balign PAGE
pd:     .skip PAGE
pt:     .skip PAGE
frames: .skip PAGES * PAGE
    .skip 1024
kernel_stack_top:
    .skip 256
user_stack_top:
