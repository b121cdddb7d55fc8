# make run      build everything, run the hello guest, show its console and its exits
# make test     the tests that need no emulator (tests/unit, and tests/kvm where /dev/kvm is)
# make check    ruff, and mypy --strict on pykvm/
# make test-hosts   tests/kvm inside emulated AMD-V and VT-x hosts (needs QEMU and Bochs; see docs/hosts.md)
# make bench-ept    bench mmu on emulated hosts, with EPT/NPT on and off, side by side
# make clean    forget all that was built

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
BUILD  := $(VENV)/.built

.PHONY: all run test check test-hosts bench-ept clean
all: $(BUILD) pykvm/images/.built

run: all
	@$(VENV)/bin/pykvm run hello --stats

test: all
	$(PY) -m pytest tests/unit tests/kvm

check: all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy

test-hosts: all
	$(PY) -m pytest tests/hosts -s

bench-ept: all
	$(VENV)/bin/pykvm bench mmu --hosts intel,amd --out bench-ept

# The environment and the binding. pip compiles the binding in place, so a change of Python code needs no rebuild.
$(BUILD): pyproject.toml setup.py $(wildcard native/*)
	@$(call need,$(PYTHON),python3)
	@$(call need,gcc,gcc)
	@$(call need,as,binutils)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pykvm needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call missing,Python's venv module,python3-venv); }
	@$(PYTHON) -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || { $(call missing,Python.h,python3-dev); }
	@echo '#include <linux/kvm.h>' | gcc -E - >/dev/null 2>&1 || { $(call missing,<linux/kvm.h>,linux-libc-dev libc6-dev); }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

pykvm/images/.built: $(wildcard guests/*) pykvm/assemble.py $(BUILD)
	@$(PY) guests/build.py pykvm/images
	@$(PY) -m compileall -q pykvm
	@touch $@

missing = echo "$(1) is missing. On Debian: sudo apt-get install $(2)" >&2; exit 1
need = command -v $(1) >/dev/null || { $(call missing,$(1),$(2)); }

clean:
	rm -rf $(VENV) build dist *.egg-info pykvm/images pykvm/_native*.so .mypy_cache .ruff_cache .pytest_cache
