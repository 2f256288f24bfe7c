"""Hostile input: mutated files for every reader, each to be read or refused with the project's own error.

    python -m benchmarks.fuzz                                # 20,000 mutated inputs over five readers
    python -m benchmarks.fuzz --guided 60                    # and a minute of coverage-guided fuzzing of each (atheris)

A reader may return or raise UserError. Anything else is a crash; so is taking more than SECONDS, more memory than
LIMIT_BYTES over what the process had, or touching the file that a planted pickle or YAML tag would write.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse.typing import NonNegativeInt

import mask_swav
from datasets.check import header_warnings
from datasets.index import inspect_tree
from utils import checkpoint
from utils import config as configuration
from utils.errors import UserError

SECONDS = 5
LIMIT_BYTES = 2**30
PLANTED = "planted"  # the file that executed input would make, in the working directory of the fuzzer


@dataclass
class Config:
    inputs: NonNegativeInt = 20_000
    """mutated inputs, over all readers"""
    seed: NonNegativeInt = 0
    """of the mutations"""
    guided: NonNegativeInt = 0
    """seconds of coverage-guided fuzzing of each reader"""
    only: str | None = None
    """one reader, guided in this process (used by --guided itself)"""


class Refused(Exception):
    """The input was refused as the project refuses input."""


class Reader:
    """What is tried: `seeds` are good inputs, `read` takes mutated bytes and returns or raises Refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.seeds = list(self.good())

    def good(self) -> Iterator[bytes]:
        raise NotImplementedError

    def read(self, data: bytes) -> Any:
        raise NotImplementedError


class Volumes(Reader):
    """The NPY reader and the header check: a data set of one file."""

    suffix = ".npy"

    def good(self) -> Iterator[bytes]:
        for dtype in ("<f4", ">i2", "|u1", "<f8", "<u8"):
            for order in "CF":
                yield _npy(np.ones((9, 10, 11), dtype, order))
        yield _npy(np.ones((9, 10), np.float32))
        yield _npy(np.ones((9, 10, 11), np.complex64))
        yield _npy(np.ones(4, [("a", "<i4"), ("b", "<f4", 3)]))
        for version in ((2, 0), (3, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, np.ones((8, 9, 10), np.float32), version)
            yield file.getvalue()
        yield _npy(np.array([[[Plant()]]], dtype=object), pickled=True)
        for shape in ("1000000, 1000000, 1", "9" * 5000, "-1, 9, 9", "9, 9, 9" + ", 9" * 60, "9., 9, 9", "True, 9, 9"):
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
            yield b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 65536) + header
        yield b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 200
        yield b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000
        yield b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 9000

    def read(self, data: bytes) -> Any:
        root = self.folder / "tree"
        (root / "Set").mkdir(parents=True, exist_ok=True)
        (root / "Set" / f"case{self.suffix}").write_bytes(data)
        samples, problems = inspect_tree(root)
        if problems:
            raise Refused
        header_warnings(samples)
        for sample in samples:
            if sample.kind == "volume":  # what the header says is what the file holds
                np.load(sample.path, mmap_mode="r", allow_pickle=False)
        return samples


class DataSettings(Volumes):
    """dataset.yaml beside a good volume."""

    def good(self) -> Iterator[bytes]:
        yield b"window: [-1000, 400]\nslice_axis: 2\nmodality: CT\nspacing_mm: [1.0, 0.5, 0.5]\n"
        yield b"# a note\nwindow:\n  - -1e3\n  - .inf\n"
        yield from _yaml_traps("window")

    def read(self, data: bytes) -> Any:
        root = self.folder / "tree"
        (root / "Set").mkdir(parents=True, exist_ok=True)
        if not (root / "Set" / "case.npy").exists():
            np.save(root / "Set" / "case.npy", np.ones((9, 10, 11), np.float32))
        (root / "Set" / "dataset.yaml").write_bytes(data)
        samples, problems = inspect_tree(root)
        if problems:
            raise Refused
        return samples


