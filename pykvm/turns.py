"""Several machines on one thread, each in turn for a slice of time: a scheduler of VMs in a page."""

from __future__ import annotations

from time import monotonic

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.machine import Machine
    from pykvm.result import Result

__all__ = ["take_turns"]


def take_turns(machines: Sequence[Machine], slice: float = 0.01, timeout: float | None = None) -> list[Result]:
    """Run each for ``slice`` seconds, round and round, until all have ended; their results in the same order.

    After ``timeout`` seconds those that still run give "timeout". Raises what Machine.run() raises; the others then stay as they are.

    >>> with Machine("two_vms", append="a") as a, Machine("two_vms", append="b") as b:
    ...     take_turns([a, b], slice=0.005)
    """
    if not slice > 0:
        raise ConfigError(f"a time slice of {slice} seconds: give a positive number")
    deadline = None if timeout is None else monotonic() + timeout
    results: dict[int, Result] = {}
    waiting = list(range(len(machines)))
    while waiting:
        for i in list(waiting):
            results[i] = machines[i].run(slice, explain=False)
            if results[i].reason != "timeout":
                waiting.remove(i)
        if deadline is not None and monotonic() >= deadline:
            break
    return [results[i] for i in range(len(machines))]
