"""One owner at a time of a folder or a file, over processes and machines; whoever died holds nothing.

A lock is a small file that names its owner and counts up every BEAT seconds, written by a thread of the owner. Whether
an owner on this machine lives, the system knows; one on another machine is dead when its count stood still for SILENT
seconds of the observer's clock. Neither needs a file system that knows locks, nor clocks that agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import signals
from utils.errors import UserError

BEAT = 5.0  # seconds
SILENT = 60.0  # seconds; above the 30 for which network file systems may hold back what another machine wrote
SAID_AFTER = 5.0  # seconds of waiting, after which it is said what is waited for
POLL = 0.02  # seconds
MOST_BYTES = 65536  # of a lock file that are looked at


def machine() -> str:
    """8 digits of this machine since it was started; of this container, where processes are numbered anew."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def process(pid: int) -> tuple[str, str]:
    """(state, start) of a process of this machine as far as the system says; the state is "" where there is none."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "", ""
    except PermissionError:  # of somebody else
        pass
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "?", ""
    return ("" if state in "ZX" else state), others[18]  # a zombie has ended


class Lock:
    """A lock file. `doing`: what its owner does, for others: "trains into runs/x"."""

    def __init__(self, path: Path, doing: str) -> None:
        self.path, self.doing, self.beats = path, doing, 0

    def _content(self) -> bytes:
        pid = os.getpid()
        owner = {"machine": machine(), "host": socket.gethostname(), "pid": pid, "start": process(pid)[1]}
        about = owner | {"token": self.token, "doing": self.doing, "since": self.since, "beats": f"{self.beats:09}"}
        return json.dumps(about).encode()

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        """Content, and what it says: nothing of a file that is just being made."""
        content = _bytes(self.path)
        with contextlib.suppress(ValueError, TypeError):
            return content, {"machine": "", "token": "", "pid": 0, "start": ""} | json.loads(content)
        return content, {}

    def mine(self) -> bool:
        """Whether this object owns the file: nobody took this process, frozen for long, for dead."""
        with contextlib.suppress(OSError):
            return self._read()[1].get("token") == self.token
        return False

    def require(self, remedy: str) -> None:
        """Raises UserError where the lock was lost."""
        if not self.mine():
            raise UserError(f"{self.path}: another process has taken over, as this one did not answer; {remedy}")

    def check(self, remedy: str) -> None:
        """UserError where a living owner has it; it is not taken, and nothing is made."""
        if self.path.exists():
            with self.held(remedy):
                pass

    @contextlib.contextmanager
    def held(self, remedy: str = "") -> Iterator[Lock]:
        """Own it within. remedy: what to do where a living owner has it, which is then a UserError; else wait for it.

        A wait for more than some seconds is said, with the owner's name. Raises OSError where nothing can be written.
        """
        self._acquire(remedy)
        _beating.add(self)
        _beat_on()
        try:
            yield self
        finally:
            _beating.discard(self)
            with contextlib.suppress(OSError):
                if self.mine():
                    self.path.unlink()

    def _acquire(self, remedy: str) -> None:
        began = since = time.monotonic()
        seen, said, took_over = None, False, False
        while not self._create(took_over):
            content, owner = self._read()
            now, lives = time.monotonic(), _lives(owner)
            if content != seen:
                if lives is None and seen:
                    lives = True  # it counts
                seen, since = content, now
            if lives is False or (lives is None and now - since > SILENT):
                took_over = self._bury(content) or took_over
                continue
            if lives and remedy:
                raise UserError(f"{self._name(owner)}; {remedy}")
            if not said and now - began > SAID_AFTER:
                print(f"waiting: {self._name(owner)}", flush=True)
                said = True
            signals.obey_in_thread()
            time.sleep(POLL if now - began < 1 else 10 * POLL)

    def _name(self, owner: dict[str, Any]) -> str:
        if not owner:
            return f"{self.path}: another process holds this lock"
        stopped = owner["machine"] == machine() and process(owner["pid"])[0] == "T"
        more = f", and is stopped (kill -CONT {owner['pid']} lets it go on)" if stopped else ""
        who = f"process {owner['pid']} on {owner.get('host')}"
        return f"{self.path}: {who} {owner.get('doing')} since {owner.get('since')}{more}"

    def _create(self, took_over: bool) -> bool:
        self.token, self.since = secrets.token_hex(8), time.strftime("%d %b %H:%M:%S")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(self.path).st_mode):
                    raise UserError(
                        f"{self.path}: is a link or no regular file, where a lock belongs; remove it"
                    ) from None
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(self._content())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        if took_over:  # who found the same dead owner may just be burying this lock by mistake, and put it back
            time.sleep(5 * POLL)
            return self.mine()
        return True

    def _bury(self, content: bytes) -> bool:
        """Remove what a dead owner left, unless it is no longer that. Renaming gives a file to one process only."""
        grave = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.tmp")
        try:
            os.rename(self.path, grave)
        except FileNotFoundError:
            return False
        if _bytes(grave) != content:
            with contextlib.suppress(OSError):
                os.link(grave, self.path)
        grave.unlink()
        return True

    def beat(self) -> None:
        self.beats += 1
        with contextlib.suppress(OSError):
            if self.mine():
                with open(self.path, "r+b") as file:
                    file.write(self._content())


def _bytes(path: Path) -> bytes:
    """What is in a file, where there is one and it is an ordinary one."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_file():
            return path.read_bytes()[:MOST_BYTES]
    return b""


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the owner lives; None where only time can tell."""
    if not owner or owner["machine"] != machine():
        return None
    state, start = process(owner["pid"])
    return bool(state) and start == owner["start"]


_beating: set[Lock] = set()
os.register_at_fork(after_in_child=_beating.clear)
_thread: tuple[int, threading.Thread] | None = None


def _beat_on() -> None:
    """One thread per process counts for all its locks."""
    global _thread
    if _thread and _thread[0] == os.getpid() and _thread[1].is_alive():
        return

    def beat() -> None:
        while True:
            time.sleep(BEAT)
            for lock in list(_beating):
                lock.beat()

    _thread = os.getpid(), threading.Thread(target=beat, daemon=True, name="locks")
    _thread[1].start()
