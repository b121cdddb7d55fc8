# The compiled cffi module (native/abi_build.py); cffi types are dynamic, so is this stub.
from typing import Any

ffi: Any
lib: Any