class Options(Reader):
    """A file for --config."""

    def good(self) -> Iterator[bytes]:
        yield yaml.safe_dump(configuration.to_dict(mask_swav.Config()), sort_keys=False).encode()
        yield b"epochs: 20\nbase_lr: 0.25\ntarget_shape: [32, 96, 96]\n"
        yield b"data_path: /data\ncache_path: null\nmask_style: span\n"
        yield from _yaml_traps("target_shape")

    def read(self, data: bytes) -> Any:
        path = self.folder / "my.yaml"
        path.write_bytes(data)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            try:
                config = configuration.parse(mask_swav.Config, None, ["--config", str(path)])
                configuration.check(config)
            except SystemExit as stopped:  # how a wrong option is refused, on the command line as in a file
                if stopped.code != 2:
                    raise RuntimeError(f"exit code {stopped.code}") from None
                raise Refused from None
        return config


class Checkpoints(Reader):
    """Checkpoints that rotted on disk: the checksum at their end is as it was."""

    def good(self) -> Iterator[bytes]:
        torch.manual_seed(0)
        states = [
            {"learner": {"w": torch.randn(3, 4), "n": torch.tensor(5)}, "epoch": 1, "seen": 8, "sums": {"loss": 0.5}},
            {"learner": {"h": torch.randn(4).half(), "i": torch.arange(6)}, "epoch": 0, "seen": 0, "memory": {}},
        ]
        for state in states:
            file = io.BytesIO()
            torch.save(state, file)
            yield self.sealed(file.getvalue())

    @staticmethod
    def sealed(content: bytes) -> bytes:
        return content + checkpoint.SEAL + hashlib.sha256(content).hexdigest().encode()

    def read(self, data: bytes) -> Any:
        path = self.folder / "checkpoint.pth"
        path.write_bytes(data)
        return checkpoint.read(path)


class ForgedCheckpoints(Checkpoints):
    """Checkpoints by somebody who knows how the checksum is made."""

    def good(self) -> Iterator[bytes]:
        for data in super().good():
            yield data[: -checkpoint.SEAL_BYTES]
            # Mutations inside the pickle and the records survive the archive's own checksums.
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                parts = {name: archive.read(name) for name in archive.namelist()}
            for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                yield _zip(parts, method)
            for bad in (pickle.dumps(Plant(), 2), b"cbuiltins\nbytearray\n(L1000000000000L\ntR.", b"(" * 5000 + b"."):
                yield _zip({**parts, "archive/data.pkl": bad}, zipfile.ZIP_STORED)
            yield _zip({**parts, "archive/data/9": bytes(2**20)}, zipfile.ZIP_DEFLATED)

    def read(self, data: bytes) -> Any:
        return super().read(self.sealed(data))


READERS = (Volumes, DataSettings, Options, Checkpoints, ForgedCheckpoints)


