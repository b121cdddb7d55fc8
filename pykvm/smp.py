"""The vCPUs of a machine run together: one thread each, paused, stopped and found halted as one.

The caller's thread runs vCPU 0, so that Ctrl-C and other signal handlers of Python's work as always; the others get threads of their
own for the length of a run. Whatever ends one ends all.
"""

from __future__ import annotations

from _thread import RLock
from time import monotonic, sleep

from pykvm.abi import ffi, lib
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pykvm.runner import Runner, Stop

__all__ = ["DeviceLock", "Gate", "IdleWatch", "VcpuGroup"]


class DeviceLock:
    """The lock of devices that several vCPUs share: one of them at a time asks a device. A thread that has it may take it again.

    The run loop takes it in C, where that costs nothing to speak of (native/lock.h); what is not hot asks here. ``cdata`` is a
    ``struct pykvm_lock *``.
    """

    def __init__(self) -> None:
        self.cdata: Any = ffi.new("struct pykvm_lock *")

    def holding(self, do: Callable[..., Any], *arguments: int) -> Any:
        """What ``do(*arguments)`` gives, with the lock held. A signal handler that raises finds no place where the lock would stay."""
        depth = lib.pykvm_lock_depth(self.cdata)
        try:
            while not lib.pykvm_lock(self.cdata):
                pass
            return do(*arguments)
        finally:
            lib.pykvm_unlock_to(self.cdata, depth)


class Gate:
    """Where vCPUs wait while the machine is paused, or held back for a moment."""

    def __init__(self) -> None:
        from threading import Condition

        self._changed = Condition()
        self.closed = False
        self.until = 0.0  # held back until then (monotonic time)
        self.waiting = 0

    def set(self, closed: bool) -> None:
        """Close it, or open it and let all go."""
        with self._changed:
            self.closed, self.until = closed, 0.0
            self._changed.notify_all()

    def look(self) -> None:
        """Have those who wait see whether they still should."""
        with self._changed:
            self._changed.notify_all()

    @property
    def shut(self) -> bool:
        """Whether a vCPU has to wait now."""
        return self.closed or self.until > monotonic()

    def wait(self, enough: Callable[[], bool]) -> None:
        """Wait until it is open, or ``enough()``."""
        with self._changed:
            self.waiting += 1
            try:
                while self.shut and not enough():
                    self._changed.wait(None if self.closed else max(0.0, self.until - monotonic()))
            finally:
                self.waiting -= 1


