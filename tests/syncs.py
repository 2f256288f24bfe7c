"""Find what makes the host wait for a GPU, on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result the host reads, or whose result's shape depends on values.
WAITING = {
    *("_local_scalar_dense", "nonzero", "argwhere", "masked_select", "equal", "bincount", "segment_reduce"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "_linalg_check_errors"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Python functions that copy between host and device; on the CPU they do nothing that an operator would show.
COPYING = {"cpu", "numpy", "tolist", "item", "new_tensor", "tensor", "as_tensor", "asarray"}


class HostWaits(AssertionError):
    """Something asked for a value, or for a shape, that only the device knows."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name.split("::")[1], func._overloadname
        if name in WAITING or f"{name}.{overload}" in WAITING:
            raise HostWaits(f"{func}: a GPU must finish before the host can go on")
        if name in INDEXING:
            indices = [i for i in tree_leaves(args[1]) if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise HostWaits(f"{func} with a mask: how many rows there are is known to the device only")
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        moves = name == "to" and any(str(a) == "cpu" for a in (*args[1:], *kwargs.values()))
        if name in COPYING or (moves and not kwargs.get("non_blocking")):
            raise HostWaits(f"{name}: copies between host and device wait for each other")
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """`HostWaits` for what would make the host wait for a GPU: operators (in backward, too) and copies.

    `x.to("cpu")` counts even where x is there already, as on a GPU it would not be; with `non_blocking` it does not.
    Does not see torch.from_numpy, what NumPy does with a tensor that it was given before, nor collectives.
    """
    with _Functions(), _Operators():
        yield
