"""A whole machine: RAM, vCPUs, an irqchip, the platform's devices and an image, wired together.

>>> with pykvm.Machine("hello") as m:
...     r = m.run(timeout=5)
...     print(r.console, r.exits)
"""

from __future__ import annotations

import os
from _thread import RLock

from pykvm.bus import Bus, Native
from pykvm.config import Config
from pykvm.console import Console
from pykvm.errors import ConfigError, GuestCrash
from pykvm.lifetime import Closes
from pykvm.memory import GuestMemory
from pykvm.pc import Board, Pc
from pykvm.platform import EXCEPTION_REPORT, HYPERCALL_GPA, HYPERCALL_PORT, IOAPIC_GPA
from pykvm.result import Result
from pykvm.runner import WATCHFUL, Runner, Stop
from pykvm.saveable import Saveable
from pykvm.smp import DeviceLock, VcpuGroup
from pykvm.start import ImageOrigin
from pykvm.system import System
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Literal

    from pykvm.bus import Device, Range, Space
    from pykvm.debug.translate import Translation
    from pykvm.devices.ioapic import Ioapic
    from pykvm.exits import InternalError
    from pykvm.irq import EventFd, IrqLine
    from pykvm.ledger import Ledger
    from pykvm.loaders.image import BootState
    from pykvm.memory import MemSlot
    from pykvm.msrs import MsrHandlers
    from pykvm.records import RecordRing, StatRow, Stats
    from pykvm.services import Services
    from pykvm.start import Origin
    from pykvm.symbols import Symbols
    from pykvm.vcpu import VCPU
    from pykvm.x86.assist import Assist
    from pykvm.x86.cpumodel import CpuModel

__all__ = ["Machine", "Result"]


