"""From a script's dataclass to checked options: constants < --config FILE.yaml < command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from utils import distributed, files, signals
from utils.errors import UserError

TOPICS = ("options", "data", "model", "objective", "optimisation", "running")
MAX_YAML_BYTES = 100_000
# What the restricted types are called in errors.
WORDS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number, 0 or more",
    "QueueLength": "a whole number, -1 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number, 0 or more",
    "OpenUnitInterval": "a number between 0 and 1",
    "ClosedUnitInterval": "a number from 0 to 1",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
}


GIVEN = re.compile(r"(?:Got|Given) value: (.*)|base 10: '(.*)'|to float: '(.*)'|: (\S*) does not conform")


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A script's docstring as it stands there."""


class Parser(ArgumentParser):
    """A parser whose errors are one line that names the option, what it takes, and the nearest right name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"error: {self._in_short(message)} ({self.prog} --help explains all options)", file=sys.stderr)
        raise SystemExit(2)

    def _in_short(self, message: str) -> str:
        """jsonargparse's message, which may list types over many lines, in one."""
        types = {action.dest: getattr(action, "_typehint", None) for action in self._actions}
        named = re.search(r"key [\"']([\w.]+)[\"']", message)
        hint = types.get(named[1].split(".")[0]) if named else None
        if hint:
            given = GIVEN.search(message)
            value = f"{given[given.lastindex]} is not" if given else "must be"
            return f"{named[1]}: {value} {describe_type(hint)}"
        text = " ".join(message.split()).removeprefix("Parser key ")
        unknown = re.search(r"unrecognized arguments: --(\w+)|(?:Key|Option) [\"'](\w+)[\"']", text, re.IGNORECASE)
        close = difflib.get_close_matches(unknown[unknown.lastindex], types, n=1) if unknown else []
        return text + (f"; did you mean --{close[0]}?" if close else "")


def describe_type(hint: Any) -> str:
    """A type as people say it: `list[PositiveInt]` -> a list [...], each a whole number above 0."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, UnionType):
        return ", or ".join(map(describe_type, parts))
    if origin in (list, Sequence):
        return f"a list [...], each {describe_type(parts[0])}"
    if origin is tuple:
        return f"[{', '.join('.' * len(parts))}], {len(parts)} values, each {describe_type(parts[0])}"
    if origin is dict:
        return "a mapping {name: value}"
    return WORDS.get(getattr(hint, "__name__", ""), str(hint))


def parse(config_class: type, doc: str | None = None, args: list[str] | None = None) -> Any:
    """An instance of the dataclass from `args` (default: the command line). Exits with code 2 on a wrong option.

    Options stand in the help by topic, with what their field's metadata (`utils.options`) or docstring says. The
    message names the field, for a wrong name or type as well as for a value outside the field's range.
    """
    parser = Parser(description=doc, usage="%(prog)s [--option value ...]", allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    hints, helps, groups = get_type_hints(config_class), _docstrings(config_class), {}
    for f in sorted(dataclasses.fields(config_class), key=lambda f: TOPICS.index(f.metadata.get("topic", "options"))):
        topic = f.metadata.get("topic", "options")
        group = groups.get(topic) or groups.setdefault(topic, parser.add_argument_group(topic))
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        given = {"required": True} if default is dataclasses.MISSING else {"default": default}
        group.add_argument(f"--{f.name}", type=hints[f.name], help=f.metadata.get("help", helps.get(f.name)), **given)
    for path in _config_files(sys.argv[1:] if args is None else args):
        if not isinstance(read_yaml(path), dict | None):
            raise UserError(f"{path}: must be a mapping of options, e.g. 'epochs: 20'")
    values = parser.parse_args(args)
    fields = {f.name: _plain(getattr(values, f.name)) for f in dataclasses.fields(config_class)}
    for name, value in fields.items():
        if value is None and type(None) not in get_args(hints[name]):  # `epochs:` without a value, in YAML
            parser.error(f"{name}: null is not {describe_type(hints[name])}")
    return config_class(**fields)


@cache
def _docstrings(config_class: type) -> dict[str, str]:
    """Field -> the docstring below it, in this class and those that it inherits."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        about = docstring_parser.parse_from_object(base)
        found |= {part.arg_name: part.description for part in about.params if part.description}
    return found


def main(script: Callable[[Any], None], config_class: type, doc: str | None, args: list[str] | None = None) -> None:
    """Parse, run, and say what the user can put right in one line instead of a traceback (exit code 2).

    A signal ends it with 128 + its number (docs/TRAINING.md). Any other exception, such as the loss of another
    process, ends it with 1; torchrun then starts the processes again if it may.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        with signals.handled():
            config = parse(config_class, doc, args)
            check(config)
            script(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.stop()
        raise SystemExit(2) from None
    except Exception:
        if not signals.caught():
            raise  # without leaving the process group in order: lost processes could not answer
        # Mostly because other processes obeyed the same signal a moment earlier, but it may be a failure of its own.
        traceback.print_exc()
        print(f"stopped by signal {signals.caught()}; this step was not saved", file=sys.stderr, flush=True)
        raise SystemExit(128 + signals.caught()) from None
    distributed.stop()


def check(config: Any) -> None:
    """Raises UserError for numbers that are not finite, and what the options' own `check` refuses."""
    for name, value in to_dict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: {value} is not a finite number")
    if hasattr(config, "check"):
        config.check()


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain values that YAML and torch.load(weights_only=True) accept."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def save_yaml(values: dict[str, Any], path: Path) -> None:
    files.write_text(yaml.safe_dump(values, sort_keys=False), path)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can stand for billions of entries, and of moderate depth."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read here; write the value out")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > 50:
            raise yaml.YAMLError("values are nested more than 50 deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(path: Path) -> Any:
    """The content of a small YAML file; None where it is empty. Raises UserError: what is wrong with it."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise UserError(f"{path}: is larger than {MAX_YAML_BYTES} bytes, too much for a file of options")
        return yaml.load(content, _PlainLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read as YAML ({reason}); correct it") from None


def _config_files(args: list[str]) -> list[Path]:
    """The files that --config names."""
    given = [value for name, value in itertools.pairwise(args) if name == "--config"]
    given += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [Path(value) for value in given if "\n" not in value and Path(value).is_file()]


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
