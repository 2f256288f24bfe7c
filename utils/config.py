"""From a script's dataclass to checked options: constants < --config FILE.yaml < command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import math
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from utils import distributed, files, signals
from utils.errors import UserError

TOPICS = ("options", "data", "model", "objective", "optimisation", "running")
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)  # which a path has that never leads anywhere
YAML_BYTES = 2**20
YAML_DEPTH = 50
OPENS = tuple(
    getattr(yaml, f"{kind}StartToken") for kind in ("FlowSequence", "FlowMapping", "BlockSequence", "BlockMapping")
)
CLOSES = yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken
CODE = (":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)docs/results")


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
        if hint := types.get(named[1].split(".")[0]) if named else None:
            return f"{named[1]}: must be {describe_type(hint)}"
        text = " ".join(message.split()).removeprefix("Parser key ").replace('"<unicode string>"', "it")
        if " config: " in text:  # the content of a file
            return f"--config: {text}"
        unknown = re.search(r"(?:--|Key [\"']|Option [\"'])(\w+)", text, re.IGNORECASE)
        close = difflib.get_close_matches(unknown[1], types, n=1) if unknown else []
        return text + (f"; did you mean --{close[0]}?" if close and close[0] != unknown[1] else "")


class ConfigFile(ActionConfigFile):
    """--config FILE: a file that `read_yaml` takes."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            read_yaml(Path(values))
        except UserError as error:
            parser.error(f"--config: {error}")
        super().__call__(parser, namespace, values, option_string)


def describe_type(hint: Any) -> str:
    """A type as the help says it: `list[PositiveInt]`, `Literal['random', 'span']`."""
    return hint.__name__ if type(hint) is type else re.sub(r"\b(\w+\.)+", "", str(hint))


class Output:
    """Standard output that does not end a run of days: where it can no longer be written, the run goes on without.

    Names of files may hold what no encoding has; such bytes are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self.stream.write(text)) or len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:  # a full disk, or a reader that has gone
            print(f"warning: output is lost ({error.strerror}); the run goes on", file=sys.stderr, flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def parse(config_class: type, doc: str | None = None, args: list[str] | None = None) -> Any:
    """An instance of the dataclass from `args` (default: the command line). Exits with code 2 on a wrong option.

    Options stand in the help by topic, with what their field's metadata (`utils.options`) or docstring says. The
    message names the field, for a wrong name or type as well as for a value outside the field's range.
    """
    parser = Parser(description=doc, usage="%(prog)s [--option value ...]", allow_abbrev=False, formatter_class=Help)
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of the options below")
    fields, hints, groups = dataclasses.fields(config_class), get_type_hints(config_class), {}
    helps = {  # of this class and those that it inherits
        part.arg_name: part.description
        for base in reversed(config_class.__mro__[:-1])
        for part in docstring_parser.parse_from_object(base).params
        if part.description
    }
    for f in sorted(fields, key=lambda f: TOPICS.index(f.metadata.get("topic", "options"))):
        topic = f.metadata.get("topic", "options")
        group = groups.get(topic) or groups.setdefault(topic, parser.add_argument_group(topic))
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        given = {"required": True} if default is dataclasses.MISSING else {"default": default}
        group.add_argument(f"--{f.name}", type=hints[f.name], help=f.metadata.get("help", helps.get(f.name)), **given)
    values = {name: _plain(value) for name, value in vars(parser.parse_args(args)).items() if name != "config"}
    for name, value in values.items():
        if value is None and type(None) not in get_args(hints[name]):  # `epochs: null`, in YAML
            parser.error(f"{name}: null is not {describe_type(hints[name])}")
    return config_class(**values)


def main(script: Callable[[Any], None], config_class: type, doc: str | None, args: list[str] | None = None) -> None:
    """Parse, run, and say what the user can put right in one line instead of a traceback (exit code 2).

    A signal ends it with 128 + its number (docs/TRAINING.md). Any other exception, such as the loss of another
    process, ends it with 1; torchrun then starts the processes again if it may.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        with signals.handled(), contextlib.redirect_stdout(Output(sys.stdout)):
            config = parse(config_class, doc, args)
            check(config)
            script(config)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in NO_PATH:
                raise
            error = f"{error.filename}: {error.strerror}; name another file or folder"
        print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.stop()
        distributed.end_torchrun()
        raise SystemExit(2) from None
    except SystemExit as ended:
        if ended.code == 2:  # a wrong option
            distributed.end_torchrun()
        raise
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


def _plain(value: Any) -> Any:
    """Mappings, lists, text and numbers; those of jsonargparse's restricted types become plain ones."""
    if isinstance(value, Namespace | dict):
        return {key: _plain(item) for key, item in (vars(value) if isinstance(value, Namespace) else value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), str)
    return value if value is None else kind(value)


def save_yaml(values: dict[str, Any], path: Path) -> None:
    files.write_text(yaml_text(values), path)


def yaml_text(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; None where it is empty. Raises UserError: what is wrong with it.

    A megabyte at most, and no aliases: a file of 500 bytes could stand for gigabytes.
    """
    files.require_ordinary(path)
    try:
        content = path.read_bytes() if path.stat().st_size <= YAML_BYTES else None
        if content is None or not _is_plain(content):
            limits = f"is larger than {YAML_BYTES} bytes, nested deeper than {YAML_DEPTH} or uses aliases (*name)"
            raise UserError(f"{path}: {limits}; write it out, shorter")
        return yaml.safe_load(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); correct it") from None


def _is_plain(content: bytes) -> bool:
    """Whether YAML text has no aliases, and no depth that PyYAML takes minutes for."""
    depth = 0
    for token in yaml.scan(content):
        depth += isinstance(token, OPENS) - isinstance(token, CLOSES)
        if isinstance(token, yaml.AliasToken) or depth > YAML_DEPTH:
            return False
    return True


def commit() -> str:
    """The repository's commit, `unknown` outside git; `+changes` when files that git knows differ from it.

    Files of results do not count: who measures twice has changed them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", "--", *CODE) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
