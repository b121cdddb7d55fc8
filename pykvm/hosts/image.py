"""What a host boots: a small initramfs, and a root file system made from the running interpreter.

The root is an ext4 image that mke2fs fills without root: the interpreter with its standard library, the installed packages that
pykvm and its tests use, the assembler, busybox, and every shared library those need. Pages of it are read when they are touched, so its
size costs an emulated host nothing. Both are cached by the content they are made from; pykvm itself and tests travel on the exchange
disk (session.py) and change neither.
"""

from __future__ import annotations

import compileall
import gzip
import hashlib
import os
import py_compile
import shutil
import stat
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from pykvm.errors import HostError
from pykvm.hosts.cache import cached
from pykvm.hosts.debian import Kernel, require_commands
from pykvm.hosts.wire import EXCHANGE_NAME

__all__ = ["compile_folder", "initramfs", "root_image"]

PACKAGES = (
    "cffi", "pycparser", "numpy", "capstone", "pyelftools", "pytest", "pluggy", "iniconfig", "packaging", "pygments", "rich",
    "markdown-it-py", "mdurl",
)  # fmt: skip
PROGRAMS = ("as", "ld")
ROOT_LABEL = "pykvm-root"
MODULES = ("ata_piix", "sd_mod", "irqbypass", "kvm", "kvm_amd", "kvm_intel")
_SKIP = {"test", "tests", "idlelib", "tkinter", "ensurepip", "turtledemo", "lib2to3", "__pycache__", "site-packages", "pydoc_data"}
_VERSION = 5  # of the image's layout: part of its cache key

# Sets $root and $exchange, or fails. sd probes disks side by side, so their names say nothing: ext4 has its label at 1024 + 120, the
# exchange disk its name at the start.
FIND_DISKS = f"""find_disks() {{
    root= exchange=
    for disk in "$@"; do
        name=$(dd if="$disk" bs=4096 count=1 2>/dev/null | head -c {len(EXCHANGE_NAME)} | tr -d '\\000')
        label=$(dd if="$disk" bs=4096 count=1 2>/dev/null | tail -c +1145 | head -c 16 | tr -d '\\000')
        if [ "$name" = {EXCHANGE_NAME.decode()} ]; then exchange=$disk; elif [ "$label" = {ROOT_LABEL} ]; then root=$disk; fi
    done
    [ -n "$root" ] && [ -n "$exchange" ]
}}
"""
_INIT = f"""#!/bin/busybox sh
# The first process of an emulated host: mounts, modules, then the agent.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for word in $(cat /proc/cmdline); do case $word in pykvm.paging=*) paging=${{word#*=}} ;; esac; done
fail() {{ echo "pykvm-host: $1"; sleep 1; poweroff -f; }}
{FIND_DISKS}
for module in $(cat /modules/order); do
    case $module in kvm-amd.ko|kvm-intel.ko) continue ;; esac
    insmod /modules/$module || fail "cannot load $module"
done
tries=0
until find_disks /dev/sd?; do
    tries=$((tries + 1)); [ $tries -gt 300 ] && fail "no disks appeared"; sleep 0.1
done
mount -t ext4 -o ro,noload $root /root || fail "cannot mount the root image"
mount -t tmpfs tmpfs /root/host; mount -t tmpfs tmpfs /root/tmp; mount -t tmpfs tmpfs /root/run
mount -t devtmpfs dev /root/dev; mkdir -p /root/dev/shm /root/dev/pts; mount -t tmpfs tmpfs /root/dev/shm
mount -t proc proc /root/proc; mount -t sysfs sysfs /root/sys
mkdir /root/run/agent; cp /agent.py /wire.py /root/run/agent/; cp -r /modules /root/run/modules
ifconfig lo 127.0.0.1 up
chroot /root /bin/sh /bin/pykvm-load-kvm "$paging" || fail "neither kvm_amd nor kvm_intel loads: does this CPU model have virtualization?"
export HOME=/host TMPDIR=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/host PYTHONNOUSERSITE=1 PATH=/bin
chroot /root /bin/python3 /run/agent/agent.py /dev/ttyS1 $exchange
fail "the agent ended"
"""

_LOAD_KVM = """#!/bin/sh
# pykvm-load-kvm on|off: (re)load the vendor module with EPT or NPT on or off.
value=1; [ "$1" = off ] && value=0
rmmod kvm_amd 2>/dev/null; rmmod kvm_intel 2>/dev/null
grep -qw svm /proc/cpuinfo && exec insmod /run/modules/kvm-amd.ko npt=$value
grep -qw vmx /proc/cpuinfo && exec insmod /run/modules/kvm-intel.ko ept=$value
echo "the CPU has neither vmx nor svm" >&2; exit 1
"""


def initramfs(kernel: Kernel) -> Path:
    """A gzipped cpio of busybox, the kernel's modules and the agent."""
    require_commands({"busybox": "busybox-static"}, "an emulated host")
    here = Path(__file__).parent
    busybox = Path(shutil.which("busybox") or "")
    modules = kernel.module_order(list(MODULES))
    files: dict[str, tuple[int, bytes]] = {
        "init": (0o755, _INIT.encode()),
        "bin/busybox": (0o755, busybox.read_bytes()),
        "agent.py": (0o644, (here / "agent.py").read_bytes()),
        "wire.py": (0o644, (here / "wire.py").read_bytes()),
        "modules/order": (0o644, "".join(f"{m.name}\n" for m in modules).encode()),
    }
    for module in modules:
        files[f"modules/{module.name}"] = (0o644, module.read_bytes())
    archive = cpio(files, ("bin", "dev", "proc", "sys", "root", "modules"))
    name = f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}"
    return cached(name, lambda folder: _write(folder / "initrd.gz", gzip.compress(archive, 6, mtime=0))) / "initrd.gz"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def cpio(files: dict[str, tuple[int, bytes]], folders: tuple[str, ...]) -> bytes:
    """A newc archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst), with /dev/console for the kernel."""
    out = bytearray()

    def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        number = len(out) % 0xFFFFFFFF
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        out.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    for folder in folders:
        add(folder, stat.S_IFDIR | 0o755)
    add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, (mode, data) in files.items():
        add(name, stat.S_IFREG | mode, data)
    add("TRAILER!!!", 0)
    return bytes(out)


