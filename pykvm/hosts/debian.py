"""Debian packages, fetched by name, unpacked without root and kept in the cache; the hosts' kernel is one: linux-image-cloud-amd64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pykvm.errors import HostError
from pykvm.hosts.cache import cache_dir, cached

__all__ = ["Kernel", "Missing", "dependency", "fetch", "package", "require_commands"]

META_PACKAGE = "linux-image-cloud-amd64"


class Missing(HostError):
    """What a host is made from is not on this machine: an emulator, a package, a kernel, a CPU model."""

    exit_status = 69


class Kernel:
    """An unpacked kernel package: ``image`` (vmlinuz) and ``modules`` (its kernel/ folder)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images = sorted(folder.glob("boot/vmlinuz-*"))
        trees = sorted(folder.glob("lib/modules/*/kernel"))
        if not images or not trees:
            raise Missing(f"{folder} holds no kernel: remove it and run pykvm host fetch")
        self.image, self.modules = images[-1], trees[-1]
        self.version = self.image.name.removeprefix("vmlinuz-")

    def module_order(self, names: list[str]) -> list[Path]:
        """The .ko files of ``names`` and what they depend on, in the order to load them. Unknown ones are built in."""
        by_name = {path.stem.replace("-", "_"): path for path in self.modules.rglob("*.ko")}
        order: list[Path] = []

        def add(name: str) -> None:
            path = by_name.get(name.replace("-", "_"))
            if path is None or path in order:
                return
            for dependency in _depends(path):
                add(dependency)
            order.append(path)

        for name in names:
            add(name)
        return order

    def __repr__(self) -> str:
        return f"<Kernel {self.version} in {self.folder}>"


def _depends(module: Path) -> list[str]:
    """The modules that this one's .modinfo says it needs."""
    data = module.read_bytes()
    at = data.find(b"\0depends=")
    if at < 0:
        return []
    value = data[at + 9 : data.index(b"\0", at + 9)].decode()
    return [name for name in value.split(",") if name]


def require_commands(packages: dict[str, str], what: str) -> None:
    """Missing, with one apt line when any command (key) is missing; values are the Debian packages that bring them."""
    missing = sorted({package for command, package in packages.items() if shutil.which(command) is None})
    if missing:
        raise Missing(
            f"{what} needs Debian packages that are not installed: sudo apt-get install --no-install-recommends {' '.join(missing)}"
        )


def package(name: str) -> Path:
    """The folder that the package ``name`` is unpacked in, from the cache or the network. Raises Missing with what to do."""
    require_commands({"apt-get": "apt", "dpkg": "dpkg"}, f"fetching {name}")
    return cached(f"debian-{name}", lambda folder: _download(name, folder))


def fetch() -> Kernel:
    """The newest kernel that apt knows, from the cache or the network. Raises Missing with what to do."""
    kept = sorted(cache_dir().glob("linux-image-*"), key=lambda path: path.stat().st_mtime)
    require_commands({"apt-get": "apt", "dpkg": "dpkg"}, "fetching a kernel")
    newest = dependency(META_PACKAGE, "linux-image-")
    if newest is None:
        if kept:
            return Kernel(kept[-1])
        raise Missing(f"apt knows no {META_PACKAGE}: run sudo apt-get update, on a machine that has Debian's package lists")
    return Kernel(cached(newest, lambda folder: _download(newest, folder)))


def dependency(meta: str, prefix: str) -> str | None:
    """The package whose name begins with ``prefix`` that the package ``meta`` depends on: Debian's newest. None: apt knows none."""
    shown = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False).stdout
    for line in shown.splitlines():
        word, _, name = line.strip().partition(": ")
        if word == "Depends" and name.startswith(prefix):
            return name
    return None


def _download(package: str, folder: Path) -> None:
    got = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
    debs = list(folder.glob("*.deb"))
    if got.returncode or not debs:
        last = (got.stderr.strip().splitlines() or ["no message"])[-1]
        raise Missing(f"apt-get download {package} failed ({last}): check the network, and run sudo apt-get update")
    unpacked = subprocess.run(["dpkg", "-x", str(debs[0]), str(folder)], capture_output=True, text=True, check=False)
    if unpacked.returncode:
        raise Missing(f"{debs[0].name} cannot be unpacked: {unpacked.stderr.strip()}")
    debs[0].unlink()
