"""/dev/kvm itself: the API version, capabilities, what CPUID and MSRs the host supports, and new VMs (api.rst 4.1-4.6)."""

from __future__ import annotations

import os

from pykvm.abi import capability, ffi, flexible, ioctl, ioctl_value
from pykvm.cpuid import Cpuid
from pykvm.errors import CapabilityError, KvmError, KvmUnavailableError
from pykvm.lifetime import Closes
from pykvm.vm import VM

__all__ = ["System"]

API_VERSION = 12
E2BIG = 7


class System(Closes):
    """An open /dev/kvm, a context manager.

    >>> with System() as system:
    ...     system.api_version, system.check_extension("KVM_CAP_SYNC_REGS")
    (12, 7)

    Raises KvmUnavailableError when the device is missing, may not be opened, or speaks another API version.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        self.path = path
        self.fd = -1
        self._cpuid: Cpuid | None = None
        self._caps: dict[str, int] = {}
        self._run_size = 0
        machine = os.uname().machine
        if machine != "x86_64":
            raise KvmUnavailableError(path, f"this machine is {machine}; pykvm runs x86 guests on x86_64 hosts")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise KvmUnavailableError(
                path,
                "there is no such device: load the module (modprobe kvm_intel, or kvm_amd) after enabling VT-x or AMD-V in "
                "the firmware, or use an emulated host: pykvm host run -- pykvm run hello",
            ) from None
        except PermissionError:
            raise KvmUnavailableError(
                path, "permission denied: add your user to the group kvm (sudo usermod -aG kvm $USER), then log in again"
            ) from None
        except OSError as error:
            raise KvmUnavailableError(path, f"cannot be opened: {error.strerror}") from None
        try:
            self.api_version = ioctl_value(self.fd, "KVM_GET_API_VERSION")
        except KvmError:
            self.close()
            raise KvmUnavailableError(path, "it does not answer KVM_GET_API_VERSION: is it a KVM device?") from None
        if self.api_version != API_VERSION:
            self.close()
            raise KvmUnavailableError(path, f"KVM API version {self.api_version}, but pykvm speaks {API_VERSION}")

    def another(self) -> System:
        """A System of its own fd that need not ask again what this one has asked."""
        other = System.__new__(System)
        other.path, other.api_version, other._cpuid, other._caps, other._run_size = (
            self.path, self.api_version, self._cpuid, self._caps, self._run_size
        )  # fmt: skip
        other.fd = -1
        other.fd = os.dup(self.fd)
        return other

    def check_extension(self, cap: str) -> int:
        """KVM_CHECK_EXTENSION: what the host answers for a capability by its KVM_CAP_ name; 0 means it is absent. Asked once each."""
        value = self._caps.get(cap)
        if value is None:
            value = self._caps[cap] = ioctl_value(self.fd, "KVM_CHECK_EXTENSION", capability(cap), cap)
        return value

    def require(self, cap: str, what: str) -> int:
        """The value of a capability, or CapabilityError: ``what`` is the feature that needs it."""
        value = self.check_extension(cap)
        if not value:
            raise CapabilityError(cap, what)
        return value

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of the area that vCPU and user space share."""
        return ioctl_value(self.fd, "KVM_GET_VCPU_MMAP_SIZE")

    @property
    def run_size(self) -> int:
        """The same, asked once."""
        if not self._run_size:
            self._run_size = self.get_vcpu_mmap_size()
        return self._run_size

    def create_vm(self) -> VM:
        """KVM_CREATE_VM, and the two addresses that hosts without unrestricted guest need set before any vCPU."""
        return VM(self)

    def get_supported_cpuid(self) -> Cpuid:
        """KVM_GET_SUPPORTED_CPUID: the CPUID that KVM can give a guest here (api.rst 4.46). Asked once."""
        count = 64
        while self._cpuid is None:
            table = flexible("struct kvm_cpuid2", "entries", count)
            table.nent = count
            try:
                ioctl(self.fd, "KVM_GET_SUPPORTED_CPUID", table)
                self._cpuid = Cpuid(table)
            except KvmError as error:
                if error.errno != E2BIG or count > 4096:
                    raise
                count *= 2
        return self._cpuid

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that make up a vCPU's state here (api.rst 4.3)."""
        return self._index_list("KVM_GET_MSR_INDEX_LIST")

    def _index_list(self, name: str) -> list[int]:
        empty = ffi.new("struct kvm_msr_list *")
        try:
            ioctl(self.fd, name, empty)
        except KvmError as error:
            if error.errno != E2BIG:
                raise
        full = flexible("struct kvm_msr_list", "indices", empty.nmsrs)
        full.nmsrs = empty.nmsrs
        ioctl(self.fd, name, full)
        return list(full.indices[0 : full.nmsrs])

    def close(self) -> None:
        """Close /dev/kvm; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<System {self.path} {'closed' if self.fd < 0 else f'fd {self.fd}'}>"
