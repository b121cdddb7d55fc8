"""The two emulators behind one interface: which CPU models they offer, and the command line that boots one.

QEMU's TCG emulates AMD-V with nested paging, Bochs emulates VT-x with EPT. Both get two disks (root image, exchange disk), a serial
console that goes to a file, and a second serial port connected to a TCP socket of ours on the loopback.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from pykvm.errors import HostError
from pykvm.hosts.cache import cached
from pykvm.hosts.debian import Kernel, Missing, require_commands

__all__ = ["ALIASES", "Bochs", "Emulator", "Model", "Qemu", "model_named", "models"]

ALIASES = {"amd": "max", "intel": "corei7_skylake_x"}
# VT-x or AMD-V per model, where the emulator's own list does not say. Bochs' manual, "CPU and CPUID options".
_BOCHS_AMD = ("amd", "athlon", "turion", "phenom", "zambezi", "trinity", "ryzen")
_BOCHS_WITHOUT = (
    "pentium",
    "amd_k6",
    "p2_",
    "p3_",
    "p4_willamette",
    "atom",
    "athlon64_clawhammer",
    "bx_generic",
    "p4_prescott",
    "core_duo",
)
_BOCHS_WITHOUT_EPT = ("core2_penryn",)


class Model:
    """A CPU model: ``name``, the ``emulator`` that has it, and its ``virtualization`` ("AMD-V", "VT-x" ... or "none")."""

    __slots__ = ("emulator", "name", "virtualization")

    def __init__(self, name: str, emulator: str, virtualization: str) -> None:
        self.name, self.emulator, self.virtualization = name, emulator, virtualization

    def __repr__(self) -> str:
        return f"<Model {self.name}: {self.emulator}, {self.virtualization}>"


class Plan:
    """What an emulator is to boot."""

    def __init__(
        self, folder: Path, kernel: Kernel, initrd: Path, root: Path, exchange: Path, options: str, memory: int, cpus: int, port: int
    ) -> None:
        self.folder, self.kernel, self.initrd, self.root, self.exchange = folder, kernel, initrd, root, exchange
        self.options, self.memory, self.cpus, self.port = options, memory, cpus, port  # kernel options; bytes; vCPUs; our TCP port
        self.console = folder / "console.log"


class Emulator:
    """``command(model, plan)`` is what to start; ``models()`` asks the installed program."""

    name = ""
    packages: dict[str, str] = {}

    def require(self) -> None:
        """Missing, with the apt line, when something is not installed."""
        require_commands(self.packages, f"the {self.name} host")

    def installed(self) -> bool:
        """Whether all of its commands are there."""
        return all(shutil.which(command) for command in self.packages)

    def models(self) -> list[Model]:
        """What the installed emulator offers."""
        raise NotImplementedError

    def command(self, model: str, plan: Plan) -> list[str]:
        """The command line; files that it needs are written to the plan's folder."""
        raise NotImplementedError


class Qemu(Emulator):
    """QEMU with its TCG: AMD-V with NPT for every model that TCG can give svm."""

    name = "QEMU"
    packages = {"qemu-system-x86_64": "qemu-system-x86"}

    def models(self) -> list[Model]:
        listed = subprocess.run(["qemu-system-x86_64", "-cpu", "help"], capture_output=True, text=True, check=False).stdout
        found = []
        for line in listed.splitlines():
            match = re.match(r"x86\s+(\S+)\s*(.*)", line)
            if match and not match[1].startswith(("host", "base")):
                amd = match[1] == "max" or "AMD" in match[2] or match[1].startswith(("EPYC", "Opteron", "phenom", "athlon"))
                found.append(Model(match[1], self.name, "AMD-V, NPT" if amd else "none in TCG"))
        return found

    def command(self, model: str, plan: Plan) -> list[str]:
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", model if model == "max" else f"{model},+svm,+npt",
            "-m", f"{plan.memory >> 20}M", "-smp", str(plan.cpus), "-display", "none", "-nodefaults", "-no-reboot", "-no-user-config",
            "-kernel", str(plan.kernel.image), "-initrd", str(plan.initrd), "-append", plan.options,
            "-serial", f"file:{plan.console}",
            "-chardev", f"socket,id=wire,host=127.0.0.1,port={plan.port}", "-serial", "chardev:wire",
            "-drive", f"file={plan.root},format=raw,if=ide,index=0,snapshot=on",
            "-drive", f"file={plan.exchange},format=raw,if=ide,index=1",
        ]  # fmt: skip


