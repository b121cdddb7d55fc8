"""Shared by all tests: how patient to be. Emulated hosts set PYKVM_TIME_SCALE; no test asserts a time."""

import os

TIME_SCALE = float(os.environ.get("PYKVM_TIME_SCALE", "1"))
TIMEOUT = 20 * TIME_SCALE  # seconds for a guest that ends by itself
