"""Boots the emulated hosts, both at once, and lets each work off its list in a thread of its own; the tests look at what came out.

An emulated second is expensive: each host boots once, runs the tests with EPT/NPT on, reloads the vendor module with it off, runs
the marked subset again (inside.py). PROFILES says how patient the tests inside are.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pykvm import asm
from pykvm.errors import HostError, PykvmError
from pykvm.hosts import boot
from pykvm.hosts.cache import cache_dir

ROOT = Path(__file__).parents[2]
# PYKVM_TIME_SCALE multiplies the tests' time limits. QEMU's clock is ours. In Bochs a second is as many instructions as Linux takes for the
# TSC's frequency: 3.5 GHz by CPUID, which is a minute of ours, so a guest that spins for 50 ms would cost three seconds.
# PYKVM_FEW: how many VMs or runs there are where many are meant.
PROFILES = {
    "amd": {"PYKVM_TIME_SCALE": "2", "PYKVM_FEW": "20"},
    "intel": {"PYKVM_TIME_SCALE": "0.4", "PYKVM_FEW": "5"},
}
APPEND = {"amd": "", "intel": "tsc_early_khz=500000"}
LIMIT = 3600  # seconds for both runs, on a busy machine too


class Report:
    """What a pytest run inside a host said: ``status``, ``output``, and from its JUnit file the ``outcomes`` by test."""

    def __init__(self, status, output, junit):
        self.status, self.output = status, output
        self.outcomes = {}
        for case in ElementTree.fromstring(junit).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            self.outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds.pop() if kinds else "passed"

    def count(self, outcome):
        """How many tests ended like that."""
        return sum(1 for o in self.outcomes.values() if o == outcome)


class HostRun(threading.Thread):
    """One host's list. ``result(step)`` waits for a step and gives its outcome, or raises what stopped the host."""

    def __init__(self, cpu, folder, luggage):
        super().__init__(name=cpu, daemon=True)
        self.cpu, self.folder, self.luggage = cpu, folder, luggage
        self.done = {}
        self.error = None
        self.changed = threading.Condition()
        self.started_at = time.monotonic()

    def say(self, text):
        """Progress, on stderr: with ``make test-hosts`` it is seen as it happens."""
        print(f"[{self.cpu} {time.monotonic() - self.started_at:5.0f} s] {text}", file=sys.__stderr__, flush=True)

    def result(self, step):
        with self.changed:
            self.changed.wait_for(lambda: step in self.done or self.error is not None)
        if step not in self.done:
            raise self.error
        return self.done[step]

    def keep(self, step, outcome):
        with self.changed:
            self.done[step] = outcome
            self.changed.notify_all()

    def run(self):
        try:
            with boot(self.cpu, append=APPEND[self.cpu], progress=self.say) as host:
                self.work(host)
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def work(self, host):
        self.keep("kernel", host.kernel)
        self.keep("hello", host.run(["pykvm", "run", "hello"]))
        self.keep("status", host.run(["sh", "-c", "echo out; echo err >&2; exit 7"]))
        self.keep("killed", host.run(["sh", "-c", "kill -9 $$"]))
        self.keep("missing", host.run(["no-such-command"]))
        note = self.folder / "note.bin"
        note.write_bytes(bytes(range(256)) * 1000)
        host.put(note)
        back = self.folder / "back"
        back.mkdir()
        host.get("note.bin", back)
        self.keep("files", (note.read_bytes(), (back / "note.bin").read_bytes()))
        self.keep("doctor", host.run(["pykvm", "doctor", "--json"]))
        self.luggage.put(host)
        self.pytest(host)
        self.keep("doctor off", host.run(["pykvm", "doctor", "--json"]))

    def pytest(self, host):
        """Both runs of tests/kvm, by inside.py."""
        self.say("pytest tests/kvm, paging on, then off")
        done = host.run(["python3", "inside.py"], timeout=LIMIT, env=PROFILES[self.cpu])
        host.paging = "off"
        output = done.stdout.partition("--- paging off ---")
        self.say(f"{done.stdout}{done.stderr}")
        if done.returncode:
            raise HostError(f"inside.py ended with status {done.returncode}: {done.stdout}{done.stderr}")
        for name in ("on.xml", "off.xml", "status.json", "assembled.json"):
            host.get(name, self.folder)
        statuses = json.loads((self.folder / "status.json").read_text())
        for step, paging, text in (("tests", "on", output[0]), ("shadow", "off", output[2])):
            self.keep(step, Report(statuses[paging], text + done.stderr, (self.folder / f"{paging}.xml").read_bytes()))


class Luggage(threading.Thread):
    """What the hosts get: the tests with bytecode in which pytest has rewritten the assertions, and assembled snippets.

    Both are made here, while the hosts boot: an emulated CPU would take minutes. The snippets are those that the last run asked for,
    assembled anew each time.
    """

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder = folder
        self.kept = cache_dir() / "test-snippets.json"

    def run(self):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests" / "kvm", self.folder / "tests" / "kvm", ignore=ignore)
        shutil.copy(ROOT / "tests" / "conftest.py", self.folder / "tests")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        shutil.copy(ROOT / "tests" / "hosts" / "inside.py", self.folder)
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
        collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/kvm"]
        subprocess.run(collect, cwd=self.folder, env=env, capture_output=True, check=False)  # where it fails, hosts do the work
        (self.folder / "assembled.json").write_text(json.dumps(list(self.snippets())))

    def snippets(self):
        try:
            keys = json.loads(self.kept.read_text())
        except (OSError, ValueError):
            return
        for source, bits, org in keys:
            with contextlib.suppress(PykvmError):
                yield source, bits, org, asm(source, bits=bits, org=org).hex()

    def put(self, host):
        self.join()
        for name in ("tests", "pyproject.toml", "inside.py", "assembled.json"):
            host.put(self.folder / name, bytecode=True)

    def remember(self, files):
        """For the next run: what was asked for in this one, by any host."""
        keys = {tuple(row[:3]) for file in files if file.exists() for row in json.loads(file.read_text())}
        if keys:
            self.kept.write_text(json.dumps(sorted(keys)))


def pytest_collection_modifyitems(items):
    """What waits for the two hosts comes last: they work while the other tests run."""
    items.sort(key=lambda item: "host" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def under_way(request):
    """Starts the two hosts when any of the tests to come needs them."""
    if any("host" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("hosts")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """{"amd": HostRun, "intel": HostRun}, both under way."""
    luggage = Luggage(tmp_path_factory.mktemp("luggage"))
    runs = {cpu: HostRun(cpu, tmp_path_factory.mktemp(cpu), luggage) for cpu in PROFILES}
    for thread in (luggage, *runs.values()):
        thread.start()
    yield runs
    for run in runs.values():
        run.join(60)
    luggage.remember([run.folder / "assembled.json" for run in runs.values()])


@pytest.fixture(params=list(PROFILES))
def host(request, hosts):
    """One of the two."""
    return hosts[request.param]
