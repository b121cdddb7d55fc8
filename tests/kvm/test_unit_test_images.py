"""What kvm-unit-tests' x86 images ask of a platform, asked by small guests of our own: those images are in no package.

docs/guests-from-elsewhere.md says which of them uses what.
"""

import pytest

from pykvm import GuestCrash, Machine, asm, probe
from pykvm.needs import unmet
from tests.conftest import TIMEOUT
from tests.kvm.test_cli import run as pykvm

GOOD = 42
COUNT, ACTION = 0x3000, 0x3008  # interrupts so far; what the handler does: lower the line, but not before so many interrupts
IDT, STACK = 0x40000, 0x60000
# Long mode with an IDT, the LAPIC on, the 8259s masked; expect n: so many interrupts since the last time. A failure ends with its number.
PRELUDE = f"""
    .code64
    .set step, 0
    .macro check condition
        .set step, step + 1
        j\\condition 771f
        mov al, step
        out 0xf4, al
771:
    .endm
    .macro expect n
        cmp dword ptr [{COUNT}], \\n
        check e
        mov dword ptr [{COUNT}], 0
    .endm
    .macro line level, number=14
        mov al, \\level
        mov dx, 0x2000 + \\number
        out dx, al
    .endm
    .macro ioapic register, value
        mov ebx, 0xfec00000
        mov dword ptr [rbx], \\register
        mov dword ptr [rbx + 16], \\value
    .endm
    .macro settle                   # where KVM emulates CPL0, an interrupt comes some instructions late
        mov ecx, 2000
772:    pause
        dec ecx
        jnz 772b
    .endm
    .macro handler vector, label
        lea rax, \\label[rip]
        mov ebx, {IDT} + 16 * \\vector
        mov [rbx], ax
        shr rax, 16
        mov word ptr [rbx + 2], 0x10
        mov word ptr [rbx + 4], 0x8e00
        mov [rbx + 6], ax
        mov dword ptr [rbx + 8], 0
    .endm
    mov esp, {STACK}
    handler 0x76, count
    handler 0x66, other
    lidt idtr[rip]
    mov ebx, 0xfee00000
    mov dword ptr [rbx + 0xf0], 0x1ff
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    mov dword ptr [{ACTION}], 0x7fffffff
    sti
    jmp begin
idtr:
    .word 0xfff
    .quad {IDT}
count:
    push rax
    push rdx
    inc dword ptr [{COUNT}]
    mov eax, [{ACTION}]
    cmp [{COUNT}], eax
    jb 1f
    line 0
1:  mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rdx
    pop rax
    iretq
other:
    push rax
    mov eax, [{COUNT}]
    mov [{COUNT} + 16], eax         # how many of the first kind there were before it
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq
begin:
"""
END = f"\n mov al, {GOOD}\n out 0xf4, al\n hlt\n"
EDGE, LEVEL, MASKED = 0x76, 0x8076, 0x10000
PIN14, PIN15 = 0x10 + 2 * 14, 0x10 + 2 * 15


def ends_well(system, code, **options):
    image = asm(PRELUDE + code + END, bits=64, org=0x100000)
    with Machine(image, mode="long", memory="2M", platform="pc-test", system=system, **options) as machine:
        result = machine.run(TIMEOUT)
        assert (result.reason, result.exit_code) == ("exit", GOOD), result.explanation
        return result


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_ioapic(system, irqchip):
    """Its registers, and pin 14 by the test device: edge, masked, two at a time."""
    code = f"""
        ioapic 0, 0xffffffff
        cmp dword ptr [rbx + 16], 0x0f000000    # the ID: four bits can be written
        check e
        mov dword ptr [rbx], 2
        cmp dword ptr [rbx + 16], 0x0f000000    # the arbitration ID follows
        check e
        mov dword ptr [rbx], 1
        mov ecx, [rbx + 16]
        not ecx
        mov [rbx + 16], ecx
        not ecx
        cmp [rbx + 16], ecx                     # the version cannot
        check e
        ioapic 0, 0

        ioapic {PIN14}, {EDGE}
        line 1
        line 0
        settle
        expect 1

        mov dword ptr [{ACTION}], 1             # the handler lowers the line
        ioapic {PIN14}, {EDGE | MASKED}
        line 1
        line 0
        ioapic {PIN14}, {EDGE}
        settle
        expect 0                                # an edge on a masked pin is lost
        line 1
        settle
        expect 1

        mov dword ptr [{ACTION}], 0x7fffffff
        ioapic {PIN14}, {EDGE}
        ioapic {PIN15}, 0x66
        cli
        line 1, 15
        line 0, 15
        line 1
        line 0
        sti
        settle
        expect 1
        cmp dword ptr [{COUNT} + 16], 1         # the higher vector came first
        check e
    """
    ends_well(system, code, irqchip=irqchip)


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_ioapic_levels(system, irqchip):
    """Lowered by the handler, twice in a row, still high after EOI, masked."""
    if irqchip == "kernel" and (why := unmet({"needs": "cpl0"}, system)):
        pytest.skip(f"{why}, and ends a level-triggered interrupt when it is taken")
    code = f"""
        mov dword ptr [{ACTION}], 1             # the handler lowers the line
        ioapic {PIN14}, {LEVEL}
        line 1
        settle
        expect 1
        line 1
        line 1
        settle
        expect 2
        mov dword ptr [{ACTION}], 2             # the first time it stays high
        line 1
        settle
        expect 2
        mov dword ptr [{ACTION}], 1
        ioapic {PIN14}, {LEVEL | MASKED}
        line 1
        settle
        expect 0
        ioapic {PIN14}, {LEVEL}
        settle
        expect 1                                # a level is not
        test dword ptr [rbx + 16], 0x4000
        check e                                 # remote IRR is clear after EOI
    """
    ends_well(system, code, irqchip=irqchip)


