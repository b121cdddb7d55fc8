"""Imports go downward only (docs/architecture.md), and starting a guest imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pykvm

PACKAGE = Path(pykvm.__file__).parent
LEVELS = {
    0: ["errors", "lifetime", "units", "platform"],
    1: ["abi", "assemble", "console", "gallery", "memorymap", "hostwrites", "unixsocket", "wholefile"],
    2: ["system", "vm", "vcpu", "memory", "exits", "exit_reason", "bus", "disasm", "symbols", "records", "kvmstats", "cpuid", "irq"],
    3: ["x86", "devices", "loaders", "tables"],
    4: ["machine", "config", "start", "saveable", "pc", "pctest", "result", "runner", "smp", "turns", "msrs", "services", "needs", "probe"],
    5: ["debug", "state", "bench", "hosts", "doctor", "ledger", "ledgerfile", "tracefs"],
    6: ["cli", "__main__"],
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}
# The explainer is called by Machine when a guest has stopped, the ledger when it is asked for; they are imported then.
# So are page walks and, in a notebook, HTML.
ALLOWED = {("machine", "debug"), ("records", "debug"), ("machine", "ledger"), ("saveable", "state"), ("vcpu", "debug"), ("vm", "debug")}
ALLOWED |= {("abi", "debug"), ("exits", "debug"), ("memory", "debug"), ("result", "debug")}
NO_KVM = {"abi", "vm", "vcpu", "system"}


def imports(path):
    """(top-level module below pykvm, at run time) for each import of pykvm's own modules."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pykvm":
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pykvm."))


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        name = relative.parts[0].removesuffix(".py")
        if name != "__init__":
            yield path, name


def test_every_module_has_a_level():
    assert {name for _, name in modules()} <= set(LEVEL)


def test_imports_go_downward():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for path, name in modules()
        for imported in imports(path)
        if LEVEL.get(imported, 0) > LEVEL[name] and (name, imported) not in ALLOWED
    ]
    assert wrong == []


def test_devices_know_no_kvm():
    for path, name in modules():
        if name in ("bus", "devices", "tables"):
            assert not NO_KVM & set(imports(path)), path


def test_only_abi_imports_the_binding():
    users = [p.relative_to(PACKAGE).name for p, _ in modules() if "_native" in set(imports(p))]
    assert users == ["abi.py"]


# All of pykvm that a start reads. Each module is some 0.1 ms of 24: one that the plain way does not need is imported where it is used.
START = """
abi bus cli cli.guest cli.options cli.run config console cpuid devices devices.debugconsole devices.debugexit devices.once devices.post
devices.reset devices.rtc devices.scratch devices.uart16550 errors gallery lifetime loaders loaders.elf loaders.image loaders.note
loaders.source machine memory pc platform result runner saveable smp start system units vcpu vm x86 x86.modes x86.paging x86.regs
_native _native.lib
"""
# And of Python's own, beyond what it has imported by itself.
START_PYTHON = {"__future__", "_bisect", "_cffi_backend", "_struct", "mmap"}


def test_a_start_imports_no_more_than_it_needs():
    code = "import os, sys; before = set(sys.modules); import pykvm.cli.run; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    own = {name for name in imported if name.split(".")[0] == "pykvm"}
    assert own - {"pykvm", *(f"pykvm.{name}" for name in START.split())} == set()
    assert imported - own - START_PYTHON == set()


def test_no_exported_name_is_a_module_too():
    """`import pykvm.x` would put the module in the place of the function x."""
    assert not {name for _, name in modules()} & set(pykvm.__all__)
