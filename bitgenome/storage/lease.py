"""Leases: one owner at a time of a run directory or of an artefact that is being built; a dead owner loses its own.

A lease is a folder of numbered claims, ``.lease/000000007.json``. A claim is taken by creating the next number, which
only one process can; the highest number owns. It is renewed by rewriting it with another beat, released by saying so in
it, and never removed while it is the highest. No clock is ever compared with another machine's: who waits holds an
owner for dead when its beat has not changed for ``ttl`` seconds on the waiter's own clock, or, on the same machine,
when its process is gone.
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
from workers.storage.folders import open_folder

log = logging.getLogger(__name__)

TTL_S = 60.0
BEATS = 6  # in the time after which an owner without one is dead


class LeaseHeldError(UserError):
    """Another living process owns what was asked for."""


class LeaseLostError(UserError):
    """This process owned it and does no longer; nothing more may be written."""


@dataclass(frozen=True)
class Claim:
    """One file of the folder."""

    owner: str  # unique for each claim
    host: str
    machine: str  # of processes whose numbers mean the same
    pid: int
    started: float  # of the process; see started()
    ttl: float
    beat: int = 0
    beaten: float = 0.0  # seconds since the machine's start: of use on the same machine only
    released: bool = False

    @property
    def gone(self) -> bool:
        """Whether it is plain that its process does not run any more."""
        if self.machine != this_machine():
            return False
        try:
            return started(self.pid) != self.started
        except psutil.NoSuchProcess:
            return True

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@cache
def this_machine() -> str:
    """Differs between machines, their starts, and containers that number processes on their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {space.readlink()}" if boot.exists() else f"{socket.gethostname()}"


def since_start() -> float:
    """Seconds since the machine's start, suspended or not."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def started(pid: int) -> float:
    """When a process began, in a count that nobody sets: the kernel's ticks on Linux (proc_pid_stat(5), field 22).

    psutil adds the time of the machine's start to them, which moves as its clock is set. Raises psutil.NoSuchProcess.
    """
    if not psutil.LINUX:
        return psutil.Process(pid).create_time()
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return float(status.rpartition(")")[2].split()[19])


class Lease:
    """The lease of ``folder``, a path or fsspec URL; a context manager. ``what`` names it in sentences.

    Entering raises LeaseHeldError while a living owner has it, or waits for its end (``wait``). Once the lease is lost,
    ``check`` raises LeaseLostError, the thread that entered is interrupted if it is the main one, and leaving turns
    that interrupt into LeaseLostError.
    """

    def __init__(self, folder: str | Path, what: str, *, wait: bool = False, ttl: float = TTL_S):
        self.what, self.wait, self.ttl = what, wait, ttl
        self._files = open_folder(f"{folder}/{layout.LEASE}")
        self._number = 0
        self._lost = ""  # why
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
        except KeyboardInterrupt as interrupt:  # sent by the thread just now
            error = error or interrupt
        if self._lost:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise LeaseLostError(self._lost) from None
            return
        try:
            self._renew(released=True)
        except (StorageError, LeaseLostError):  # others will see that it is dead
            log.debug("the lease of %s could not be released", self.what)

    def check(self) -> None:
        """Raise LeaseLostError unless this process still owns it; storage is asked where that was a while ago."""
        if not self._lost and since_start() - self._claim.beaten >= self.ttl / 2:
            self._keep()
        if self._lost:
            raise LeaseLostError(self._lost)

    def _acquire(self) -> None:
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
        """The highest number and its claim; 0 where there is none."""
        while names := self._files.sizes():
            name = max(names)
            data = self._files.read(name)
            if not data:  # removed meanwhile, as there is a higher one, or about to be written
                continue
            try:
                return int(Path(name).stem), Claim(**json.loads(data))
            except (ValueError, TypeError):
                raise StorageError(f"expected a claim in {self._files.location}/{name}, found something else") from None
        return 0, None

    def _take(self, number: int) -> bool:
        """Create the claim ``number``; whether this process now owns the lease."""
        process = (socket.gethostname(), this_machine(), os.getpid(), started(os.getpid()))
        claim = Claim(uuid.uuid4().hex, *process, self.ttl, beaten=since_start())
        if not self._files.create(file_name(number), claim.to_bytes()):
            return False
        names = sorted(self._files.sizes())
        if names[-1:] != [file_name(number)]:  # this process slept, and others came and went
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
        """Renew; storage that does not answer may do so until the lease runs out."""
        try:
            self._renew()
        except LeaseLostError as error:
            self._lost = str(error)
        except StorageError as error:
            if since_start() - self._claim.beaten >= self.ttl:
                self._lost = str(error)

    def _beat(self) -> None:
        while not self._stopping.wait(self.ttl / BEATS):
            self._keep()
            if self._lost:
                if self._interrupts:
                    interrupt_main_thread()
                return


def file_name(number: int) -> str:
    return f"{number:09d}.json"


def interrupt_main_thread() -> None:
    """As Ctrl-C does; by another signal where that one is ignored, as in a shell's background job."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(signum)) and (main := threading.main_thread().ident) is not None:
            signal.pthread_kill(main, signum)
            return