class IdleWatch:
    """With an in-kernel LAPIC, HLT does not exit: finds out that nothing will ever wake any vCPU again.

    A vCPU is idle when its mp_state is HALTED with RFLAGS.IF clear, or when it waits for INIT or SIPI. The machine has halted when there
    was a moment at which all were. (An NMI could wake them still; who sends one from outside does it before the guest halts for good.)
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        self._runners = runners
        self.asleep: Callable[[], bool] = bool  # whether all are suspended and a device will wake them: never by itself
        self._since = [0.0] * len(runners)  # idle at each look from then on; 0: was not
        self._last = [0.0] * len(runners)

    def look(self, index: int) -> bool:
        """Look at one vCPU, from its thread; True: all have halted."""
        if self.asleep():
            return False
        vcpu = self._runners[index].vcpu
        state = vcpu.get_mp_state()
        halted = state == lib.KVM_MP_STATE_HALTED and not vcpu.native.run.if_flag
        if not halted and state not in (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED):
            self._since[index] = 0.0
            return False
        self._last[index] = monotonic()
        if not self._since[index]:
            self._since[index] = self._last[index]
        return all(self._since) and max(self._since) <= min(self._last)

    def forget(self) -> None:
        """A new run."""
        self._since = [0.0] * len(self._runners)


class VcpuGroup:
    """The runners of one machine. ``pin``: run vCPU i on the i-th of the CPUs that this process may use."""

    def __init__(self, runners: Sequence[Runner], *, watch_idle: bool = False, pin: bool = False) -> None:
        self.runners = runners
        self.pin = pin
        self.ends: list[Stop | BaseException] = []  # of the last run: what each vCPU's ended with, the first to end first
        self.on_sleep: Callable[[], object] | None = None  # called when a run has stopped as "sleep", which then goes on
        self._gate: Gate | None = None
        self._stopping = RLock()  # a stop() reaches all vCPUs or none before the run that it ends is over
        self._watch = IdleWatch(runners) if watch_idle else None
        if self._watch is not None:
            for i, runner in enumerate(runners):
                runner.is_idle = lambda i=i, look=self._watch.look: look(i)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> Stop:
        """Run all until one stops; returns why. Raises what a device raised, on whichever vCPU."""
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            stop = self._run(timeout)
            if stop.reason != "sleep" or self.on_sleep is None:
                return stop
            self.on_sleep()
            if deadline is not None:
                timeout = max(deadline - monotonic(), 1e-6)

    def _run(self, timeout: float | None) -> Stop:
        if self._watch is not None:
            self._watch.forget()
        if len(self.runners) == 1:
            if not self.pin:
                return self.runners[0].run(timeout)
            with _Pinned(0):
                return self.runners[0].run(timeout)
        return self._run_threads(timeout)

    def _run_threads(self, timeout: float | None) -> Stop:
        from threading import Lock, Thread

        ends = self.ends = []
        first = Lock()
        abandoned = False

        def work(index: int) -> None:
            if abandoned:
                return
            end: Stop | BaseException
            try:
                if self.pin:
                    with _Pinned(index):
                        end = self.runners[index].run(timeout)
                else:
                    end = self.runners[index].run(timeout)
            except BaseException as error:
                end = error
            with first:
                ends.append(end)
                if len(ends) == 1:
                    for other in self.runners:
                        if other is not self.runners[index]:
                            other.stop()

        threads = [Thread(target=work, args=(i,), name=f"vCPU {i}", daemon=True) for i in range(1, len(self.runners))]
        try:
            for thread in threads:
                thread.start()
            work(0)
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C, or no more threads to be had
            abandoned = True
            for runner in self.runners:
                runner.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        finally:
            with self._stopping:
                for runner in self.runners:
                    runner.take_back_stop()
        errors = [end for end in ends if isinstance(end, BaseException)]
        if errors:
            raise errors[0]
        assert not isinstance(ends[0], BaseException)
        if ends[0].reason == "timeout":
            ends[0].vcpu = self.runners[0].vcpu  # which one's clock was first means nothing
        return ends[0]

    def stop(self, reason: str = "stopped", code: int | None = None) -> None:
        """End the run of all; from a device or any thread."""
        with self._stopping:
            for runner in self.runners:
                runner.stop(reason, code)

    def sleeps(self, asleep: Callable[[], bool], on_sleep: Callable[[], object]) -> None:
        """The machine can suspend itself: ``on_sleep()`` is called when it wants to, and while ``asleep()`` it has not halted for good."""
        self.on_sleep = on_sleep
        if self._watch is not None:
            self._watch.asleep = asleep

    # --- pausing -----------------------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether pause() is in force."""
        return self._gate is not None and self._gate.closed

    def pause(self) -> None:
        """From another thread: returns when no vCPU is in the guest any more. A run in progress waits, its time limit too."""
        from _thread import get_native_id

        if any(runner.vcpu.native.tid == get_native_id() for runner in self.runners):
            raise ConfigError("a device cannot pause the machine that waits for its answer: pause from another thread, or stop()")
        gate = self._make_gate()
        gate.set(True)
        for runner in self.runners:
            runner.vcpu.kick()
        while sum(runner.vcpu.native.tid != 0 for runner in self.runners) > gate.waiting:
            sleep(2e-4)

    def resume(self) -> None:
        """Go on after pause()."""
        if self._gate is not None:
            self._gate.set(False)

    @property
    def running(self) -> bool:
        """Whether a run is in progress, paused or not."""
        return any(runner.vcpu.native.tid for runner in self.runners)

    @property
    def waiting(self) -> bool:
        """Whether a run is in progress and all its vCPUs wait, after pause()."""
        return self._gate is not None and self._gate.waiting == len(self.runners)

    def hold(self, seconds: float) -> None:
        """From another thread: keep the vCPUs out of the guest for so long; a pause() or stop() meanwhile finds them waiting."""
        gate = self._make_gate()
        gate.until = monotonic() + seconds
        for runner in self.runners:
            runner.vcpu.kick()

    def _make_gate(self) -> Gate:
        if self._gate is None:
            self._gate = Gate()
            for runner in self.runners:
                runner.gate = self._gate
        return self._gate


class _Pinned:
    """This thread on one CPU for a while: the ``index``-th of those it may use, round and round."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> None:
        import os

        self._before = os.sched_getaffinity(0)
        cpus = sorted(self._before)
        os.sched_setaffinity(0, {cpus[self._index % len(cpus)]})

    def __exit__(self, *_: object) -> None:
        import os

        os.sched_setaffinity(0, self._before)
