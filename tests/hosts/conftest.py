"""Boots the emulated hosts, both at once, and lets each work off its list in a thread of its own; the tests look at what came out.

An emulated second is expensive: each host boots once, runs the tests with EPT/NPT on, reloads the vendor module with it off, runs
the marked subset again. PROFILES says how patient the tests inside are.
"""

import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pykvm.hosts import boot

ROOT = Path(__file__).parents[2]
# PYKVM_TIME_SCALE multiplies the tests' time limits: Bochs needs a minute for a second of its guest's time, QEMU's clock is ours.
PROFILES = {
    "amd": {"PYKVM_TIME_SCALE": "2", "PYKVM_LEAK_FEW": "20"},
    "intel": {"PYKVM_TIME_SCALE": "0.1", "PYKVM_LEAK_FEW": "10"},
}
LIMIT = 1500  # seconds for one step


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

    def __init__(self, cpu, folder):
        super().__init__(name=cpu, daemon=True)
        self.cpu, self.folder = cpu, folder
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
            with boot(self.cpu, progress=self.say) as host:
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
        host.put(ROOT / "tests")
        host.put(ROOT / "pyproject.toml")
        self.keep("tests", self.pytest(host, "not slow"))
        host.reload("off")
        self.keep("doctor off", host.run(["pykvm", "doctor", "--json"]))
        self.keep("shadow", self.pytest(host, "shadow and not slow"))

    def pytest(self, host, marks):
        self.say(f"pytest tests/kvm -m '{marks}', paging {host.paging}")
        done = host.run(
            [
                "python3",
                "-m",
                "pytest",
                "tests/kvm",
                "-m",
                marks,
                "-p",
                "no:cacheprovider",
                "--junitxml=report.xml",
                "--tb=short",
                "-q",
                "--durations=8",
            ],
            timeout=LIMIT,
            env=PROFILES[self.cpu],
        )
        host.get("report.xml", self.folder)
        report = Report(done.returncode, done.stdout + done.stderr, (self.folder / "report.xml").read_bytes())
        self.say(f"paging {host.paging}:\n{report.output}")
        return report


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """{"amd": HostRun, "intel": HostRun}, both under way."""
    runs = {cpu: HostRun(cpu, tmp_path_factory.mktemp(cpu)) for cpu in PROFILES}
    for run in runs.values():
        run.start()
    yield runs
    for run in runs.values():
        run.join(60)


@pytest.fixture(params=list(PROFILES))
def host(request, hosts):
    """One of the two."""
    return hosts[request.param]