class Bochs(Emulator):
    """Bochs: VT-x with EPT (and AMD-V for some models), instruction by instruction."""

    name = "Bochs"
    packages = {
        "bochs": "bochs bochs-term bochsbios vgabios",
        "grub-mkrescue": "grub-common grub-pc-bin mtools",
        "xorriso": "xorriso",
        "mformat": "mtools",
    }

    def models(self) -> list[Model]:
        said = subprocess.run(["bochs", "--help", "cpu"], capture_output=True, text=True, check=False)
        text = said.stdout + said.stderr
        return [Model(name, self.name, self._virtualization(name)) for name in re.findall(r"^([a-z][a-z0-9_]+)$", text, re.MULTILINE)]

    @staticmethod
    def _virtualization(name: str) -> str:
        if name.startswith(_BOCHS_WITHOUT):
            return "none"
        if name.startswith(_BOCHS_AMD):
            return "AMD-V, NPT" if name.startswith(("phenom", "zambezi", "trinity", "ryzen")) else "AMD-V"
        return "VT-x" if name.startswith(_BOCHS_WITHOUT_EPT) else "VT-x, EPT"

    def command(self, model: str, plan: Plan) -> list[str]:
        # Bochs leaves a lock beside each image, so each session has names of its own for them.
        root = plan.folder / "root.img"
        root.symlink_to(plan.root)
        (plan.folder / "bochsrc").write_text(
            f"""
cpu: model={model}, count={plan.cpus}, ips=50000000, reset_on_triple_fault=0
megs: {plan.memory >> 20}
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
boot: cdrom
clock: sync=none, time0=local
display_library: rfb, options="timeout=0"
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=cdrom, path={self._iso(plan)}, status=inserted
ata0-slave: type=disk, mode=flat, path={root}
ata1-master: type=disk, mode=flat, path={plan.exchange}
com1: enabled=1, mode=file, dev={plan.console}
com2: enabled=1, mode=socket-client, dev=127.0.0.1:{plan.port}
log: {plan.folder}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
""".lstrip()
        )
        (plan.folder / "continue").write_text("c\n")  # Debian's Bochs starts in its debugger
        return ["bochs", "-q", "-f", str(plan.folder / "bochsrc"), "-rc", str(plan.folder / "continue")]

    def _iso(self, plan: Plan) -> Path:
        """A bootable CD of kernel, initramfs and options, cached by those."""
        import hashlib

        key = hashlib.sha256(f"{plan.kernel.version} {plan.initrd} {plan.options}".encode()).hexdigest()[:16]

        def make(folder: Path) -> None:
            grub = folder / "tree" / "boot" / "grub"
            grub.mkdir(parents=True)
            shutil.copy(plan.kernel.image, folder / "tree" / "boot" / "vmlinuz")
            shutil.copy(plan.initrd, folder / "tree" / "boot" / "initrd.gz")
            (grub / "grub.cfg").write_text(f"set timeout=0\nlinux /boot/vmlinuz {plan.options}\ninitrd /boot/initrd.gz\nboot\n")
            made = subprocess.run(
                ["grub-mkrescue", "-o", str(folder / "boot.iso"), str(folder / "tree"), "--", "-volid", "PYKVM"],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
            if made.returncode:
                raise HostError(f"grub-mkrescue failed: {(made.stderr.strip().splitlines() or ['no message'])[-1]}")
            shutil.rmtree(folder / "tree")

        return cached(f"iso-{key}", make) / "boot.iso"


EMULATORS: tuple[Emulator, ...] = (Qemu(), Bochs())


def models() -> list[Model]:
    """All models of the installed emulators."""
    return [model for emulator in EMULATORS if emulator.installed() for model in emulator.models()]


def model_named(name: str) -> tuple[Emulator, str]:
    """(emulator, its model) for "amd", "intel" or a model's own name. Raises Missing: unknown, or its emulator is not installed."""
    if name in ALIASES:
        emulator = EMULATORS[0] if name == "amd" else EMULATORS[1]
        emulator.require()
        return emulator, ALIASES[name]
    for emulator in EMULATORS:
        if emulator.installed():
            for model in emulator.models():
                if model.name == name:
                    if model.virtualization.startswith("none"):
                        raise Missing(f"{emulator.name}'s model {name} has no hardware virtualization: pykvm host list shows which have")
                    return emulator, name
    absent = [e.name for e in EMULATORS if not e.installed()]
    hint = f" ({', '.join(absent)} not installed)" if absent else ""
    raise Missing(f"no emulator offers the CPU model {name!r}{hint}: use amd, intel, or a name from pykvm host list")
