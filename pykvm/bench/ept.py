"""EPT or NPT on beside off: two reports of `bench mmu` side by side, and both made on an emulated host in one boot."""

from __future__ import annotations

import os

from pykvm.bench.mmu import SCHEMA
from pykvm.bench.walkcost import PAGE_SIZES
from pykvm.errors import ConfigError, HostError
from pykvm.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Pair", "caveats", "compare", "load_report", "measure_host"]

SIZE, ROUNDS, FEWER_ROUNDS = "4M", 6, 4  # on an emulated host: 1024 pages, twice what its TLBs hold; Bochs is slower than QEMU
_TIMEOUT = 280  # seconds for one run


# --- reports ----------------------------------------------------------------------------------------------------------


def load_report(path: str) -> dict[str, Any]:
    """A report that `bench mmu --json` has written. Raises ConfigError for anything else."""
    from json import loads

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text, let alone JSON") from None
    return check_report(text, path, loads)


def check_report(text: str, path: str, loads: Callable[[str], Any]) -> dict[str, Any]:
    """The same for its text."""
    try:
        report = loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("benchmark") != "mmu":
        other = isinstance(report, dict) and report.get("benchmark") == "exits"
        hint = ": pykvm bench compare A B judges two of bench exits" if other else ""
        raise ConfigError(f"{path} is no report of `pykvm bench mmu --json`{hint}")
    if report.get("schema") != SCHEMA:
        raise ConfigError(f"{path} has schema {report.get('schema')!r}; this pykvm reads {SCHEMA}: measure again")
    try:
        _check_shape(report)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is a damaged report: {type(error).__name__} {error}") from None
    return report


def _check_shape(report: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless everything that is shown is there."""
    for name in ("cpu", "emulator", "kernel", "module", "paging", "two_level_paging", "under_a_hypervisor"):
        _need(report["host"][name], str)
    for name in ("cpl0_emulated", "tsc_khz", "host_levels"):
        _need(report["host"][name], int)
    if report["host"]["tsc_khz"] <= 0 or report["host"]["host_levels"] not in (4, 5):
        raise ValueError("in what it says of the host")
    _need(report["size"], int)
    _need(report["rounds"], int)
    for row in _need(report["rows"], list):
        for name in ("workload", "backing", "native_as"):
            _need(row[name], str)
        _need(row["guest_page"], int)
        _need(row["host_page"], int)
        if row["guest_page"] not in PAGE_SIZES or row["host_page"] not in PAGE_SIZES:
            raise ValueError("in a page size")
        _need(row["native_faults_per_op"], (int, float))
        for value in _need(row["mapped"], dict).values():
            _need(value, int)
        for name in ("per_op", "native", "ratio"):
            if row[name] is not None or name == "per_op":
                for part in ("median", "low", "high"):
                    _need(row[name][part], (int, float))
        for value in _need(row["counters_per_op"], dict).values():
            _need(value, (int, float))
    for miss in _need(report["misses"], list):
        _need(miss["workload"], str)
        for side in ("native", "guest"):
            for part in ("median", "low", "high"):
                _need(miss[side][part], (int, float))
    for note in _need(report["notes"], list):
        _need(note, str)


def _need(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r}")
    return value


class Pair:
    """The same workload and page sizes in two reports; ``times`` is b's cost over a's."""

    def __init__(self, a: dict[str, Any], b: dict[str, Any]) -> None:
        self.a, self.b = a, b
        self.workload: str = a["workload"]
        self.guest_page: int = a["guest_page"]
        self.host_page: int = a["host_page"]
        self.times: float = b["per_op"]["median"] / a["per_op"]["median"] if a["per_op"]["median"] else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workload": self.workload,
            "guest_page": self.guest_page,
            "host_page": self.host_page,
            "a": self.a,
            "b": self.b,
            "b_over_a": self.times,
        }


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Pair]:
    """The rows that both reports have. Raises ConfigError when there is none, or when they measured working sets of different sizes."""
    if a["size"] != b["size"]:
        sizes = f"{format_size(a['size'])} and {format_size(b['size'])}"
        raise ConfigError(f"the reports measured working sets of {sizes}: measure one again with the other's --size")
    others = {_key(row): row for row in b["rows"]}
    pairs = [Pair(row, others[_key(row)]) for row in a["rows"] if _key(row) in others]
    if not pairs:
        raise ConfigError("the reports have no workload in common")
    return pairs


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["workload"], row["guest_page"], row["host_page"]


def caveats(host: dict[str, Any]) -> list[str]:
    """What has to be said of figures from such a host."""
    said = []
    if "Bochs" in host["emulator"]:
        said.append(
            "Emulated by Bochs: a TSC unit is an instruction carried out, the host kernel's included, and not a time. Bochs charges "
            "nothing for page walks, TLB misses and caches: what two-level paging loses on a TLB miss is not in these figures, what "
            "shadow paging loses by exits is."
        )
    elif host["emulator"]:
        said.append(
            f"Emulated by {host['emulator']}: a TSC unit is time that the emulator took, which follows the number of instructions and "
            "says nothing of hardware: a page walk costs what it costs the emulator in C. Exits an operation are what hardware would have."
        )
    if host["cpl0_emulated"]:
        said.append(
            "KVM emulates CPL0 code on this host, instruction by instruction: map_unmap and switch measure that emulator, not paging. "
            "chase, random, first_touch and first_map run at CPL3, natively."
        )
    if host["under_a_hypervisor"] == "yes" and not host["emulator"]:
        said.append(
            "This host is itself a guest: where its hypervisor uses EPT or NPT, walks of its processes are two-dimensional already, so "
            "native here is not bare metal."
        )
    return said


# --- emulated hosts ---------------------------------------------------------------------------------------------------


def measure_host(
    cpu: str, folder: str, size: str = SIZE, rounds: int = 0, progress: Callable[[str], None] | None = None
) -> tuple[str, str]:
    """Boot an emulated host once and measure with EPT or NPT on, then off: the two files, in ``folder``. Raises HostError."""
    from json import loads

    from pykvm.hosts import boot

    tell = progress or (lambda text: None)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    with boot(cpu, append="mitigations=off", progress=lambda text: tell(f"{cpu}: {text}")) as host:
        name = host.emulator.name
        rounds = rounds or (FEWER_ROUNDS if name == "Bochs" else ROUNDS)
        emulator = "Bochs" if name == "Bochs" else "QEMU TCG"
        command = ["python3", "-m", "pykvm.cli.bench_mmu", "--json", "--size", size, "--rounds", str(rounds), "--emulator", emulator]
        files = []
        for paging in ("on", "off"):
            tell(f"{cpu}: bench mmu with two-level paging {paging}")
            if paging != host.paging:
                host.reload(paging)
            done = host.run(command, timeout=_TIMEOUT)
            if done.returncode:
                raise HostError(f"bench mmu ended with status {done.returncode} in the {cpu} host: {done.stderr.strip()}", host.console())
            report = check_report(done.stdout, f"what the {cpu} host answered", loads)
            path = os.path.join(folder, f"mmu-{cpu}-{report['host']['paging'].lower()}.json")
            try:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(done.stdout)
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from None
            files.append(path)
    return files[0], files[1]
