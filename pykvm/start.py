"""How a new machine gets its first state from an image: RAM, the image in it, a command line, CPUID, the registers of the start mode.

A Machine asks its *origin* for these three things, in this order: ``make_memory()``, ``set_cpuid(machine)`` and ``fill(machine)``, the last
when the machine is whole. This is one origin; a saved state is another (state/restore.py).
"""

from __future__ import annotations

from pykvm.errors import GuestImageError
from pykvm.loaders import load
from pykvm.memory import GuestMemory
from pykvm.x86.regs import CR4

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pykvm.config import Config
    from pykvm.loaders.image import ImageInfo
    from pykvm.machine import Machine
    from pykvm.vcpu import VCPU
    from pykvm.x86.cpumodel import CpuModel

    class Origin(Protocol):
        """Where a machine's first state comes from."""

        def make_memory(self) -> GuestMemory:
            """All memory slots."""

        def set_cpuid(self, machine: Machine) -> None:
            """KVM_SET_CPUID2 for each vCPU."""

        def fill(self, machine: Machine) -> None:
            """Memory and registers; sets ``machine.boot``."""


__all__ = ["ImageOrigin"]


class ImageOrigin:
    """A start from an image."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def make_memory(self) -> GuestMemory:
        """RAM as large as the configuration says, and the read-only slot that the image wants."""
        config = self.config
        with config.blames("memory"):
            memory = GuestMemory.of_size(config.memory, config.backing)  # type: ignore[arg-type]
        if config.info.rom is not None:
            try:
                with config.blames():
                    memory.add(*config.info.rom, readonly=True)
            except BaseException:
                memory.close()
                raise
        return memory

    def set_cpuid(self, machine: Machine) -> None:
        """That of the CPU model, by default all that KVM offers."""
        cpu, system, vcpus = self.config.cpu, machine.system, machine.vcpus
        lapic = machine.vm.irqchip != "none"
        if cpu is None and not lapic:  # the way of most guests costs no thought
            machine.vcpu.set_cpuid2(system.get_supported_cpuid().as_guest())
            return
        from pykvm.x86.cpumodel import CpuModel

        with self.config.blames("cpu"):
            model = machine.cpu_model = CpuModel.parse(cpu or "host", system)
            for vcpu in vcpus:
                vcpu.set_cpuid2(model.cpuid(system, vcpu.id, len(vcpus), lapic=lapic))

    def fill(self, machine: Machine) -> None:
        """Load the image and put the first vCPU at its entry."""
        config = self.config
        handover = None
        if config.append or config.modules or config.info.protocol:
            from pykvm.loaders.handover import Handover

            handover = Handover(config.append, config.modules)
        if config.platform != "pykvm":
            firmware = config.info.protocol == "firmware"
            with config.blames("memory", "platform"):
                rsdp = machine.pc.prepare(machine.memory, machine.vm, firmware=firmware)
            _keep_out_of_tables(config.info, machine.pc.tables)
            if handover is not None:
                handover.rsdp = rsdp
        boot = machine.boot = load(config.info, config.data, machine.memory, config.entry, handover)
        with config.blames("entry"):
            config.mode.apply(machine.vcpu, machine.memory, boot.entry, boot.registers)
        if machine.cpu_model is not None and config.cpu is not None:
            _limit_xcr0(machine.vcpu, machine.cpu_model)


def _limit_xcr0(vcpu: VCPU, model: CpuModel) -> None:
    """XSAVE's components that the model has no feature of stay off, also where KVM gives the guest more than it was asked for."""
    if vcpu.get_sregs().cr4 & CR4.OSXSAVE:
        off = (0xE0 if "avx512f" not in model.features else 0) | (0xE4 if "avx" not in model.features else 0)
        xcrs = vcpu.get_xcrs()
        xcrs.cdata.xcrs[0].value &= ~off
        vcpu.set_xcrs(xcrs)


def _keep_out_of_tables(info: ImageInfo, tables: list[tuple[int, int]]) -> None:
    """The tables only, not all of the BIOS area: a linker that puts an image at 1 MiB likes to put its ELF header just below."""
    for s in info.segments:
        for start, end in tables:
            if s.gpa < end and s.gpa + s.memsz > start:
                why = f"it covers gpa {max(s.gpa, start):#x}, where the platform has its tables: link it elsewhere, or use --platform pykvm"
                raise GuestImageError(info.path, s.header, why)
