"""Builds pykvm._native with cffi in API mode: the C compiler checks every name and layout against <linux/kvm.h>.

kvm_constants.txt lists the constants, kvm_structs.cdef the structures, runloop.cdef the native run loop
(runloop.c, session.c, lock.c, trace.c, step.c), migrate.cdef what migration does for each page (migrate.c), state.cdef what saved
states need for each (state.c), assist.cdef what must be atomic in guest memory (assist.c), bench.cdef what benchmarks compare with
(bench*.c). kvm_compat.h supplies what older headers lack. setup.py calls this file through its ``cffi_modules``.
"""

from __future__ import annotations

from pathlib import Path

import cffi

_found = Path("native/kvm_structs.cdef")  # builds run in the project's root; __file__ is not set in all of them
HERE = _found.parent if _found.exists() else Path(__file__).parent


def _without_comments(name: str) -> str:
    return "\n".join(line for line in (HERE / name).read_text().splitlines() if not line.lstrip().startswith("//"))


def constants() -> list[str]:
    """The names in kvm_constants.txt."""
    lines = (HERE / "kvm_constants.txt").read_text().splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.split()]


ffi = cffi.FFI()
ffi.cdef("\n".join(f"#define {name} ..." for name in constants()))
ffi.cdef(_without_comments("kvm_structs.cdef"))
ffi.cdef(_without_comments("runloop.cdef"))
ffi.cdef(_without_comments("migrate.cdef"))
ffi.cdef(_without_comments("state.cdef"))
ffi.cdef(_without_comments("assist.cdef"))
ffi.cdef(_without_comments("bench.cdef"))
_parts = ["runloop.c", "session.c", "lock.c", "trace.c", "step.c", "migrate.c", "state.c", "assist.c"]
_parts += ["bench.c", "bench_irq.c", "bench_traps.c", "bench_mmu.c", "bench_steps.c", "bench_copy.c", "bench_state.c"]
ffi.set_source(
    "pykvm._native",
    "#include <sys/mman.h>\n"
    + "".join(f'#include "{name}.h"\n' for name in ("kvm_compat", "runloop", "migrate", "state", "assist", "bench")),
    include_dirs=[str(HERE)],
    sources=[str(HERE / part) for part in _parts],
    depends=[str(HERE / f"{name}.h") for name in ("kvm_compat", "runloop", "turn", "lock", "migrate", "state", "assist", "bench")]
    + [str(HERE / part) for part in _parts],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"],
    libraries=["rt", "pthread"],
)