def test_what_vmexit_measures(system):
    """The PM timer found by way of the RSDT and a revision 1 FADT, ports without a device, IPIs to itself under TPR and by x2APIC."""
    code = """
        mov eax, 0xf0000
    1:  mov rcx, 0x2052545020445352             # "RSD PTR "
        cmp [rax], rcx
        je 2f
        add eax, 16
        cmp eax, 0x100000
        check b
        jmp 1b
    2:  mov ebx, [rax + 16]
        cmp dword ptr [rbx], 0x54445352         # "RSDT"
        check e
        mov esi, 36
    1:  cmp esi, [rbx + 4]
        check b
        mov edi, [rbx + rsi]
        add esi, 4
        cmp dword ptr [rdi], 0x50434146         # "FACP"
        jne 1b
        mov edx, [rdi + 36]
        cmp dword ptr [rdx], 0x53434146         # "FACS"
        check e
        mov edx, [rdi + 76]
        in eax, dx
        mov ecx, eax
        mov esi, 1000000
    1:  in eax, dx
        cmp eax, ecx
        jne 2f
        dec esi
        jnz 1b
    2:  test esi, esi
        check nz
        mov dx, 0x1234
        in eax, dx
        cmp eax, -1
        check e
        mov dx, 0x4d0                           # ELCR: KVM's
        in al, dx
        xor al, al
        out dx, al
        in al, dx
        test al, al
        check z
        mov eax, 0x400
        mov dr7, rax

        mov ebx, 0xfee00000
        cli
        mov dword ptr [rbx + 0x300], 0x44000 | 0x76
        sti
        settle
        expect 1
        mov eax, 15
        mov cr8, rax
        mov dword ptr [rbx + 0x300], 0x44000 | 0x76
        settle
        expect 0
        xor eax, eax
        mov cr8, rax
        settle
        expect 1
        cli                                     # the handler's EOI is an xAPIC's: off with that
        mov eax, 1
        cpuid
        bt ecx, 21
        check c
        mov ecx, 0x1b
        rdmsr
        or eax, 0x400
        wrmsr
        mov ecx, 0x83f
        mov eax, 0x76
        xor edx, edx
        wrmsr
        mov ecx, 0x823                          # IRR, vectors 0x60 to 0x7f
        rdmsr
        bt eax, 0x16
        check c
    """
    result = ends_well(system, code)
    assert ("pio", 0x1234, 4, False) in result.unclaimed


def test_memory_of_the_test_device(system):
    """Across its pages, by string instructions from its ports, and back."""
    code = f"""
        mov ebx, 0xff000fff
        mov byte ptr [rbx], 0x99
        mov byte ptr [rbx + 1], 0x77
        cmp word ptr [rbx], 0x7799
        check e
        mov word ptr [rbx], 0x88aa
        cmp byte ptr [rbx], 0xaa
        check e
        cmp byte ptr [rbx + 1], 0x88
        check e
        mov ax, 0x9999
        out 0xe0, ax
        mov dx, 0xe0
        mov edi, 0xff000fc0
        mov ecx, 1024
        cld
        rep insb
        mov ebx, 0xff000fc0 + 1023
        cmp byte ptr [rbx], 0x99
        check e
        cmp byte ptr [rbx + 1], 0
        check e
        lea rsi, begin[rip]
        mov ecx, 16
        rep outsb
        in al, 0xe0
        cmp al, begin[rip + 15]
        check e
        std
        lea rsi, begin[rip + 15]
        mov ecx, 16
        rep outsb
        cld
        in al, 0xe8
        cmp al, begin[rip]
        check e
        cmp dword ptr [{COUNT}], 0
        check e
    """
    ends_well(system, code)


