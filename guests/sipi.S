# sipi: the first vCPU starts the second one, which begins in real mode at the page that the start-up IPI names
#
# INIT resets vCPU 1, and the start-up IPI's vector 0x07 becomes CS 0x0700, IP 0. From there it goes to protected mode, reads the id
# of its local APIC, and reports. vCPU 0 has halted for good by then; what one vCPU does ends the run of all.
# Exits: IO out 0x3f8, IO out 0xf4, by vCPU 1.
# See: SDM vol. 3 sections 9.4 (multiple-processor initialization), 11.6.1 (ICR), 10.1.4 (state after INIT); api.rst 4.38 (mp_state).
# Exit code: 0; 1 CS or IP at the start is another; 2 not real mode; 3 the APIC id is not 1.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=smp\nmode=protected\nmemory=2M\ncpus=2\nirqchip=kernel\nend=exit\nexit=0\n"
    .ascii "console=vCPU 1 started at 0700:0000 in real mode, its APIC id is 1\n"
note_end

    .code32
    .text
    .globl _start
_start:
    mov esi, offset ap_start
    mov edi, AP_PAGE
    mov ecx, offset ap_end - ap_start
    rep movsb
    mov edi, LAPIC
    mov dword ptr [edi + APIC_SVR], APIC_ENABLE         # before this KVM may not know of the other APICs
    mov dword ptr [edi + APIC_ICR2], 1 << 24            # to the APIC with id 1
    mov dword ptr [edi + APIC_ICR], ICR_INIT
    mov dword ptr [edi + APIC_ICR], ICR_SIPI | AP_PAGE >> 12
1:  hlt
    jmp 1b

    .code16
ap_start:
    call 1f
1:  pop bp                      # where this is, as seen from CS
    mov bx, cs
    mov esi, cr0
    lgdtd cs:[gdtr - ap_start]
    mov eax, esi
    or al, 1                    # PE
    mov cr0, eax
    ljmpd 0x08, offset protected
gdtr: .word 0x1f
    .long GDT_GPA
ap_end:

    .code32
protected:
    mov ax, 0x18
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, offset stack_top
    cmp bx, AP_PAGE >> 4
    jne elsewhere
    cmp bp, 3                   # behind the CALL
    jne elsewhere
    test esi, 1                 # CR0.PE
    jnz not_real
    mov ebx, LAPIC
    mov ebx, [ebx + APIC_ID]
    shr ebx, 24
    mov esi, offset text
    call puts
    lea eax, [ebx + '0']
    out dx, al
    mov al, '\n'
    out dx, al
    cmp ebx, 1
    jne wrong_id
    exit 0
elsewhere:
    exit 1
not_real:
    exit 2
wrong_id:
    exit 3

define_puts

text: .asciz "vCPU 1 started at 0700:0000 in real mode, its APIC id is "

    .bss
    .balign 16
    .skip 256
stack_top:
