"""The source of a live migration: the guest runs here until the other side has all of it, and then there.

1. HELLO and a first STATE, so that the destination refuses what it cannot run before any memory moves; WELCOME answers.
2. Rounds of pre-copy: all pages, then those that were written meanwhile, again and again. ROUND ends each; ROUND_DONE says that it arrived.
3. When what is left fits into the downtime that was asked for, the guest stands still: the last pages, then STATE. READY says that the
   destination has put everything in place.
4. COMMIT hands the guest over. Until it is sent, whatever goes wrong, the guest goes on here. From then on it never does by itself: if
   RUNNING does not come back, it may run there, and stays paused here with its state kept until somebody decides.

A guest that was paused moves as it is: it arrives paused, and is never resumed here or there but by its user.

A guest that writes faster than the stream takes it is slowed: every 20 ms its vCPUs are held out of it for a growing share of that time.
"""

from __future__ import annotations

from _thread import RLock
from itertools import pairwise
from time import monotonic, sleep

from pykvm.errors import MigrationError, PykvmError
from pykvm.state import stream as wire
from pykvm.state.dirtylog import DirtyLog
from pykvm.state.pages import PageSender
from pykvm.state.stream import Stream
from pykvm.state.throttle import Throttle
from pykvm.units import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pykvm.machine import Machine
    from pykvm.state.machinestate import MachineState

__all__ = ["DOWNTIME", "Migration", "Progress"]

DOWNTIME = 0.010  # seconds: the default goal
PATIENCE = 10.0  # seconds that a frame may take while the guest runs
STANDING = 2.0  # seconds, and ten times the goal: how long the guest may stand still for a destination that does not get ready
MOST_ROUNDS = 100
FEW_PAGES = 64  # so few are not worth another round
REST = 0.003  # seconds: a first guess of what the destination takes to put a state in place


