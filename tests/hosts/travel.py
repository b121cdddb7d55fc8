"""Runs in a host, or here: a guest saved, taken on for a while and saved again, or run to its end.

    travel.py save IMAGE CPU EXIT OUT      run a gallery guest up to an exit, save it
    travel.py on IN EXIT OUT               restore it, run on for so many exits, save it
    travel.py end IN                       restore it, run it to its end

Prints one JSON object: how it went, what restoring said, or the error.
"""

import json
import sys

from pykvm import IncompatibleStateError, Machine
from pykvm.debug.reach import run_until

TIMEOUT = 120


def restored(place):
    return Machine.restore(place, adapt=True, accept_tsc=True)


def main(what, *words):
    if what == "save":
        image, cpu, exit, out = words
        with Machine(image, cpu=cpu or None) as machine:
            reached = run_until(machine, exit, TIMEOUT)
            state = machine.snapshot(out)
            return {"reached": reached, "host": state.host["vendor"], "xcrs": state.vcpus[0]["xcrs"]}
    with restored(words[0]) as machine:
        said = {"dropped": machine.restored.dropped, "notes": machine.restored.notes}
        if what == "on":
            said["reached"] = run_until(machine, words[1], TIMEOUT)
            machine.snapshot(words[2])
        else:
            result = machine.run(TIMEOUT, explain=False)
            said |= {"reason": result.reason, "code": result.exit_code, "console": result.console}
        return said


if __name__ == "__main__":
    try:
        print(json.dumps(main(*sys.argv[1:])))
    except IncompatibleStateError as refused:
        print(json.dumps({"refused": [str(problem) for problem in refused.problems]}))
