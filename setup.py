"""What pyproject.toml cannot say: the cffi module, and the guest images, which the build assembles with GNU as."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithGuests(build_py):
    """build_py, after guests/*.S have become pykvm/images/*.elf."""

    def run(self):
        sys.path.insert(0, str(ROOT / "guests"))
        import build as guests

        guests.build(ROOT / "pykvm" / "images")
        self.__dict__.pop("data_files", None)  # in case it was looked up before they were made
        super().run()


setup(cffi_modules=["native/abi_build.py:ffi"], cmdclass={"build_py": BuildWithGuests})
