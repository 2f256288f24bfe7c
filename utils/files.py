"""Files that are never half there: written under another name, flushed to the disk, and moved in one step."""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import io
import json
import math
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import locks, signals
from utils.errors import UserError

FORMULA = re.compile(r"'*([=+@\t\r]|-(?![\d.]))")  # how a text begins that spreadsheets calculate, or one marked so
FORGOTTEN = 86400.0  # seconds after which the temporary file of another machine is nobody's any more


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, in one move, when the block ends without an error.

    Makes the folder. A signal waits until the file is in its place. Raises UserError naming the file that cannot be
    written; leaves no temporary file, neither its own nor that of a process that was killed.
    """
    with signals.noted(), temporary_file(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)


def write_together(contents: Mapping[Path, bytes], last: Collection[Path] = ()) -> None:
    """Several files that belong together: none takes its place before all are whole on the disk.

    last: those of them that speak of the others; where one is there from before, it goes first, so that a process that
    is killed in between leaves none that speaks of other files. Raises UserError as `whole_file` does.
    """
    with signals.noted(), contextlib.ExitStack() as stack:
        written = {}
        for path, content in contents.items():
            with writing(path):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a folder")
                temporary = written[path] = stack.enter_context(temporary_file(path))
                temporary.write_bytes(content)
                _flush(temporary)
        for path in last:
            with writing(path):
                path.unlink(missing_ok=True)
        for path in [*(path for path in written if path not in last), *last]:
            with writing(path):
                os.replace(written[path], path)
        for folder in {path.parent for path in written}:
            _flush_folder(folder)


@contextlib.contextmanager
def owned(folder: Path, doing: str) -> Iterator[locks.Lock]:
    """Within, a folder is this process's; it is made, and goes again when nothing has come into it.

    doing: what this process does, for others: "trains into runs/x". Raises UserError where another process has it, by
    name, or where nothing can be written.
    """
    lock = locks.Lock(folder / ".lock", doing)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        with writing(lock.path):
            stack.enter_context(lock.held("wait for it or stop it, or choose another --dump_path"))
        yield lock


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A free name beside `path`, gone when the block ends; errors of writing name `path`, the reason and a remedy."""
    temporary = path.with_name(f".{path.name}.{locks.machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                if not _writer_lives(leftover):
                    leftover.unlink(missing_ok=True)
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of writing become a UserError that names `path`, the reason and a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause: BaseException | None = error
        while cause and not getattr(cause, "strerror", None):
            cause = cause.__cause__ or cause.__context__
        reason = cause.strerror if cause else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another folder") from None


def write_text(text: str, path: Path) -> None:
    """A whole text file, in UTF-8; bytes of a file name that are none are written as they are shown, \\udcff."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(value: Any, path: Path) -> None:
    """A whole JSON file, of `json_text`."""
    write_text(json_text(value), path)


def json_text(value: Any) -> str:
    """JSON in which NaN and infinities are null, which every reader knows."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str] = ()) -> None:
    """A whole CSV file, of `csv_text`."""
    write_text(csv_text(rows, columns), path)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """CSV with `columns` and all others of the rows, in the order in which they first appear.

    Texts that a spreadsheet would take for formulas, as names of files may be, get an apostrophe before them, which
    `read_csv` takes away again.
    """
    text = io.StringIO()
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_text(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _as_written(text: str) -> str:
    marked = text.startswith("'") and FORMULA.match(text)
    return text[1:].strip() if marked else text.strip()


def _as_text(value: Any) -> Any:
    if not (isinstance(value, str) and FORMULA.match(value)):
        return value
    with contextlib.suppress(ValueError):
        float(value)  # a negative number
        return value
    return f"'{value}"


def shown(path: Path | str) -> str:
    """A name for people: one line, without what turns or colours the text around it; such characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def require_ordinary(path: Path) -> None:
    """Raises UserError for what is there but no file: to open a pipe waits until somebody writes into it, for ever."""
    with contextlib.suppress(OSError):  # which opening it will name
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a pipe or device"
            raise UserError(f"{path}: is {what}, not a file; name an ordinary file")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, ValueError; UserError for a pipe or folder."""
    require_ordinary(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def read_csv(path: str | Path, option: str, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Lines of a CSV file, at least one, as dictionaries of stripped texts.

    option: what names the file, for the UserErrors that say what is wrong with it.  columns: that it must have.
    """
    require_ordinary(Path(path))
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read ({error.strerror}); name an existing CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path}: is not a CSV text file ({error}); export it again, as UTF-8") from None
    if not rows:
        raise UserError(f"{option}: {path}: has no lines below its header")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{option}: {path}, line {line}: has not the header's {len(reader.fieldnames)} fields")
    rows = [{key.strip(): _as_written(value) for key, value in row.items()} for row in rows]
    if lacking := [name for name in columns if name not in rows[0]]:
        raise UserError(f"{option}: {path} has no column {', '.join(lacking)}, but {', '.join(rows[0])}")
    return rows


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Makes renamings last through a power failure, where that can be asked."""
    with contextlib.suppress(OSError):
        _flush(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _writer_lives(leftover: Path) -> bool:
    """Whether the process in the name of a temporary file may still run."""
    machine, _, process = leftover.name.rsplit(".", 2)[-2].partition("-")
    pid = process.partition("-")[0]
    if machine == locks.machine() and pid.isdecimal():
        return bool(locks.process(int(pid))[0])
    with contextlib.suppress(OSError):
        return time.time() - leftover.stat().st_mtime < FORGOTTEN
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