class Progress:
    """How far a migration is. ``phase``: "connecting", "copying", "stopped" (the guest stands still), "committed", "uncertain", "done" or
    "failed". ``rate``, ``dirty_rate``: bytes a second; ``expected``: the downtime if it stopped now, in seconds; ``slowed``: the share of
    time that the guest is kept from running."""

    def __init__(self, memory: int) -> None:
        self.phase, self.round, self.memory = "connecting", 0, memory
        self.left = memory  # bytes still to send
        self.sent = 0
        self.rate = self.dirty_rate = self.expected = self.slowed = self.seconds = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class Migration:
    """One migration of ``machine``, which runs in another thread, to the destination that ``sock`` is connected to.

    ``downtime``: how long the guest may stand still, in seconds: a goal. ``on_progress(progress)`` is called a few times a second and after
    each round. run() does it; cancel() may come from any thread.
    """

    def __init__(
        self,
        machine: Machine,
        sock: Any,
        to: str,
        *,
        downtime: float = DOWNTIME,
        patience: float = PATIENCE,
        on_progress: Callable[[Progress], object] = lambda progress: None,
    ) -> None:
        self.machine, self.to, self.downtime, self.patience = machine, to, downtime, patience
        self.progress = Progress(machine.memory.size)
        self.rounds: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._on_progress, self._shown = on_progress, 0.0
        self._deciding = RLock()  # of "cancelled" and "committed", one comes first
        self._why = ""
        self._began = monotonic()
        self._rest = REST
        self.stream = Stream(sock, patience=patience, check=self._check)
        self._sender = PageSender(self.stream)
        self._paused = machine.group.paused  # it stays so, wherever it ends up
        self._throttle = Throttle(machine.group)

    # --- what others ask ---------------------------------------------------------------------------------------------

    def cancel(self, why: str = "cancelled") -> bool:
        """Give up, if there is still time: the guest goes on here. False: it was committed already."""
        with self._deciding:
            if self.progress.phase in ("committed", "uncertain", "done"):
                return False
            self._why = self._why or why
            return True

    def _check(self) -> None:
        if self._why:
            raise MigrationError(self._why)
        now = monotonic()
        if now - self._shown > 0.2:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        self.progress.sent, self.progress.seconds = self.stream.sent, now - self._began
        self._on_progress(self.progress)

    # --- doing it ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Migrate; returns a report. Raises MigrationError: before the commit the guest goes on here; ``uncertain``, it is paused."""
        try:
            check_not_handed_over(self.machine)
            with self._throttle, DirtyLog(self.machine.vm, self.machine.memory) as log:
                return self._run(log)
        except BaseException as error:
            if self.progress.phase == "committed":
                self.progress.phase = "uncertain"
            elif self.progress.phase not in ("uncertain", "done"):
                self._give_up(str(error) if isinstance(error, PykvmError) else repr(error))
            if isinstance(error, PykvmError) and not isinstance(error, MigrationError):
                raise MigrationError(str(error)) from error
            raise
        finally:
            self._show(monotonic())
            self.stream.close()

    def _give_up(self, why: str) -> None:
        self.progress.phase = "failed"
        self.stream.check, self.stream.patience = lambda: None, 0.5
        try:
            self.stream.send_fields(wire.ABORT, why=why[:2000])
        except MigrationError:
            pass  # it is why we give up, or comes to the same

    def _run(self, log: DirtyLog) -> dict[str, Any]:
        began = monotonic()
        state = self._stand_still()
        self._go_on()
        saving = monotonic() - began
        self.stream.send_fields(wire.HELLO, software="pykvm", memory=self.machine.memory.size, paused=self._paused)
        self.stream.send(wire.STATE, state.to_json().encode())
        self.notes = _texts(self.stream.receive(wire.WELCOME).fields().get("notes"))
        self.progress.phase = "copying"
        left = log.look()
        while True:
            left = self._round(log, left)
            fits = self._plan(left, saving)
            if fits:
                report = self._hand_over(log, saving)
                if report is not None:
                    return report
                left = log.look()
            if len(self.rounds) >= MOST_ROUNDS:
                raise MigrationError(self._too_fast(left))

    def _too_fast(self, left: int) -> str:
        viewed = self.machine.memory.viewed
        why = f"the guest writes too fast: after {len(self.rounds)} rounds {left * PAGE_SIZE >> 10} KiB are left"
        if viewed > left * PAGE_SIZE // 2:
            why = f"{viewed >> 10} KiB of memory are under numpy views of this process, and count as written: let go of them"
        return f"{why}, and sending them takes {self.progress.expected * 1e3:.0f} ms; or give it more time with --downtime"

    def _stand_still(self) -> MachineState:
        """Pause the guest and take its state. Whoever calls this has it go on, or hands it over."""
        self.machine.pause()
        try:
            self._wait_for_all()
            return self.machine.save()
        except BaseException:
            self._go_on()
            raise

    def _go_on(self) -> None:
        """As it was before it was made to stand still."""
        if not self._paused:
            self.machine.resume()

    def _wait_for_all(self) -> None:
        """All vCPUs wait; of a run that has just begun, or is about to end, some have not come to it yet."""
        group, deadline = self.machine.group, monotonic() + 1.0
        while not group.waiting:
            if not group.running or monotonic() > deadline:
                raise MigrationError("the guest is not running, or has just ended")
            sleep(5e-4)

    def _round(self, log: DirtyLog, left: int) -> int:
        """Send what is dirty; how many pages are dirty after that."""
        progress, sender = self.progress, self._sender
        progress.round, progress.left = progress.round + 1, left * PAGE_SIZE
        pages, zeros, sent, began = sender.pages, sender.zeros, self.stream.sent, monotonic()
        sender.send_all(log, self._check)
        self.stream.send(wire.ROUND)
        self.stream.receive(wire.ROUND_DONE)
        seconds = max(monotonic() - began, 1e-6)
        dirty = log.look()
        sent, pages, zeros = self.stream.sent - sent, sender.pages - pages, sender.zeros - zeros
        self.rounds.append({
            "pages": pages, "zeros": zeros, "bytes": sent, "seconds": seconds, "dirty": dirty, "slowed": self._throttle.share,
        })  # fmt: skip
        if pages > 256 or not progress.rate:  # of a short round, most is waiting for its end
            rate = (sent + zeros * PAGE_SIZE / 8) / seconds  # a zero page is looked at, and not sent
            progress.rate = (progress.rate + rate) / 2 if progress.rate else rate  # one round may have had bad luck
        progress.dirty_rate = dirty * PAGE_SIZE / seconds
        return dirty

    def _plan(self, left: int, saving: float) -> bool:
        """Does what is left fit into the downtime? If it does not, and rounds do not get shorter, slow the guest."""
        progress = self.progress
        progress.left = left * PAGE_SIZE
        progress.expected = self._expected(left, saving)
        fits = self._fits(left, saving, 0.5)  # the guest writes on until it stands, and the rate is an estimate
        if not fits and len(self.rounds) > 1 and left > self.rounds[-1]["pages"] / 2:
            self._throttle.more()
            progress.slowed = self._throttle.share
        self._show(monotonic())
        return fits

    def _expected(self, left: int, saving: float) -> float:
        return saving + self._rest + left * PAGE_SIZE / self.progress.rate

    def _fits(self, left: int, saving: float, share: float) -> bool:
        """Into a share of what saving and restoring leave of the goal; where they leave less than a quarter, into a share of that: no
        round would change it."""
        allowed = max(self.downtime - saving - self._rest, self.downtime / 4)
        return left <= FEW_PAGES or left * PAGE_SIZE / self.progress.rate <= share * allowed

    def _hand_over(self, log: DirtyLog, saving: float) -> dict[str, Any] | None:
        """Stop the guest here and start it there. None: it wrote a lot just before it stopped, and goes on for another round."""
        progress, stream = self.progress, self.stream
        stopped = monotonic()
        state = self._stand_still()
        times = [stopped, monotonic()]
        try:
            left = log.look()
            if not self._fits(left, saving, 1.0) and len(self.rounds) < MOST_ROUNDS:
                self._go_on()
                return None
            progress.phase, progress.left = "stopped", left * PAGE_SIZE
            stream.patience = max(STANDING, 10 * self.downtime)
            before = stream.sent
            self._sender.send_all(log, self._check)
            stream.send(wire.STATE, state.to_json().encode())
            times.append(monotonic())
            notes = _texts(stream.receive(wire.READY).fields().get("notes"))
            self.notes = list(dict.fromkeys([*self.notes, *notes]))  # most of them have come with WELCOME
            times.append(monotonic())
            with self._deciding:
                self._check()
                progress.phase, self.machine.handed_to = "committed", self.to
                whole = stream.send_at_once(wire.COMMIT)
                if whole is False:
                    progress.phase, self.machine.handed_to = "stopped", None
                    raise MigrationError("the other side went away when it was ready")
        except BaseException:
            if progress.phase != "committed":
                self._go_on()
            raise
        self._wait_until_it_runs(whole is True)
        times.append(monotonic())
        phases = dict(zip(("saving", "sending", "restoring", "starting"), (b - a for a, b in pairwise(times)), strict=True))
        return self._report(times[-1] - stopped, {"pages": left, "bytes": stream.sent - before, **phases})

    def _wait_until_it_runs(self, whole: bool) -> None:
        """From here on, nothing resumes the guest but its user."""
        self.stream.check = lambda: None
        try:
            if not whole:
                raise MigrationError("COMMIT was cut off amid its bytes")
            self.stream.receive(wire.RUNNING)
        except BaseException as error:
            self.progress.phase = "uncertain"
            raise MigrationError(
                f"the guest was handed over to {self.to}, but no answer came ({error}): it runs there, or nowhere. It stays paused here, "
                "with its state kept: look at the other side, then quit this one, or resume it if, and only if, it does not run there",
                uncertain=True,
            ) from error
        self.progress.phase, self.progress.left = "done", 0
        self.machine.leave(self.to)

    def _report(self, downtime: float, last: dict[str, Any]) -> dict[str, Any]:
        return {
            "to": self.to,
            "paused": self._paused,
            "seconds": monotonic() - self._began,
            "downtime": downtime,
            "goal": self.downtime,
            "memory": self.progress.memory,
            "bytes": self.stream.sent,
            "pages": self._sender.pages,
            "zeros": self._sender.zeros,
            "rounds": self.rounds,
            "last": last,
            "slowed": self._throttle.share,
            "notes": self.notes,
        }


def check_not_handed_over(machine: Machine) -> None:
    """A guest that may run somewhere else must not move on from here. Raises MigrationError."""
    if machine.handed_to is not None:
        raise MigrationError(f"the guest may run at {machine.handed_to} already: resume this one first, if it does not")


def migrate(machine: Machine, to: str, **options: Any) -> dict[str, Any]:
    """Migrate to ``unix:PATH``, where ``pykvm receive`` waits; from another thread than the machine's. Migration says what it raises."""
    from pykvm.unixsocket import connect, path_of

    path = path_of(to, "--to")
    try:
        sock = connect(path)
    except OSError as error:
        raise MigrationError(f"nobody receives at {to} ({error.strerror or error}): start `pykvm receive {to}` there first") from None
    return Migration(machine, sock, to, **options).run()


def _texts(value: Any) -> list[str]:
    """What the other side says, made harmless."""
    return [" ".join(str(text).split())[:500] for text in value[:100]] if isinstance(value, list) else []
