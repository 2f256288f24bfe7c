"""Tensors in files of any origin, read as data: nothing in them is called, and no size that they claim is believed.

torch.save's zip files, its older format, and safetensors. What a pickle says is built from a few plain types; every
other class or function becomes an `Inert`, so a file that holds optimisers, configurations or whole modules can be
read, and one that was made to run something does nothing. Tensors stay in the file until one asks for them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils import filekinds
from utils.errors import UserError

TYPES = {  # of torch's storages
    **{f"{name}Storage": getattr(torch, name.lower()) for name in ("Float", "Double", "Half", "Int", "Long", "Short")},
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "UntypedStorage": torch.uint8,
}
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# What wrappers add inside names, and what stands between the names of a module that was saved whole.
INSIDE = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_modules", "_parameters", "_buffers"}
DEPTH = 64  # dictionaries in each other


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is still in its file; `read` is valid while the file is open."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Inert:
    """Stands for an object of any other class: keeps what the file says it holds, calls nothing."""

    state: Any
    items: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> Inert:  # and no __init__, which pickles may skip
        inert = super().__new__(cls)
        inert.state, inert.items = None, {}
        return inert

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def extend(self, values: Any) -> None:
        self.items.update(enumerate(values, len(self.items)))

    def append(self, value: Any) -> None:
        self.extend([value])

    add = append


@dataclass(eq=False)
class Storage:
    """A run of bytes in a file; where it is becomes known after the pickle was read."""

    dtype: torch.dtype
    key: str
    size: int = 0  # bytes that are really there
    content: Callable[[], bytearray] = bytearray
    ends: list[int] = field(default_factory=list)  # bytes that tensors claim

    def tensor(self, offset: int, shape: tuple, stride: tuple, dtype: torch.dtype | None = None) -> Stored | Inert:
        """A view of it. offset, stride: in elements. Raises ValueError for what no tensor can be.

        One that shows elements several times may be as large as it likes, and is no weight: `Inert`.
        """
        dtype = dtype or self.dtype
        if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
            raise ValueError("a tensor of impossible shape")
        last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if (elements := math.prod(shape)) > last + 1:
            return Inert()
        self.ends.append((offset + last + 1) * dtype.itemsize if elements else 0)

        def read() -> Tensor:
            if not elements:
                return torch.empty(shape, dtype=dtype)
            data = self.content()
            return torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize).as_strided(
                shape, stride, offset
            )

        return Stored(tuple(shape), read)


class Unpickler(pickle._Unpickler):
    """The one written in Python: the one in C makes room for what a file claims."""

    dispatch = {  # noqa: RUF012 as in the class above it
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: lambda self: self._build(),
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],  # which reads before it makes room
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self.known = {
            ("collections", "OrderedDict"): dict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): self._first,
            ("torch._utils", "_rebuild_parameter_with_state"): self._first,
            ("torch._tensor", "_rebuild_from_type_v2"): self._subclass,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in TYPES:
            return TYPES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return self.known.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the older format's way to keep the source of a class
            return pid[1]
        _, dtype, key, *more = pid
        if not isinstance(dtype, torch.dtype) or more[2:] not in ([], [None]):
            return Inert()  # of quantised numbers, or part of another storage in files of before 2018
        return self.storages.setdefault(str(key), Storage(dtype, str(key)))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):  # plain types have no state worth keeping
            self.stack[-1].state = state

    def _tensor(self, storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
        return storage.tensor(offset, size, stride) if isinstance(storage, Storage) else Inert()

    def _typed_tensor(self, storage: Any, offset: int, size: tuple, stride: tuple, *more: Any) -> Any:
        return storage.tensor(offset, size, stride, more[2]) if isinstance(storage, Storage) else Inert()

    def _first(self, data: Any, *_: Any) -> Any:
        return data

    def _subclass(self, rebuild: Any, _type: Any, arguments: tuple, _state: Any) -> Any:
        return rebuild(*arguments) if rebuild in (self._tensor, self._typed_tensor) else Inert()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """What a file holds: plain containers and values, `Inert` objects, and `Stored` tensors to be read in the block.

    Raises UserError that says what the file is where it holds no tensors that could be read.
    """
    filekinds.require_file(path)
    with contextlib.ExitStack() as stack:
        with explained(path):
            file = stack.enter_context(open(path, "rb"))
            head = file.read(filekinds.HEAD)
            file.seek(0)
            reader = next((read for fits, read in READERS if fits(head)), None)
            if reader is None:
                raise filekinds.refusal(path, head)
            content = reader(file, path)
        yield content


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file's bytes is said of the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the disk and permissions") from None
    except Exception as error:  # arbitrary bytes fail in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as tensors ({reason}); it is damaged or cut short: copy or download it again"
        ) from None


def flat(content: Any) -> dict[str, Stored]:
    """Every tensor by its full name: the keys of the dictionaries around it, and its own, joined by dots.

    Keys may be numbers. What wrappers put inside names is left out. Raises ValueError where two have one name.
    """
    found: dict[str, Stored] = {}
    seen: set[int] = set()
    waiting = [((), content)]
    while waiting:
        names, value = waiting.pop()
        if isinstance(value, Stored):
            name = ".".join(part for part in ".".join(names).split(".") if part not in INSIDE)
            if name in found:
                raise ValueError(f"two tensors are called {name}")
            found[name] = value
        elif id(value) not in seen and len(names) < DEPTH and (children := _children(value)):
            seen.add(id(value))  # what is there twice has its first name, and no nesting can multiply it
            waiting += [((*names, str(key)), child) for key, child in reversed(children)]
    return found


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Inert):
        return [*value.items.items(), *_children(value.state)]
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


# ---- formats


class _Rest:
    """An open file that makes no room for more than is left of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.readline = file, os.fstat(file.fileno()).st_size, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, max(0, self.size - self.file.tell())) if count > 2**16 else count)


