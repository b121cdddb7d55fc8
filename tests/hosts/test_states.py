"""States between CPUs, for real: a guest that keeps a checksum in vector registers, with interrupts on, travels between emulated hosts of
two Intel generations, one of AMD, and this machine's own KVM. Where it ends, the sum must be that of a run from start to end.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pykvm import KvmUnavailableError, System
from pykvm.hosts import boot

TRAVEL = Path(__file__).parent / "travel.py"
MODELS = {"sandybridge": "corei7_sandy_bridge_2600k", "skylake": "intel", "amd": "amd"}
APPEND = {"sandybridge": "tsc_early_khz=500000", "skylake": "tsc_early_khz=500000", "amd": ""}
BASELINE = "sandybridge -avx -rdtscp"  # what all of them have
END = {"reason": "exit", "code": 0, "console": "checksum 8ca889b13b76f579\n"}
LIMIT = 900  # seconds for a command


class Here:
    """This machine's own KVM."""

    def __init__(self, folder):
        self.folder = folder

    def travel(self, *words):
        done = subprocess.run([sys.executable, str(TRAVEL), *words], cwd=self.folder, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fetch(self, name, folder):
        (self.folder / name).rename(folder / name)

    def give(self, path):
        path.rename(self.folder / path.name)


class There:
    """A host that has booted."""

    def __init__(self, host):
        self.host = host

    def travel(self, *words):
        done = self.host.run(["python3", "travel.py", *words], timeout=LIMIT)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def fetch(self, name, folder):
        self.host.get(name, folder)

    def give(self, path):
        self.host.put(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{"sandybridge": There, "skylake": There, "amd": There, "here": Here}: all boot at once."""
    found, errors, sessions = {}, [], []

    def start(name):
        try:
            session = boot(
                MODELS[name], append=APPEND[name], progress=lambda text: print(f"[{name}] {text}", file=sys.__stderr__, flush=True)
            )
            host = session.__enter__()
            sessions.append(session)
            host.put(TRAVEL)
            found[name] = There(host)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(name,)) for name in MODELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        if errors:
            raise errors[0]
        found["here"] = Here(tmp_path_factory.mktemp("here"))
        yield found
    finally:
        for session in sessions:
            session.__exit__(None, None, None)


@pytest.fixture
def carry(places, tmp_path):
    """carry(name, a, b): a snapshot from one place to another."""

    def carried(name, a, b):
        places[a].fetch(name, tmp_path)
        places[b].give(tmp_path / name)

    return carried


def skip_without_kvm(*names):
    if "here" in names:
        try:
            System().close()
        except KvmUnavailableError as error:
            pytest.skip(str(error))


ROUTES = [
    ("sandybridge", "skylake", "sandybridge"),
    ("skylake", "sandybridge", "skylake"),
    ("skylake", "amd", "skylake"),
    ("amd", "sandybridge", "amd"),
    ("here", "skylake", "here"),
    ("skylake", "here", "skylake"),
    ("here", "amd", "here"),
    ("amd", "here", "amd"),
]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: "-".join(route))
def test_there_and_back(route, places, carry):
    skip_without_kvm(*route)
    first, second, third = route
    name = "-".join(route)
    assert places[first].travel("save", "checksum", BASELINE, "10", name)["reached"] == "until"
    carry(name, first, second)
    went = places[second].travel("on", name, "12", f"{name}-on")
    print(f"{name}: dropped {went.get('dropped')}, notes {went.get('notes')}", file=sys.__stderr__)
    assert went.get("reached") == "until", went
    carry(f"{name}-on", second, third)
    ended = places[third].travel("end", f"{name}-on")
    assert {key: ended.get(key) for key in END} == END, ended


def test_avx512_in_use_does_not_go_to_a_sandy_bridge(places, carry):
    """Not even with adapt: XCR0 has it, and the guest was promised it."""
    saved = places["skylake"].travel("save", "xsave_live", "", "100", "avx512")
    assert saved["xcrs"] == [[0, 0xE7]]
    carry("avx512", "skylake", "sandybridge")
    refused = places["sandybridge"].travel("end", "avx512")
    assert "AVX-512 (XCR0 bits 5-7)" in refused["refused"]
