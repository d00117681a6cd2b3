"""Gives a run directory, or an artefact that is being built, one owner at a time; a dead owner loses its lease.

A lease is a directory of numbered claims, ``.lease/000000007.json``. A process takes the lease by creating the next
number, which only one process can do; the highest number is the owner. The owner renews its claim by rewriting it with
another beat and releases it by marking it as released; it never removes the highest claim. Clocks of different machines
are never compared. A waiting process takes the owner for dead when its beat has not changed for ``ttl`` seconds on the
waiter's own clock, or, on the same machine, when its process is gone.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from bitgenome.common import layout
from bitgenome.common.errors import StorageError, UserError
from bitgenome.common.files import json_object
from workers.storage.folders import open_folder

log = logging.getLogger(__name__)

TTL_S = 60.0
BEATS = 6  # renewals within ``ttl``, the time after which an owner without one is dead


class LeaseHeldError(UserError):
    """Raised when another live process owns the lease."""


class LeaseLostError(UserError):
    """Raised when this process has lost its lease; it must write nothing more."""


@dataclass(frozen=True)
class Claim:
    """Holds one numbered file of a lease: the owner and its last beat."""

    owner: str  # unique for each claim
    host: str
    machine: str  # identifies machine, boot and PID namespace; see this_machine()
    pid: int
    started: float  # when the process began; see started()
    ttl: float
    beat: int = 0
    beaten: float = 0.0  # seconds since the machine's boot: comparable on the same machine only
    released: bool = False

    @property
    def gone(self) -> bool:
        """Whether the owner's process is known to have ended; always False for a process of another machine."""
        if self.machine != this_machine():
            return False
        try:
            return started(self.pid) != self.started
        except psutil.NoSuchProcess:
            return True

    def to_bytes(self) -> bytes:
        """Return the claim as JSON."""
        return json.dumps(asdict(self)).encode()


@cache
def this_machine() -> str:
    """Return a name that differs between machines, between boots, and between containers with own PID namespaces."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {space.readlink()}" if boot.exists() else f"{socket.gethostname()}"


def since_start() -> float:
    """Return the seconds since the machine's boot, time suspended included."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def started(pid: int) -> float:
    """Return when a process began, on a clock that nobody sets: kernel ticks on Linux (proc_pid_stat(5), field 22).

    psutil adds the boot time to them, which moves when the clock is set. Raises psutil.NoSuchProcess.
    """
    if not psutil.LINUX:
        return psutil.Process(pid).create_time()
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return float(status.rpartition(")")[2].split()[19])


