"""Runs inside an emulated host: tests/kvm with EPT or NPT on, then the marked subset with it off.

An emulated CPU takes half a minute to import pytest and pykvm and a second to run as and ld. So one process imports all and forks for each
of the two runs, and code that was assembled outside, or by the first run, is not assembled again (conftest.py has the other half).
It leaves on.xml, off.xml, status.json and assembled.json.
"""

import importlib
import json
import os
import subprocess
import sys

import _pytest.config
import pytest

import pykvm
from pykvm import assemble

# What no test in there uses, or what only serves to choose tests. faulthandler stays: a crash should say where.
PLUGINS = ("cacheprovider", "logging", "doctest", "pastebin", "stepwise", "setuponly", "setupplan", "legacypath")
MARK = "--- paging off ---"


class Used(dict):
    """The cache of assembled snippets, which knows what was asked for."""

    def __init__(self):
        super().__init__()
        self.keys_asked = set()

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)


def load(cache):
    with open("assembled.json", encoding="utf-8") as file:
        cache.update({(source, bits, org): bytes.fromhex(code) for source, bits, org, code in json.load(file)})


def save(cache):
    rows = [[*key, cache[key].hex()] for key in sorted(cache.keys_asked) if key in cache]
    with open("assembled.json", "w", encoding="utf-8") as file:
        json.dump(rows, file)


def run(marks, report, cache, keep):
    """pytest in a fork; its exit status, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            options = ["-q", "-m", marks, f"--junitxml={report}", "--tb=short", "--durations=12", "--durations-min=0.01"]
            status = int(pytest.main(["tests/kvm", *options, *(word for name in PLUGINS for word in ("-p", f"no:{name}"))]))
            if keep:
                save(cache)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    for name in _pytest.config.default_plugins:
        importlib.import_module(f"_pytest.{name}")
    for name in pykvm.__all__:
        getattr(pykvm, name)
    cache = assemble._cache = Used()
    assemble._CACHE_SIZE = 1 << 20
    load(cache)
    statuses = {"on": run("not slow", "on.xml", cache, True)}
    print(MARK, flush=True)
    load(cache)
    subprocess.run(["pykvm-load-kvm", "off"], check=True)
    statuses["off"] = run("shadow and not slow", "off.xml", cache, False)
    with open("status.json", "w", encoding="utf-8") as file:
        json.dump(statuses, file)


if __name__ == "__main__":
    main()