class Machine(Saveable, Closes):
    """A guest, a context manager.

    ``image``: the name of a gallery guest, a path (anything with a ``/`` or a file that exists), or the bytes of an image.
    ``memory``: bytes or "16M"; by default what the image's note asks for. ``mode``: "auto", "real", "protected", "long", "user".
    ``backing``: where RAM comes from (GuestMemory.add): "anonymous", "memfd" or "hugetlb".
    ``format``: "auto", or one of loaders.FORMATS, to insist on it; ``info.why`` says why it is what it is.
    ``entry``: gpa to start at instead of the image's own. ``append``: a command line: RSI points at it, or the image's boot protocol says.
    ``initrd``: modules for multiboot, PVH and Linux images: "FILE" or "FILE its own command line", or bytes.
    ``cpus``: vCPUs; those after the first wait for INIT and SIPI. ``pin``: each on a host CPU of its own. ``irqchip``: "none", "kernel"
    (PIC, IOAPIC, LAPICs and PIT in KVM) or "split" (LAPICs in KVM, the IOAPIC here); what the note asks for, else none, but with several
    vCPUs "kernel". ``cpu``: a CPU model (x86.cpumodel.CpuModel.parse), by default all that KVM offers.
    ``platform``: "pykvm", or "pc-test", which is what kernels and firmware made for QEMU expect (pctest.py; its irqchip is
    "kernel"): the choice of images with a boot protocol.
    ``loop``: "native" or "python". ``stats``: record every exit. ``ledger``: keep every record, so many for each vCPU (True: 2**20), for
    the attribute ``ledger``. ``strict``: an access that nobody claims is a crash. ``assist``: finish instructions
    that KVM's emulator does not know (x86/assist/); False: they are a crash.
    ``on_output``: called with bytes as the guest prints; ``poll_input``: called for console input, returns bytes. ``on_heartbeat`` (an
    attribute): called ten times a second or more while the guest runs.

    The parts are attributes: ``system``, ``vm``, ``vcpus``, ``vcpu`` (the first), ``memory``, ``bus``,
    ``uart``, ``console``, ``post``, ``rtc``, ``debug_port`` (what firmware logs, a Console), ``info``, ``pc`` (the platform's devices).
    Raises GuestImageError, ConfigError, KvmUnavailableError, KvmError.
    """

    def __init__(
        self,
        image: str | os.PathLike[str] | bytes,
        *,
        memory: int | str | None = None,
        backing: Literal["anonymous", "memfd", "hugetlb"] = "anonymous",
        mode: str = "auto",
        entry: int | None = None,
        append: str = "",
        format: str = "auto",
        initrd: Sequence[str | bytes] = (),
        cpus: int | None = None,
        pin: bool = False,
        irqchip: Literal["none", "kernel", "split"] | None = None,
        cpu: str | None = None,
        platform: Literal["pykvm", "pc-test"] | None = None,
        loop: str = "native",
        stats: bool = False,
        ledger: int | bool = False,
        strict: bool = False,
        assist: bool = True,
        on_output: Callable[[bytes], object] | None = None,
        poll_input: Callable[[], bytes] | None = None,
        system: System | None = None,
    ) -> None:
        config = Config.of_image(
            image,
            mode,
            format,
            memory=memory,
            backing=backing,
            entry=entry,
            append=append,
            initrd=initrd,
            cpus=cpus,
            irqchip=irqchip,
            cpu=cpu,
            platform=platform,
            strict=strict,
            assist=assist,
        )
        self._make(
            config,
            ImageOrigin(config),
            pin=pin,
            loop=loop,
            stats=stats,
            ledger=ledger,
            on_output=on_output,
            poll_input=poll_input,
            system=system,
        )

    @classmethod
    def of_config(cls, config: Config, **options: Any) -> Machine:
        """A machine as ``config`` says, such as another one's; ``options``: pin, loop, stats, ledger, on_output, poll_input, system."""
        machine = cls.__new__(cls)
        machine._make(config, ImageOrigin(config), **options)
        return machine

    # --- wiring ------------------------------------------------------------------------------------------------------

    def _make(
        self,
        config: Config,
        origin: Origin,
        *,
        pin: bool = False,
        loop: str = "native",
        stats: bool = False,
        ledger: int | bool = False,
        on_output: Callable[[bytes], object] | None = None,
        poll_input: Callable[[], bytes] | None = None,
        system: System | None = None,
    ) -> None:
        """All of a machine, in the order in which KVM wants it; ``origin`` brings its first state (start.py)."""
        self._closed = False
        self._stats: Stats | None = None
        self._ledger: Ledger | None = None
        self.services: Services | None = None
        self.waiting_devices: dict[tuple[str, int], dict[str, Any]] = {}  # by space and base: rows of a saved state
        self._assist: Assist | None = None
        self._lines: dict[int, IrqLine] = {}  # by GSI: who asks for one twice gets the same
        self._running, self._clock_lock = False, RLock()
        self.on_heartbeat: Callable[[], object] | None = None
        self.msrs: MsrHandlers | None = None
        self.ioapic: Ioapic | None = None
        self.cpu_model: CpuModel | None = None
        self.config, self.info, self.cpus, self.strict = config, config.info, config.cpus, config.strict
        self.boot: BootState
        self._own_system = system is None
        self.system = System() if system is None else system
        self.memory = GuestMemory()
        try:
            self.memory = origin.make_memory()
            self.vm = self.system.create_vm()
            self.vm.add_memory(self.memory)  # before the irqchip: a slot waits for what KVM has to tidy up after making one, some ms
            self._add_irqchip(config.irqchip, config.platform)
            self._add_vcpus(origin)
            self.console = Console(on_output=on_output)
            self.bus = Bus()
            self._add_platform(poll_input)
            self._add_rom()
            self._add_runners(loop, stats, ledger, pin)
            if self.info.note.get("hypercalls") == "yes":
                self._add_services()
            origin.fill(self)
        except BaseException:
            self.close()
            raise

    @property
    def data(self) -> bytes:
        """The image's bytes."""
        return self.config.data

    def _add_irqchip(self, chip: str, platform: str) -> None:
        if chip == "kernel":
            self.vm.create_irqchip()
            self.vm.create_pit2()
            if platform == "pc-test":
                from pykvm.pctest import gsi_routes

                self.vm.set_gsi_routing(gsi_routes())
        elif chip == "split":
            from pykvm.devices.ioapic import Ioapic
            from pykvm.irq import Route

            self.vm.create_split_irqchip()
            self.ioapic = Ioapic(
                self.vm.signal_msi, lambda entries: self.vm.set_gsi_routing(Route.to_msi(pin, *message) for pin, message in entries.items())
            )

    def _add_vcpus(self, origin: Origin) -> None:
        for id in range(self.cpus):
            self.vm.create_vcpu(id)
        self.vcpus: list[VCPU] = self.vm.vcpus
        self.vcpu = self.vcpus[0]
        origin.set_cpuid(self)
        if self.cpus > 1:
            # KVM's map of APIC ids lacks the newest vCPU until some LAPIC changes: INIT and SIPI to it would be lost.
            self.vcpus[-1].set_lapic(self.vcpus[-1].get_lapic())

    def _add_runners(self, loop: str, stats: bool, ledger: int | bool, pin: bool) -> None:
        """One for each vCPU; what they share is the bus and, where there are several, a lock."""
        if stats:
            self._enable_stats()
        if ledger is not False:
            from pykvm.ledger import Ledger

            self._ledger = Ledger.of_machine(self, ledger)
        lock = DeviceLock() if self.cpus > 1 else None
        self.runners = [Runner(vcpu, self.bus, loop, self._new_ring(vcpu.id), lock) for vcpu in self.vcpus]
        self.runner = self.runners[0]
        in_kernel = self.vm.irqchip != "none"
        for runner in self.runners:
            if self._ledger is None:
                runner.on_records = self._take_records
            if in_kernel:
                runner.heartbeat = WATCHFUL
            if self.ioapic is not None:
                runner.on_eoi = self.ioapic.eoi
            if self.config.assist:
                runner.on_emulation_failure = self._finish
        self.runner.on_heartbeat = self._tick
        self.bus.on_change = self._on_bus_change
        self.group = VcpuGroup(self.runners, watch_idle=in_kernel, pin=pin)
        self.pc.wake = lambda: self.runner.post(self._wake_up)
        self.group.sleeps(lambda: self.pc.asleep, self._fall_asleep)

    def _finish(self, vcpu: VCPU, error: InternalError) -> bool:
        """KVM has given up on an instruction: whether it is done now."""
        if self._assist is None:
            from pykvm.x86.assist import Assist

            self._assist = Assist(self.memory, self.bus)
        return self._assist.finish(vcpu, error)

    def _tick(self) -> None:
        """Between two entries of vCPU 0, now and then: time passes for devices, and input comes in."""
        self.runner.holding(self.pc.tick)
        if self.on_heartbeat is not None:
            self.on_heartbeat()

    def _on_bus_change(self) -> None:
        for runner in self.runners:
            runner.sync_table()

    def _add_services(self) -> None:
        from pykvm.devices.hypercall import LENGTH, HypercallPort
        from pykvm.services import Services

        self.services = Services(self)
        port = HypercallPort(self.services.call)
        self.bus.pio.add(HYPERCALL_PORT, LENGTH, port)
        self.bus.mmio.add(HYPERCALL_GPA, LENGTH, port)
        self.on_hypercall(self.services.vmcall)

    def _add_platform(self, poll_input: Callable[[], bytes] | None) -> None:
        irq = self.irq if self.vm.irqchip != "none" else None
        platform: type[Pc] = Pc
        if self.config.platform == "pc-test":
            from pykvm.pctest import PcTest

            platform = PcTest
        self.pc = platform(Board(self.bus, self.memory, self.console, self.stop, irq, poll_input, self.cpus))
        self.uart, self.post, self.rtc, self.debug_port = self.pc.uart, self.pc.post, self.pc.rtc, self.pc.debug_port
        if self.info.mode == "user":
            from pykvm.devices.exceptionreport import ExceptionReport

            self.bus.pio.add(EXCEPTION_REPORT, 4, ExceptionReport(self.stop))
        if self.ioapic is not None:
            self.bus.mmio.add(IOAPIC_GPA, PAGE_SIZE, self.ioapic)
        if self.strict:
            self.bus.on_unclaimed = lambda space, at, size, is_write, value: self.stop("crash")

    def _add_rom(self) -> None:
        """Writes to read-only slots vanish."""
        for slot in self.memory.slots:
            if slot.readonly:
                from pykvm.devices.rom import Rom

                with self.config.blames():
                    self.bus.mmio.add(slot.gpa, slot.size, Rom(), native=Native.IGNORE)

    def add_device(
        self,
        device: Device,
        *,
        port: int | None = None,
        gpa: int | None = None,
        length: int = 1,
        eventfd: EventFd | None = None,
        datamatch: int | None = None,
        coalesced: bool = False,
        **options: Any,
    ) -> Range:
        """Register a device of your own at an I/O ``port`` or at a ``gpa``, for ``length`` ports or bytes.

        ``eventfd``: a write of ``length`` bytes at its base (of the value ``datamatch``, when given) signals it and does not exit; what
        else the guest does there reaches the device. ``coalesced``: writes wait in the kernel until the guest exits for another reason, and
        reach the device before that exit is handled, in the guest's order.
        In a restored machine, a device whose like was there when it was saved gets that one's state, with ``load(state)``.
        Raises DeviceOverlapError, CapabilityError, and ConfigError when it lies inside RAM, where it would never be asked.
        """
        if (port is None) == (gpa is None):
            raise ConfigError("give a device either port= or gpa=")
        space: Space = self.bus.mmio if port is None else self.bus.pio
        at: int = gpa if port is None else port  # type: ignore[assignment]
        if port is None:
            self._check_outside_ram(at, length)
        claimed = space.add(at, length, device, **options)
        try:
            if eventfd is not None:
                self.vm.ioeventfd(space.name, at, length, eventfd.fd, datamatch)
                claimed.undo.append(lambda: self.vm.ioeventfd(space.name, at, length, eventfd.fd, datamatch, remove=True))
            if coalesced:
                self.vm.coalesce(space.name, at, length)
                claimed.undo.append(lambda: self.vm.coalesce(space.name, at, length, remove=True))
                for vcpu in self.vcpus:
                    vcpu.want_coalesced()
            self._give_state(space.name, at, device)
        except BaseException:
            self.remove_device(claimed)
            raise
        return claimed

    def remove_device(self, claimed: Range) -> None:
        """Take back what add_device() returned."""
        for undo in reversed(claimed.undo):
            undo()
        claimed.undo.clear()
        (self.bus.pio if claimed in self.bus.pio.ranges else self.bus.mmio).remove(claimed)

    def _check_outside_ram(self, gpa: int, length: int) -> None:
        for slot in self.memory.slots:
            if gpa < slot.gpa + slot.size and slot.gpa < gpa + length and not slot.readonly:
                raise ConfigError(
                    f"gpa {gpa:#x} is inside {slot!r}: an access there never exits; choose one outside RAM, such as 0xd0000000"
                )

    def add_memory(self, gpa: int, size: int, **options: Any) -> MemSlot:
        """One more memory slot (GuestMemory.add), given to KVM at once: ROM with ``readonly=True``, shared files, ..."""
        slot = self.memory.add(gpa, size, **options)
        try:
            self.vm.add_slot(slot)
        except BaseException:
            self.memory.remove(slot)
            raise
        return slot

    def move_slot(self, slot: MemSlot) -> MemSlot:
        """Give a slot other host memory with the same content (GuestMemory.replace); the guest cannot tell. No vCPU may be in the guest."""
        if self.cpus > 1 and not self.group.paused:
            raise ConfigError("other vCPUs may be using the slot: pause() the machine first")
        self.vm.remove_slot(slot)
        try:
            slot = self.memory.replace(slot)
        finally:
            self.vm.add_slot(slot)
        return slot

    # --- interrupts, hypercalls, MSRs --------------------------------------------------------------------------------

    def irq(self, gsi: int) -> IrqLine:
        """The line of a GSI, each time the same; a device takes its ``set`` as its ``irq``. Raises ConfigError without an irqchip."""
        from pykvm.irq import IOAPIC_PINS, IrqLine

        if self.vm.irqchip == "none":
            raise ConfigError("this machine has no irqchip: make it with irqchip='kernel' or 'split', or use interrupt(vector)")
        if not 0 <= gsi < IOAPIC_PINS:
            raise ConfigError(f"the irqchip has GSIs 0 to {IOAPIC_PINS - 1}, not {gsi}")
        line = self._lines.get(gsi)
        if line is None:
            drive = self.vm.irq_line if self.ioapic is None else self.ioapic.set_line
            line = self._lines[gsi] = IrqLine(gsi, lambda level: drive(gsi, level))
        return line

    def interrupt(self, vector: int, cpu: int = 0) -> None:
        """Without an irqchip: deliver ``vector`` as soon as the vCPU can take it. From any thread; several wait in line."""
        if self.vm.irqchip != "none":
            raise ConfigError("with an irqchip, interrupts come through it: use irq(gsi) or vm.signal_msi()")
        self._runner(cpu).interrupt(vector)

    def nmi(self, cpu: int = 0) -> None:
        """A non-maskable interrupt. From any thread (KVM_CAP_USER_NMI)."""
        runner = self._runner(cpu)
        runner.post(runner.vcpu.nmi)

    def inject_exception(self, vector: int, error_code: int | None = None, cpu: int = 0) -> None:
        """The guest takes an exception before its next instruction. From any thread."""
        if not 0 <= vector < 32:
            raise ConfigError(f"exceptions have vectors 0 to 31, not {vector}")
        runner = self._runner(cpu)
        runner.post(lambda: runner.vcpu.inject_exception(vector, error_code))

    def _runner(self, cpu: int) -> Runner:
        if not 0 <= cpu < self.cpus:
            raise ConfigError(f"this machine has vCPUs 0 to {self.cpus - 1}, not {cpu}")
        return self.runners[cpu]

    def on_hypercall(self, call: Callable[[int, tuple[int, ...]], int]) -> None:
        """``call(number, arguments)`` answers the hypercalls that KVM passes on, where it can (KVM_CAP_EXIT_HYPERCALL)."""
        for runner in self.runners:
            runner.on_hypercall = call
        mask = self.vm.check_extension("KVM_CAP_EXIT_HYPERCALL")
        if mask:
            self.vm.enable_cap("KVM_CAP_EXIT_HYPERCALL", mask)

    def on_msr(self, index: int, read: Callable[[], int | None] | None = None, write: Callable[[int], object] | None = None) -> None:
        """Answer an MSR here: ``read()`` gives its value, ``write(value)`` takes one; without them the guest gets #GP (msrs.py)."""
        from pykvm.msrs import MsrHandlers

        if self.msrs is None:
            self.msrs = MsrHandlers(self.vm)
            for runner in self.runners:
                runner.msrs = self.msrs
        self.msrs.on(index, read, write)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None, *, explain: bool = True) -> Result:
        """Run until the guest stops, or for ``timeout`` seconds. May be called again to go on.

        ``explain``: say where a time limit found it.

        Raises GuestCrash, with the explanation and the result so far, when the guest cannot go on; and whatever a device raises.
        """
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"a time limit of {timeout} seconds: give a positive number, or None for no limit")
        if self._closed:
            raise ConfigError("the machine is closed")
        self._check_here()
        if self._ledger is not None:
            self._ledger.begin_run()
        self._turn_clock(running=True)
        try:
            stop = self.group.run(timeout)
        finally:
            self._turn_clock(running=False)
            if self._ledger is not None:
                self._ledger.end_run()
        result = Result(self, stop)
        if stop.reason == "crash" or (stop.reason == "timeout" and explain):
            from pykvm.debug.explain import explain_stop

            result.explanation = explain_stop(self, stop)
        if stop.reason == "crash":
            raise GuestCrash(result.explanation, result)
        return result

    def result(self, reason: str = "stopped") -> Result:
        """What there is so far, between runs."""
        return Result(self, Stop(reason))

    def stop(self, reason: str = "stopped", code: int | None = None) -> None:
        """End the run, from a device or another thread; ``reason`` becomes the result's."""
        self.group.stop(reason, code)

    def pause(self) -> None:
        """From another thread: the vCPUs leave the guest and wait until resume(); kvmclock and the run's time limit wait too."""
        self.group.pause()
        self._turn_clock()

    def resume(self) -> None:
        """Go on after pause()."""
        self._check_here()
        self.handed_to = None
        self._turn_clock(paused=False)
        self.group.resume()

    def exit_counts(self) -> dict[int, int]:
        """Exits of all vCPUs, by number of their reason."""
        counts: dict[int, int] = {}
        for vcpu in self.vcpus:
            for reason, n in enumerate(vcpu.native.counts):
                if n:
                    counts[reason] = counts.get(reason, 0) + n
        return counts

    def assisted(self) -> dict[str, int]:
        """Instructions that KVM's emulator did not know and user space has finished, by mnemonic."""
        return {} if self._assist is None else dict(self._assist.counts)

    def why_not_assisted(self, vcpu: VCPU) -> str:
        """Why the instruction that KVM last gave up on was not finished; empty when nobody tried."""
        return "" if self._assist is None else self._assist.declined.get(vcpu.id, "")

    def insn_rip(self) -> int | None:
        """The linear address of the instruction that made the last exit, wherever this host's KVM has left RIP; None when unknown."""
        from pykvm.debug.insn import insn_rip
        from pykvm.exits import decode
        from pykvm.x86.view import CpuView

        return insn_rip(CpuView(self.vcpu, self.memory), decode(self.vcpu.native))

    def walk(self, gva: int, access: str = "", user: bool | None = None, cpu: int = 0) -> Translation:
        """VCPU.walk() of vCPU ``cpu``, which also names the device where no memslot is."""
        from pykvm.debug.translate import Translator

        def device_at(gpa: int) -> str:
            claimed = self.bus.mmio.find(gpa, 1)
            return "" if claimed is None else claimed.name

        return Translator(self._runner(cpu).vcpu, self.memory, device_at).walk(gva, access, user)

    def symbols(self) -> Symbols:
        """The image's symbols; empty for a flat image."""
        from pykvm.symbols import Symbols

        return Symbols.from_elf(self.data, self.info.path) if self.info.format.startswith("ELF") else Symbols({})

    # --- records -----------------------------------------------------------------------------------------------------

    def _enable_stats(self) -> None:
        from pykvm.records import Stats

        khz = self.vcpu.get_tsc_khz() if self.system.check_extension("KVM_CAP_GET_TSC_KHZ") else 0
        self._stats = Stats(khz)

    def _new_ring(self, vcpu: int) -> RecordRing | None:
        if self._ledger is not None:
            return self._ledger.ring(vcpu)
        if self._stats is None:
            return None
        from pykvm.records import RecordRing

        return RecordRing()

    def _take_records(self, ring: RecordRing) -> None:
        assert self._stats is not None
        for record in ring.drain():
            self._stats.add(record)

    def stats_rows(self) -> list[StatRow] | None:
        """The rows of ``--stats``, or None without ``stats=True``. With a ledger they are made from what it has."""
        if self._stats is None:
            return None
        return self._stats.rows if self._ledger is None else self._ledger.stat_rows()

    @property
    def ledger(self) -> Ledger:
        """The records of all exits (ledger.py), with ``ledger=True`` or a number of records. Raises ConfigError without."""
        if self._ledger is None:
            raise ConfigError("this machine keeps no ledger: make it with ledger=True")
        return self._ledger

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close vCPU, VM and /dev/kvm, then let go of the memory."""
        self._forget()
        if hasattr(self, "vm"):
            self.vm.close()
        self._closed = True
        if self.services is not None:
            self.services.close()
        if self._assist is not None:
            self._assist.close()
        self.memory.close()
        if self._own_system:
            self.system.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else repr(self.vcpu)
        name = os.path.basename(self.info.path).removesuffix(".elf")
        return f"<Machine {name}: {self.info.mode} mode, {self.memory!r}, {state}>"