class Lease:
    """Holds the lease of ``folder``, a path or fsspec URL, while its context lasts.

    ``what`` names the lease in messages; ``ttl`` is the time in seconds after which an owner without a beat is dead.
    Entering raises LeaseHeldError while a live owner holds the lease, or with ``wait`` waits for it. Once the lease is
    lost, ``check`` raises LeaseLostError. If the thread that entered is the main one, it is interrupted too, and
    leaving the context turns that interrupt into LeaseLostError.
    """

    def __init__(self, folder: str | Path, what: str, *, wait: bool = False, ttl: float = TTL_S):
        self.what, self.wait, self.ttl = what, wait, ttl
        self._files = open_folder(f"{folder}/{layout.LEASE}")
        self._number = 0
        self._lost = ""  # why it was lost, empty while it is held
        self._mutex = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._acquire()
        self._interrupts = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {self.what}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        try:
            self._thread.join()
        except KeyboardInterrupt as interrupt:  # sent by the renewing thread just before it ended
            error = error or interrupt
        if self._lost:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise LeaseLostError(self._lost) from None
            return
        try:
            self._renew(released=True)
        except (StorageError, LeaseLostError):  # other processes will see that the owner is dead
            log.debug("the lease of %s could not be released", self.what)

    def check(self) -> None:
        """Raise LeaseLostError unless this process still owns the lease.

        The claim is renewed first if its last beat is at least ``ttl`` / 2 seconds old.
        """
        if not self._lost and since_start() - self._claim.beaten >= self.ttl / 2:
            self._keep()
        if self._lost:
            raise LeaseLostError(self._lost)

    def _acquire(self) -> None:
        """Take the lease; wait for it, or raise LeaseHeldError, while a live owner holds it."""
        seen, since, told = None, since_start(), ""
        while True:
            number, claim = self._highest()
            alive = claim is not None and seen is not None and claim != seen and claim.owner == seen.owner
            if claim != seen:
                seen, since = claim, since_start()
            ours = claim is not None and claim.machine == this_machine()
            idle = since_start() - (claim.beaten if claim is not None and ours else since)
            if claim is None or claim.released or claim.gone or idle >= max(self.ttl, claim.ttl):
                if self._take(number + 1):
                    return
            elif not self.wait and (ours or alive):
                raise LeaseHeldError(
                    f"expected {self.what} to be nobody else's, found process {claim.pid} on {claim.host} at work on "
                    f"it (its last beat was {idle:.0f} s ago)"
                )
            else:
                if told != claim.owner:
                    log.info("waiting for %s: process %d on %s is at work on it", self.what, claim.pid, claim.host)
                    told = claim.owner
                time.sleep(min(1.0, self.ttl / BEATS / 2))

    def _highest(self) -> tuple[int, Claim | None]:
        """Return the highest number and its claim, or 0 and None if there is no claim."""
        while names := self._files.sizes():
            name = max(names)
            data = self._files.read(name)
            if not data:  # just removed because a higher one exists, or not written yet
                continue
            try:
                return int(Path(name).stem), Claim(**json.loads(data))
            except (ValueError, TypeError):
                raise StorageError(f"expected a claim in {self._files.location}/{name}, found something else") from None
        return 0, None

    def _take(self, number: int) -> bool:
        """Create the claim ``number``, and return whether this process owns the lease."""
        process = (socket.gethostname(), this_machine(), os.getpid(), started(os.getpid()))
        claim = Claim(uuid.uuid4().hex, *process, self.ttl, beaten=since_start())
        if not self._files.create(file_name(number), claim.to_bytes()):
            return False
        names = sorted(self._files.sizes())
        if names[-1:] != [file_name(number)]:  # while this process slept, others took and left the lease
            self._files.delete(file_name(number))
            return False
        for name in names[:-1]:
            self._files.delete(name)
        self._number, self._claim = number, claim
        return True

    def _renew(self, released: bool = False) -> None:
        """Write another beat. Raises LeaseLostError if there is a higher claim, or none."""
        with self._mutex:
            number, claim = self._highest()
            if number != self._number:
                by = f"process {claim.pid} on {claim.host} at work on it" if claim else "its lease removed"
                raise LeaseLostError(
                    f"expected {self.what} to stay this process's own, found {by}: this one had paused, and stops"
                )
            renewed = replace(self._claim, beat=self._claim.beat + 1, beaten=since_start(), released=released)
            self._files.write(file_name(number), renewed.to_bytes())
            self._claim = renewed

    def _keep(self) -> None:
        """Renew the claim; storage may fail to answer until the lease runs out."""
        try:
            self._renew()
        except LeaseLostError as error:
            self._lost = str(error)
        except StorageError as error:
            if since_start() - self._claim.beaten >= self.ttl:
                self._lost = str(error)

    def _beat(self) -> None:
        """Renew the claim until the lease is left or lost; interrupt the main thread if it is lost."""
        while not self._stopping.wait(self.ttl / BEATS):
            self._keep()
            if self._lost:
                if self._interrupts:
                    interrupt_main_thread()
                return


def is_owned(location: str | Path) -> bool:
    """Return whether a live driver holds the lease of a run, or of an artefact, at a path or URL. Raises StorageError.

    Of a driver on another machine only the time of its last beat is known: by the storage's clock, compared with this
    machine's.
    """
    folder = open_folder(f"{location}/{layout.LEASE}")
    name = max(folder.sizes(), default=None)
    if name is None:
        return False
    try:
        claim = Claim(**json_object(folder.read(name) or b""))
    except TypeError:
        return False
    beaten = since_start() - claim.beaten
    if claim.machine != this_machine():
        beaten = time.time() - (folder.modified(name) or 0.0)
    return not claim.released and not claim.gone and beaten < max(TTL_S, claim.ttl)


def file_name(number: int) -> str:
    """Return the name of the file of a claim."""
    return f"{number:09d}.json"


def interrupt_main_thread() -> None:
    """Interrupt the main thread as Ctrl-C does.

    SIGTERM is sent where SIGINT is ignored, as in a shell's background job.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(signum)) and (main := threading.main_thread().ident) is not None:
            signal.pthread_kill(main, signum)
            return