def test_a_kernel_at_32_kib_that_goes_to_real_mode(system):
    """By multiboot, below what the loader writes; with 4 GiB segments, an interrupt vector of its own and x87 in real mode."""
    code = """
        .long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), 0x8000, 0x8000, 0, 0x9000, 0x8020
        .code32
        cmp eax, 0x2badb002
        jne fail32
        lgdt [gdtr]
        .byte 0xea
        .long 1f
        .word 8
    fail32:
        mov al, 1
        out 0xf4, al
    gdtr:
        .word 31
        .long gdt
    gdt:
        .quad 0, 0x9b000000ffff, 0x93000000ffff, 0xcf93000000ffff
        .code16
    1:  mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov eax, cr0
        btc eax, 0
        mov cr0, eax
        .byte 0xea
        .word 2f, 0
    2:  xor ax, ax
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov esp, 0x8800
        mov word ptr [4 * 0x11], offset handler
        mov word ptr [4 * 0x11 + 2], 0
        xor bx, bx
        int 0x11
        cmp bx, 7
        jne fail
        mov eax, cr0                    # a limit of 4 GiB stays in GS
        or al, 1
        mov cr0, eax
        mov cx, 0x18
        mov gs, cx
        and al, 0xfe
        mov cr0, eax
        mov edi, 0x110000
        mov dword ptr gs:[edi], 0x12345678
        cmp byte ptr gs:[edi + 3], 0x12
        jne fail
        mov word ptr [0x8700], -1
        fninit
        fnstsw [0x8700]
        cmp word ptr [0x8700], 0
        jne fail
        mov al, 42
        out 0xf4, al
    fail:
        mov al, 2
        out 0xf4, al
    handler:
        mov bx, 7
        iret
    """
    image = asm(code, bits=32, org=0x8000)
    with Machine(image, append="words", memory="2M", system=system) as machine:
        assert machine.info.protocol == "multiboot"
        assert (machine.vcpu.get_sregs().idt.base, machine.vcpu.get_sregs().idt.limit) == (0, 0x3FF)  # which this KVM may not look at
        result = machine.run(TIMEOUT)
        assert (result.reason, result.exit_code) == ("exit", GOOD), result.explanation


MULTIBOOT = ".long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000), 0x100000, 0x100000, 0, 0, 0x100020\n"


def test_what_is_said_of_one_that_has_loaded_no_idt(system):
    if not probe.shutdown_keeps_registers():
        pytest.skip("this host resets the vCPU at a triple fault (probed)")
    image, said = asm(MULTIBOOT + "ud2", bits=32, org=0x100000), r"`ud2` raises #UD.*loaded no IDT: IDTR still holds the real-mode vectors"
    with Machine(image, memory="2M", system=system) as machine, pytest.raises(GuestCrash, match=said):
        machine.run(TIMEOUT)


def test_what_is_said_of_one_that_waits_for_ever(system):
    with Machine(asm(MULTIBOOT + "sti\n hlt\n ud2", bits=32, org=0x100000), memory="2M", system=system) as machine:
        told = "the guest waits in HLT for an interrupt, and none came; it would go on at 0x100022"
        assert any(machine.run(0.1).explanation.startswith(told) for _ in range(20))  # however slow the host


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize(("code", "status"), [(0, 1), (1, 3), (77, 155), (127, 255)])
def test_exit_status(tmp_path, code, status):
    """Passed, failed, skipped and aborted, as those tests tell it to QEMU's isa-debug-exit; with the line that says what the image is."""
    image = tmp_path / "test.flat"
    image.write_bytes(asm(f"{MULTIBOOT} mov eax, {code}\n mov edx, 0xf4\n out dx, eax\n hlt", bits=32, org=0x100000))
    done = pykvm("run", str(image), "--cpus", "2", "--append", "some words", "--initrd", str(image), "--qemu-exit-status")
    assert done.returncode == status
    assert "is taken for multiboot (flat)" in done.stderr and "it has a multiboot header at file offset 0x0" in done.stderr