def _zipped(file: BinaryIO, path: Path) -> Any:
    size = os.fstat(file.fileno()).st_size
    archive = zipfile.ZipFile(file)

    def record(name: str) -> zipfile.ZipInfo:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size <= size:
            raise ValueError(f"{name} in it is compressed, which torch.save never does")
        return info

    names = archive.namelist()
    pickles = [name for name in names if name.split("/", 1)[-1] == "data.pkl"]
    if not pickles or pickles[0].replace("data.pkl", "constants.pkl") in names:
        raise filekinds.zip_refusal(path, names)
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(record(f"{root}byteorder")) != b"little":
        raise ValueError("written on a big-endian machine")
    unpickler = Unpickler(io.BytesIO(archive.read(record(pickles[0]))))
    content = unpickler.load()

    @functools.lru_cache(maxsize=1)  # many tensors may be views of one storage
    def data(name: str) -> bytearray:
        with explained(path):
            return bytearray(archive.read(record(name)))  # compares the checksum

    for storage in unpickler.storages.values():
        name = f"{root}data/{storage.key}"
        storage.size, storage.content = record(name).file_size, functools.partial(data, name)
    return _checked(content, unpickler)


def _older(file: BinaryIO, path: Path) -> Any:
    """Magic number, version and system, then the object, the order of the storages, and their bytes behind it."""
    rest = _Rest(file)
    _, _, system = (Unpickler(rest).load() for _ in range(3))
    if not system.get("little_endian", True):
        raise ValueError("written on a big-endian machine")
    unpickler = Unpickler(rest)
    content, order = unpickler.load(), Unpickler(rest).load()

    @functools.lru_cache(maxsize=1)
    def data(start: int, size: int) -> bytearray:
        file.seek(start)
        with explained(path):
            if len(found := bytearray(file.read(size))) < size:
                raise EOFError("its end is missing")
        return found

    for key in order:
        storage = unpickler.storages[str(key)]
        count = int.from_bytes(file.read(8), "little")
        start, storage.size = file.tell(), count * storage.dtype.itemsize
        if start + storage.size > rest.size:
            raise EOFError("its end is missing")
        storage.content = functools.partial(data, start, storage.size)
        file.seek(start + storage.size)
    return _checked(content, unpickler)


def _checked(content: Any, unpickler: Unpickler) -> Any:
    for storage in unpickler.storages.values():
        if max(storage.ends, default=0) > storage.size:
            raise ValueError(f"a tensor claims {max(storage.ends)} bytes, of which {storage.size} are there")
    return content


def _safetensors(file: BinaryIO, path: Path) -> Any:
    try:
        from safetensors.torch import load  # training machines may do without it
    except ImportError:
        raise UserError(f"{path}: is a safetensors file, which needs its reader: pip install safetensors") from None
    return {name: Stored(tuple(value.shape), lambda value=value: value) for name, value in load(file.read()).items()}


READERS = (
    (lambda head: head.startswith(b"PK"), _zipped),
    (lambda head: head.startswith(pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)), _older),
    (lambda head: head[8:9] == b"{" and 2 < int.from_bytes(head[:8], "little") < 10**8, _safetensors),
)
