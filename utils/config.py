"""From a script's dataclass to checked options: constants < --config FILE.yaml < command line."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from utils import distributed
from utils.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(config_class: type, doc: str | None = None, args: list[str] | None = None) -> Any:
    """An instance of the dataclass from `args` (default: the command line). Exits with code 2 on a wrong option.

    The message names the field, for a wrong name or type as well as for a value outside the field's range.
    """
    parser = ArgumentParser(description=doc, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_class_arguments(config_class, as_group=False)
    values = parser.parse_args(args)
    fields = {f.name: _plain(getattr(values, f.name)) for f in dataclasses.fields(config_class)}
    return config_class(**fields)


def main(script: Callable[[Any], None], config_class: type, doc: str | None, args: list[str] | None = None) -> None:
    """Parse, run, and say what the user can put right in one line instead of a traceback (exit code 2)."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    config = parse(config_class, doc, args)
    try:
        script(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        distributed.stop()


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain values that YAML and torch.load(weights_only=True) accept."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def save_yaml(values: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):  # numbers of restricted types become plain ones
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"an option may not hold a {type(value).__name__}")
