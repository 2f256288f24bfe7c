"""The six training scripts as modules, for those who need what a run trains with: their `data()` and `model()`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from utils.errors import UserError

SCRIPTS = ("ssl_swav2D", "mask_swav", "ssl_swav3D", "ssl_deepcluster2D", "mask_deepcluster", "ssl_deepcluster3D")


def load(name: str) -> ModuleType:
    """A script as a module, by its name with or without `.py`. Raises UserError where there is no such script."""
    stem = name.removesuffix(".py")
    if stem not in SCRIPTS:
        raise UserError(f"{name}: is not one of the training scripts {', '.join(SCRIPTS)}")
    return importlib.import_module(stem)


def of_config(values: Mapping[str, Any]) -> ModuleType:
    """The script with these options (the stage 2 scripts of both methods share them, and all that they build).

    Options that all scripts have may be missing: those that came after the run whose options these are.
    Raises UserError naming the options that no script has.
    """
    modules = [load(name) for name in SCRIPTS]
    options = [{f.name for f in dataclasses.fields(module.Config)} for module in modules]
    common = set.intersection(*options)
    for module, names in zip(modules, options, strict=True):
        if names == values.keys() | common:
            return module
    nearest = max(options, key=lambda names: len(names & values.keys()))
    differing = ", ".join(sorted(nearest ^ (values.keys() | common)))
    raise UserError(f"these options are not those of any training script of this version (differing: {differing})")
