# fw_cfg: QEMU's firmware configuration device, byte by byte through a port and in one go by DMA
#
# An item is selected by number; its bytes then come one at a time from the data port. With DMA the guest leaves an access structure in memory,
# all big-endian, and writes its address, big-endian too: the low half starts it. The device clears the control field, or leaves the error bit
# there, as for the read to where no memory is.
# Exits: IO out 0x510, IO in 0x511, IO in and out 0x514-0x518, IO out 0x3f8, IO out 0xf4.
# See: QEMU docs/specs/fw_cfg.rst.
# Exit code: 0; 1 the signature is not there; 2 no DMA; 3 DMA fails; 4 it reads something else than the port; 5 DMA to nowhere is no error.

.include "guest.inc"

note_begin
    .ascii "group=platform\nmode=long\nmemory=2M\nplatform=pc-test\nend=exit\nexit=0\nconsole=2097152 bytes of RAM, by port and by DMA; 1 vCPU\n"
note_end

.set SELECTOR, 0x510
.set DATA_PORT, 0x511
.set DMA_HIGH, 0x514
.set DMA_LOW, 0x518

.set FW_SIGNATURE, 0
.set FW_ID, 1                   # bit 1: DMA
.set FW_RAM_SIZE, 3
.set FW_NB_CPUS, 5

.set CTL_READ_SELECTED, 2 | 8
.set CTL_ERROR, 1
.set NOWHERE, 0xe0000000        # no RAM, no device

    .code64
    .text
    .globl _start
_start:
    mov ax, FW_SIGNATURE
    mov ecx, 4
    call read_item
    cmp eax, 0x554d4551         # "QEMU"
    jne no_signature
    mov ax, FW_ID
    mov ecx, 4
    call read_item
    test al, 2
    jz no_dma
    mov dx, DMA_HIGH
    in eax, dx
    cmp eax, 0x554d4551         # of "QEMU CFG"
    jne no_dma
    mov ax, FW_RAM_SIZE
    mov ecx, 8
    call read_item
    mov rbx, rax

    lea rsi, [rip + answer]
    call dma
    test eax, eax
    jnz dma_failed
    cmp rbx, [rip + answer]
    jne differs
    mov esi, NOWHERE
    call dma
    cmp eax, CTL_ERROR
    jne no_error

    mov rax, rbx
    call put_dec
    print " bytes of RAM, by port and by DMA; "
    mov ax, FW_NB_CPUS
    mov ecx, 2
    call read_item
    call put_dec
    print " vCPU\n"
    exit 0
no_signature:
    exit 1
no_dma:
    exit 2
dma_failed:
    exit 3
differs:
    exit 4
no_error:
    exit 5

# ECX bytes, up to 8, of item AX, in RAX. Changes RCX, RDX, RDI.
read_item:
    mov dx, SELECTOR
    out dx, ax
    mov dx, DATA_PORT
    lea rdi, [rip + item]
    mov qword ptr [rdi], 0
1:  in al, dx
    stosb
    loop 1b
    mov rax, [rip + item]
    ret

# Reads the RAM size by DMA to gpa RSI; the control field afterwards in EAX. Changes RDX, RSI.
dma:
    mov eax, FW_RAM_SIZE << 16 | CTL_READ_SELECTED
    bswap eax
    mov [rip + access], eax
    mov dword ptr [rip + access + 4], 8 << 24
    bswap rsi
    mov [rip + access + 8], rsi
    lea eax, [rip + access]
    bswap eax
    mov dx, DMA_LOW
    out dx, eax                 # the high half is 0 from the last time, or from the start
    mov eax, [rip + access]
    bswap eax
    ret

define_puts
define_put_dec

    .data
    .balign 8
access: .quad 0, 0
answer: .quad 0
item:   .quad 0
