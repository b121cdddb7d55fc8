# tsc_deadline: an interrupt at a given value of the time stamp counter, five times, never too early
#
# In this mode of the local APIC's timer a write to the MSR IA32_TSC_DEADLINE arms it, and the interrupt clears the MSR. KVM has it when
# CPUID says so, which is user space's to say: KVM_GET_SUPPORTED_CPUID leaves the bit out.
# Exits: IO out 0x3f8, IO out 0xf4. None for the MSR, the timer or HLT.
# See: SDM vol. 3 section 11.5.4.1 (TSC-deadline mode).
# Exit code: 0; 1 an interrupt came before its deadline; 2 the MSR was not cleared; 3 CPUID has no TSC-deadline mode.

.include "guest.inc"
.include "apic.inc"

note_begin
    .ascii "group=time\nmode=long\nmemory=2M\nirqchip=kernel\nend=exit\nexit=0\nneeds=tsc_deadline\nconsole=5 deadlines met\n"
note_end

.set IA32_TSC_DEADLINE, 0x6e0
.set VECTOR, 0x40
.set AHEAD,  1000000            # ticks of the TSC
.set ROUNDS, 5

# The counter in RAX. Changes RDX.
.macro read_tsc
    rdtsc                       # EDX:EAX
    shl rdx, 32
    or rax, rdx
.endm

    .code64
    .text
    .globl _start
_start:
    mov eax, 1
    xor ecx, ecx
    cpuid
    bt ecx, 24
    jnc no_deadline
    gate VECTOR, on_deadline
    lidt [rip + idtr]
    apic_write APIC_SVR, APIC_ENABLE
    apic_write APIC_LVT_TIMER, TIMER_DEADLINE | VECTOR

    mov ebx, 1                  # the round
1:  read_tsc
    lea r12, [rax + AHEAD]      # the deadline
    mov rax, r12
    mov rdx, r12
    shr rdx, 32
    mov ecx, IA32_TSC_DEADLINE
    wrmsr
    halt_once
    mov ecx, IA32_TSC_DEADLINE
    rdmsr
    or eax, edx
    jnz not_cleared
    inc ebx
    cmp ebx, ROUNDS
    jbe 1b

    mov eax, [rip + interrupts]
    call put_dec
    print " deadlines met\n"
    exit 0
early:
    exit 1
not_cleared:
    exit 2
no_deadline:
    print "no TSC-deadline mode in CPUID\n"
    exit 3

on_deadline:
    read_tsc
    cmp rax, r12
    jb early
    inc dword ptr [rip + interrupts]
    eoi
    return_behind_halt

define_puts
define_put_dec
define_idt 0x41

.lcomm interrupts, 4
