"""What a machine is made of: the caller's arguments and what the image's note asks for, resolved and checked before anything is made."""

from __future__ import annotations

from pykvm.errors import ConfigError, GuestImageError
from pykvm.loaders import peek
from pykvm.loaders.source import read_image, read_module
from pykvm.units import PAGE_SIZE, parse_size
from pykvm.x86.modes import mode_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType

    from pykvm.loaders.image import ImageInfo

__all__ = ["BACKINGS", "IRQCHIPS", "MAX_CPUS", "PLATFORMS", "BlamesImage", "Config"]

DEFAULT_MEMORY = "16M"
PC_MEMORY = "128M"  # what images for a PC take for granted: QEMU's default
BACKINGS = ("anonymous", "memfd", "hugetlb")
IRQCHIPS = ("none", "kernel", "split")
PLATFORMS = ("pykvm", "pc-test")
MAX_CPUS = 254  # 8-bit APIC ids, less the broadcast and the IOAPIC's


class Config:
    """How a machine is made; Machine's arguments say more of each.

    ``info`` is the image before it is loaded and ``data`` its bytes; ``memory`` bytes of RAM; ``modules`` what ``initrd`` named;
    ``cpu`` a CPU model's text or None; ``chosen`` names what the image chose and no caller: when that cannot be, the image is to blame.
    Raises GuestImageError and ConfigError.
    """

    def __init__(
        self,
        data: bytes,
        info: ImageInfo,
        *,
        memory: int | str | None = None,
        backing: str = "anonymous",
        entry: int | None = None,
        append: str = "",
        initrd: Sequence[str | bytes] = (),
        cpus: int | None = None,
        irqchip: str | None = None,
        cpu: str | None = None,
        platform: str | None = None,
        strict: bool = False,
        assist: bool = True,
    ) -> None:
        note = info.note
        self.data, self.info = data, info
        self._sha256: str | None = None
        self.backing, self.entry, self.append = backing, entry, append
        self.strict, self.assist = strict, assist
        asked = {"memory": memory, "entry": entry, "cpus": cpus, "irqchip": irqchip, "cpu": cpu, "platform": platform}
        self.chosen = {name for name, value in asked.items() if value is None}
        self.modules = [read_module(each) for each in initrd]
        self.mode = mode_named(info.start)
        with self.blames("memory"):
            self.memory = parse_size(memory if memory is not None else note.get("memory", PC_MEMORY if info.protocol else DEFAULT_MEMORY))
            _check_memory_size(self.memory)
        with self.blames("platform"):
            self.platform = platform or note.get("platform") or ("pc-test" if info.protocol else "pykvm")
            _check_platform(self.platform)
        with self.blames("cpus", "irqchip"):
            self.cpus = _check_cpus(note.get("cpus", "1") if cpus is None else cpus)
            self.irqchip = irqchip or note.get("irqchip") or ("none" if self.cpus == 1 and self.platform == "pykvm" else "kernel")
            _check_irqchip(self.irqchip, self.cpus, self.platform)
        self.cpu = cpu or note.get("cpu")

    @classmethod
    def of_image(cls, image: str | os.PathLike[str] | bytes, mode: str = "auto", format: str = "auto", **arguments: object) -> Config:
        """For an image: a gallery name, a path, or bytes (loaders.source.read_image); "auto" is what the image says (loaders.peek)."""
        data, path = read_image(image, format)
        config = cls(data, peek(data, path, mode, format), **arguments)  # type: ignore[arg-type]
        if mode != "auto":
            config.chosen.discard("entry")
        return config

    @property
    def sha256(self) -> str:
        """Of the image's bytes, in hex."""
        if self._sha256 is None:
            self._sha256 = self.hash(self.data)
        return self._sha256

    @sha256.setter
    def sha256(self, value: str) -> None:
        self._sha256 = value

    @staticmethod
    def hash(data: bytes) -> str:
        """An image's hash, by which it is known again."""
        import hashlib

        return hashlib.sha256(data).hexdigest()

    def blames(self, *names: str) -> BlamesImage:
        """A ConfigError inside becomes a GuestImageError where it was the image that chose all of ``names``."""
        return BlamesImage(self.info.path if self.chosen.issuperset(names) else None)


class BlamesImage:
    """Turns a ConfigError into a GuestImageError of ``path``, unless that is None. (contextlib would be one more import for each start.)"""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._path is not None and isinstance(value, ConfigError) and not isinstance(value, GuestImageError):
            raise GuestImageError(self._path, None, f"it cannot have what it asks for: {value}") from None


def _check_cpus(cpus: int | str) -> int:
    if isinstance(cpus, str) and not (cpus.isascii() and cpus.isdigit()):
        raise ConfigError(f"{cpus!r} vCPUs: give a number from 1 to {MAX_CPUS}")
    if not 1 <= int(cpus) <= MAX_CPUS:
        raise ConfigError(f"{cpus} vCPUs: a machine has 1 to {MAX_CPUS}")
    return int(cpus)


def _check_platform(platform: str) -> None:
    if platform not in PLATFORMS:
        raise ConfigError(f"unknown platform {platform!r}: use one of {', '.join(PLATFORMS)}")


def _check_irqchip(chip: str, cpus: int, platform: str) -> None:
    if chip not in IRQCHIPS:
        raise ConfigError(f"unknown irqchip {chip!r}: use one of {', '.join(IRQCHIPS)}")
    if chip == "none" and cpus > 1:
        raise ConfigError(f"{cpus} vCPUs need LAPICs to start each other: use irqchip kernel or split")
    if chip == "none" and platform == "pc-test":
        raise ConfigError("the platform pc-test has interrupt controllers, and tables that describe them: use irqchip kernel or split")


def _check_memory_size(size: int) -> None:
    if size <= 0:
        raise ConfigError("a guest needs memory: give --memory at least 64K, such as 16M")
    if size % PAGE_SIZE:
        raise ConfigError(f"memory size {size} is not a multiple of the page size ({PAGE_SIZE}): try {-(-size // PAGE_SIZE) * PAGE_SIZE}")