class Plant:
    """Makes the file PLANTED where it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple[str, int]]:
        return os.open, (PLANTED, os.O_CREAT | os.O_WRONLY)


def _npy(array: np.ndarray, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def _zip(parts: dict[str, bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def _yaml_traps(key: str) -> Iterator[bytes]:
    yield f"{key}: !!python/object/apply:os.system ['touch {PLANTED}']\n".encode()
    yield f"{key}: {'[' * 3000}".encode()
    yield f"{key}: {'{a: ' * 3000}".encode()
    yield f"{key}: {'9' * 20000}\n".encode()
    yield f"{key}: 2001-99-99\n".encode()
    yield f"{key}: !!binary '%%%'\n? [a]\n: 1\n".encode()
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    yield "\n".join([*bomb, f"{key}: *a11"]).encode()
    yield f"{key}: &a [*a]\n".encode()


# ---- mutations


NUMBERS = (b"0", b"-1", b"1", b"255", b"65536", b"4294967296", b"1000000000000", b"18446744073709551615", b"1e999")
PIECES = (
    b"\x00",
    b"\xff",
    b"'",
    b'"',
    b"(",
    b")",
    b"[",
    b"{",
    b"*",
    b"&",
    b"!!",
    b"\n",
    b": ",
    b"PK\x03\x04",
    b"\x80\x02c",
)


def mutate(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A few random changes: bits, bytes, numbers, cuts, repeats, pieces of other inputs."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at = draw.randrange(len(out) + 1)
        # Headers stand at the start: half of the changes go there.
        at = at if draw.random() < 0.5 else min(at, draw.randrange(200))
        kind = draw.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = draw.randrange(256)
        elif kind == 2:
            out[at:at] = draw.choice(PIECES)
        elif kind == 3:
            del out[at : at + draw.choice((1, 2, 16, 256))]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            piece = out[at : at + draw.choice((1, 8, 64))]
            out[at:at] = piece * draw.choice((1, 2, 50))
        elif kind == 6:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            out[at : at + draw.choice((0, 8, 64))] = other[start : start + draw.choice((4, 32, 256))]
        elif kind == 7:
            digits = [i for i, byte in enumerate(out[:4096]) if 48 <= byte <= 57]
            if digits:
                start = draw.choice(digits)
                out[start : start + 1] = draw.choice(NUMBERS)
        else:
            width = draw.choice((2, 4, 8))
            out[at : at + width] = draw.choice((0, 1, 2**15, 2 ** (8 * width) - 1)).to_bytes(width, "little")
    return bytes(out[: 2**20])


# ---- what is a crash


class TooSlow(BaseException):
    """Not an Exception: a reader that catches everything must not catch it."""


def attempt(reader: Reader, data: bytes, seconds: int = SECONDS) -> str:
    """`accepted` or `refused`; any other outcome raises."""

    def late(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        reader.read(data)
        return "accepted"
    except (Refused, UserError):
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if Path(PLANTED).exists():
            raise RuntimeError("input was executed")


@contextlib.contextmanager
def limited(folder: Path) -> Iterator[None]:
    """In a folder of its own, with little memory beyond what is in use."""
    here = Path.cwd()
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, old[1]))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        resource.setrlimit(resource.RLIMIT_AS, old)


def all_readers(inputs: int, seed: int) -> dict[str, Any]:
    """Try so many mutated inputs, after the unmutated ones; returns the counts."""
    found: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder, limited(Path(folder)):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind in READERS:
            reader, draw = kind(Path(folder) / kind.__name__), random.Random(seed)
            share = inputs // len(READERS)
            mutated = (mutate(draw.choice(reader.seeds), reader.seeds, draw) for _ in range(share))
            for i, data in enumerate([*reader.seeds, *mutated]):
                began = time.monotonic()
                found[f"{kind.__name__}: tried"] += 1
                try:
                    found[f"{kind.__name__}: {attempt(reader, data)}"] += 1
                except (Exception, TooSlow):
                    found["crashes"] += 1
                    kept = Path(tempfile.gettempdir()) / f"crash_{kind.__name__}_{seed}_{i}"
                    kept.write_bytes(data)
                    print(f"{kind.__name__} input {i}, kept as {kept}:\n{traceback.format_exc()[-1500:]}", flush=True)
                longest = max(longest, time.monotonic() - began)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    totals = {"inputs": sum(v for k, v in found.items() if k.endswith("tried")), "crashes": found["crashes"]}
    return {**totals, **found, "longest_s": round(longest, 2), "memory_grown_by_mib": round(grown / 1024)}


def guided(kind: type[Reader], seconds: int) -> None:
    """Coverage-guided: atheris mutates what reached new lines of the reader. Ends the process."""
    import atheris  # development only

    modules = ("datasets.index", "datasets.check", "utils.checkpoint", "utils.config", "numpy.lib._format", "yaml")
    for name, module in list(sys.modules.items()):
        if name.startswith(modules):
            owners = [module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)]
            for owner in owners:
                for key, value in list(vars(owner).items()):
                    if isinstance(value, types.FunctionType) and value.__module__ == name:
                        setattr(owner, key, atheris.instrument_func(value))
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    reader = kind(folder / "work")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate(reader.seeds):
        (corpus / str(i)).write_bytes(data)
    slow = 10 * SECONDS  # watched lines take several times as long
    flags = [f"-max_total_time={seconds}", "-max_len=20000", f"-timeout={slow}", "-rss_limit_mb=3000"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], lambda data: attempt(reader, data, slow))
    atheris.Fuzz()


def main(config: Config) -> None:
    if config.only:
        guided(next(kind for kind in READERS if kind.__name__ == config.only), config.guided)
    for name, value in all_readers(config.inputs, config.seed).items():
        print(f"{name:<40}{value}")
    if config.guided:
        for kind in READERS:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--guided", str(config.guided), "--only", kind.__name__]
            done = subprocess.run(command, capture_output=True, text=True)
            runs = [line for line in done.stderr.splitlines() if line.startswith(("Done ", "stat::", "#"))][-1:]
            print(f"guided {kind.__name__}: exit code {done.returncode}; {' '.join(runs)}")
            if done.returncode:
                print(done.stderr[-2000:])


if __name__ == "__main__":
    main(configuration.parse(Config, __doc__))
