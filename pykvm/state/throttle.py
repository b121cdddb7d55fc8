"""Slows a guest that writes faster than its memory can be sent: of every 20 ms, its vCPUs are held out of it for a share.

The guest's clocks go on meanwhile: to it, it is as if the host were busy.
"""

from __future__ import annotations

from threading import Event, Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.smp import VcpuGroup

__all__ = ["Throttle"]

PERIOD = 0.02
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)


class Throttle:
    """A context manager; it does nothing until more() is called. ``share``: of the time, so much does the guest not run."""

    def __init__(self, group: VcpuGroup) -> None:
        self._group, self._step = group, 0
        self._over = Event()
        self._thread: Thread | None = None

    @property
    def share(self) -> float:
        """From 0 to 0.99."""
        return SHARES[self._step]

    def more(self) -> None:
        """A larger share from now on, up to 0.99."""
        self._step = min(self._step + 1, len(SHARES) - 1)
        if self._thread is None:
            self._thread = Thread(target=self._work, name="throttle", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while not self._over.wait(PERIOD):
            self._group.hold(self.share * PERIOD)

    def __enter__(self) -> Throttle:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
