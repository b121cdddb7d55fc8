# kvmclock: nanoseconds without an exit, from the TSC and a structure that KVM keeps up to date in guest memory
#
# KVM writes the structure with its version odd meanwhile: who reads it, looks at the version before and after. The time is
# system_time + ((TSC - tsc_timestamp) << tsc_shift) * mul >> 32, with a negative shift to the right. It never goes back on one vCPU, also
# across exits. The wall clock at boot is another such structure, which KVM writes when the guest asks.
# Exits: IO out 0xe0, 100 times, between two readings; IO out 0x3f8; IO out 0xf4. None for the clock's MSRs.
# See: Linux Documentation/virt/kvm/x86/msr.rst (MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_WALL_CLOCK_NEW) and cpuid.rst.
# Exit code: 0; 1 the clock went back; 2 it stood still; 3 CPUID has no kvmclock; 4 there is no wall clock.

.include "guest.inc"

note_begin
    .ascii "group=time\nmode=long\nmemory=2M\nend=exit\nexit=0\nconsole=100 readings, the last one \n"
note_end

.set WALL_CLOCK_NEW,  0x4b564d00
.set SYSTEM_TIME_NEW, 0x4b564d01
.set ROUNDS, 100

    .code64
    .text
    .globl _start
_start:
    mov eax, 0x40000001         # KVM's features
    cpuid
    bt eax, 3                   # KVM_FEATURE_CLOCKSOURCE2: these MSRs
    jnc missing
    lea rax, [rip + clock]
    or eax, 1                   # enable
    xor edx, edx
    mov ecx, SYSTEM_TIME_NEW
    wrmsr

    call now
    mov r12, rax                # the first
    mov r13, rax                # the one before
    mov ebx, ROUNDS
1:  out SCRATCH_PORT, al
    call now
    cmp rax, r13
    jb back
    mov r13, rax
    dec ebx
    jnz 1b
    sub rax, r12
    jz stands
    push rax
    print "100 readings, the last one "
    pop rax
    call put_dec
    print " ns after the first\n"

    lea rax, [rip + wall]
    xor edx, edx
    mov ecx, WALL_CLOCK_NEW
    wrmsr
    mov eax, [rip + wall + 4]   # seconds; nanoseconds follow
    test eax, eax
    jz no_wall_clock
    call put_dec
    print " s after 1970 at boot\n"
    exit 0
back:
    exit 1
stands:
    exit 2
missing:
    exit 3
no_wall_clock:
    exit 4

# Nanoseconds in RAX. Changes RCX, RDX, RSI, RDI.
now:
    lea rsi, [rip + clock]
1:  mov edi, [rsi]              # version
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [rsi + 8]          # tsc_timestamp
    mov cl, [rsi + 28]          # tsc_shift, signed
    test cl, cl
    js 2f
    shl rax, cl
    jmp 3f
2:  neg cl
    shr rax, cl
3:  mov edx, [rsi + 24]         # tsc_to_system_mul
    mul rdx
    shrd rax, rdx, 32           # the product's middle
    add rax, [rsi + 16]         # system_time
    test edi, 1                 # KVM was writing,
    jnz 1b
    cmp edi, [rsi]              # or has written since
    jne 1b
    ret

define_puts
define_put_dec

    .bss
    .balign 64
clock: .skip 32                 # struct pvclock_vcpu_time_info
wall:  .skip 12                 # struct pvclock_wall_clock: version, sec, nsec
