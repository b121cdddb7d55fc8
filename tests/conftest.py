"""Shared by all tests: how patient to be, and machines that run in another thread.

Emulated hosts set PYKVM_TIME_SCALE and PYKVM_FEW; no test asserts a time.
"""

import os
import threading

TIME_SCALE = float(os.environ.get("PYKVM_TIME_SCALE", "1"))
TIMEOUT = 20 * TIME_SCALE  # seconds for a guest that ends by itself
FEW = int(os.environ.get("PYKVM_FEW", "100"))  # VMs or runs where many are meant: each costs emulated hosts a tenth of a second or more


class Running:
    """machine.run() in another thread, for a with statement, which stops it at its end; then ``result`` or ``error`` is there."""

    def __init__(self, machine, timeout=TIMEOUT):
        self.machine, self.result, self.error = machine, None, None
        self.thread = threading.Thread(target=self._run, args=(timeout,))

    def _run(self, timeout):
        try:
            self.result = self.machine.run(timeout)
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        if self.thread.is_alive():
            self.machine.stop()
        self.thread.join()
        for runner in self.machine.runners:
            runner.take_back_stop()  # the run may have ended by itself just before: the stop is not meant for the next one
