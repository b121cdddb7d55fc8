"""KVM's own counters of a VM and its vCPUs (KVM_GET_STATS_FD, api.rst 4.133): among them exits that never leave the kernel.

The file behind the fd describes itself: a header, a descriptor for each counter, the values. Which counters there are, and whether a
host counts in them, differs: kvm_pvm leaves ``io_exits`` at 0.
"""

from __future__ import annotations

import os
import struct
import sys

from pykvm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.vcpu import VCPU
    from pykvm.vm import VM

    Values = dict[str, int | list[int]]
    Snapshot = dict[str, list[Values]]

__all__ = ["Counters", "difference", "read_stats", "snapshot"]

_HEADER = struct.Struct("6I")  # struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = struct.Struct("IhHII")  # struct kvm_stats_desc: flags, exponent, size, offset, bucket_size; then the name
_LIMIT = 1 << 20  # bytes of one such file; real ones have a few thousand


def _places(content: bytes) -> dict[str, tuple[int, int]]:
    """Name -> (offset, number of 64-bit values). Raises struct.error where the file is cut short."""
    _, name_size, count, _, at, data = _HEADER.unpack_from(content)
    found = {}
    for _ in range(count):
        _, _, size, offset, _ = _DESCRIPTOR.unpack_from(content, at)
        name = content[at + _DESCRIPTOR.size : at + _DESCRIPTOR.size + name_size].partition(b"\0")[0].decode("ascii", "replace")
        found[name] = (data + offset, size)
        at += _DESCRIPTOR.size + name_size
    return found


def read_stats(fd: int) -> Values:
    """The counters behind a statistics fd by name; a histogram is a list of its buckets. An unreadable file gives none."""
    content = os.pread(fd, _LIMIT, 0)
    try:
        found: Values = {}
        for name, (at, size) in _places(content).items():
            values = struct.unpack_from(f"{size}Q", content, at)
            found[name] = values[0] if size == 1 else list(values)
        return found
    except struct.error:
        return {}


class Counters:
    """Some counters of a VM or vCPU, to be read often and at little cost; none where KVM has none (KVM_CAP_BINARY_STATS_FD)."""

    def __init__(self, of: VM | VCPU, names: tuple[str, ...]) -> None:
        self._fd, self._at = -1, dict[str, int]()
        try:
            self._fd = of.get_stats_fd()
        except KvmError:
            return
        places = _places(os.pread(self._fd, _LIMIT, 0))
        self._at = {name: places[name][0] for name in names if places.get(name, (0, 0))[1] == 1}

    def read(self) -> dict[str, int]:
        """Values by name."""
        return {name: int.from_bytes(os.pread(self._fd, 8, at), sys.byteorder) for name, at in self._at.items()}

    def close(self) -> None:
        """Close the fd, which keeps the VM."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def snapshot(vm: VM) -> Snapshot:
    """{"vm": [counters], "vcpus": [counters of each]}; empty where KVM has none (KVM_CAP_BINARY_STATS_FD, Linux 5.14)."""
    if not vm.system.check_extension("KVM_CAP_BINARY_STATS_FD"):
        return {}

    def read(fd: int) -> Values:
        try:
            return read_stats(fd)
        finally:
            os.close(fd)  # at once: it would keep the VM

    return {"vm": [read(vm.get_stats_fd())], "vcpus": [read(vcpu.get_stats_fd()) for vcpu in vm.vcpus]}


def difference(before: Snapshot, after: Snapshot) -> Values:
    """What changed, added up over the vCPUs; without what stayed the same. A VM's and a vCPU's counters have different names."""
    total: Values = {}
    for kind in after:
        for old, new in zip(before.get(kind, ()), after[kind], strict=False):
            for name, value in new.items():
                start, so_far = old.get(name), total.get(name)
                if isinstance(value, list):
                    start = start if isinstance(start, list) else [0] * len(value)
                    so_far = so_far if isinstance(so_far, list) else [0] * len(value)
                    total[name] = [s + v - b for s, v, b in zip(so_far, value, start, strict=False)]
                else:
                    total[name] = (so_far if isinstance(so_far, int) else 0) + value - (start if isinstance(start, int) else 0)
    return {name: value for name, value in total.items() if (any(value) if isinstance(value, list) else value)}