# --- the root file system --------------------------------------------------------------------------------------------


def root_image() -> Path:
    """The ext4 image, made when what it consists of has changed."""
    require_commands({"mke2fs": "e2fsprogs", "busybox": "busybox-static", "as": "binutils", "ldd": "libc-bin"}, "an emulated host")
    distributions = _distributions()
    key = hashlib.sha256(repr((_VERSION, sys.version, sys.base_prefix, _LOAD_KVM)).encode())
    for name, distribution in distributions.items():
        key.update(f"{name}={distribution.version};".encode())
    for program in PROGRAMS:
        key.update(Path(shutil.which(program) or "").resolve().read_bytes())
    return cached(f"root-{key.hexdigest()[:16]}", lambda folder: _make_root(folder, distributions)) / "root.img"


def _distributions() -> dict[str, metadata.Distribution]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _make_root(folder: Path, distributions: dict[str, metadata.Distribution]) -> None:
    tree = folder / "tree"
    for name in ("bin", "dev", "proc", "sys", "tmp", "run", "host", "lib64"):
        (tree / name).mkdir(parents=True)
    _copy_interpreter(tree)
    _copy_distributions(tree, distributions)
    for program in PROGRAMS:
        _copy(Path(shutil.which(program) or "").resolve(), tree / "bin" / program)
    _copy(Path(shutil.which("busybox") or ""), tree / "bin" / "busybox")
    for applet in subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        link = tree / "bin" / applet
        if not link.exists() and not link.is_symlink():
            link.symlink_to("busybox")
    for name, text in (("pykvm-load-kvm", _LOAD_KVM), ("pykvm", '#!/bin/sh\nexec /bin/python3 -m pykvm "$@"\n')):
        (tree / "bin" / name).write_text(text)
        (tree / "bin" / name).chmod(0o755)
    _copy_libraries(tree)
    size = sum(p.lstat().st_size + 4096 for p in tree.rglob("*")) * 5 // 4 + (32 << 20)
    size = -(-size // (16 * 63 * 512)) * (16 * 63 * 512)  # whole cylinders: Bochs wants them
    made = subprocess.run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-L",
            ROOT_LABEL,
            "-O",
            "^has_journal,^metadata_csum",
            "-m",
            "0",
            "-d",
            str(tree),
            str(folder / "root.img"),
            f"{size // 1024}k",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
    )
    if made.returncode:
        raise HostError(f"mke2fs cannot make the root image: {made.stderr.strip()}")
    with open(folder / "root.img", "r+b") as image:
        image.truncate(size)
    shutil.rmtree(tree)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=True)


def _ignore(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _SKIP or name.startswith("config-") or name.endswith((".a", ".pyc"))}


def _copy_interpreter(tree: Path) -> None:
    """The base interpreter at its own path (it finds its library by that), with /bin/python3 for everybody."""
    binary = Path(os.path.realpath(sys.executable))
    _copy(binary, _inside(tree, binary))
    for name in ("python3", "python"):
        (tree / "bin" / name).symlink_to(binary)
    for key in ("stdlib", "platstdlib"):
        library = Path(sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})[key])
        if not _inside(tree, library).exists():
            shutil.copytree(library, _inside(tree, library), ignore=_ignore, symlinks=False)
    compile_folder(_inside(tree, Path(sysconfig.get_path("stdlib"))))


def _inside(tree: Path, path: Path) -> Path:
    return tree / str(path).lstrip("/")


def compile_folder(folder: Path) -> None:
    """Bytecode now, never checked against the source again: an emulated CPU should not compile the standard library."""
    compileall.compile_dir(str(folder), quiet=2, force=True, workers=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def _copy_distributions(tree: Path, distributions: dict[str, metadata.Distribution]) -> None:
    """Into the base interpreter's site-packages, since there is no virtual environment in the host."""
    asked = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    site = _inside(tree, Path(asked.stdout.strip()))
    for distribution in distributions.values():
        for file in distribution.files or ():
            if {"tests", "test", "__pycache__"} & set(file.parts) or ".." in file.parts:
                continue
            source = Path(str(distribution.locate_file(file)))
            if source.is_file():
                _copy(source, site / str(file))
    compile_folder(site)


def _copy_libraries(tree: Path) -> None:
    """Every library that ldd names for what is in the tree, and the loader."""
    binaries = [
        p
        for p in tree.rglob("*")
        if p.is_file() and not p.is_symlink() and (p.suffix == ".so" or ".so." in p.name or os.access(p, os.X_OK))
    ]
    binaries += [Path(str(p)) for p in Path(__file__).parents[1].glob("_native*.so")]
    listed: set[str] = set()
    for i in range(0, len(binaries), 64):
        said = subprocess.run(["ldd", *map(str, binaries[i : i + 64])], capture_output=True, text=True, check=False).stdout
        for line in said.splitlines():
            words = line.split()
            path = words[2] if len(words) > 2 and words[1] == "=>" else words[0] if words else ""
            if path.startswith("/") and not path.startswith(str(tree)) and os.path.exists(path):
                listed.add(path)
    for path in sorted(listed):
        target = _inside(tree, Path(path))
        if not target.exists():
            _copy(Path(path), target)
