"""From a script's dataclass to checked options: constants < --config FILE.yaml < command line."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from utils import distributed, files, signals
from utils.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

MAX_YAML_BYTES = 100_000


def parse(config_class: type, doc: str | None = None, args: list[str] | None = None) -> Any:
    """An instance of the dataclass from `args` (default: the command line). Exits with code 2 on a wrong option.

    The message names the field, for a wrong name or type as well as for a value outside the field's range.
    """
    parser = ArgumentParser(description=doc, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_class_arguments(config_class, as_group=False)
    for path in _config_files(sys.argv[1:] if args is None else args):
        if not isinstance(read_yaml(path), dict | None):
            raise UserError(f"{path}: must be a mapping of options, e.g. 'epochs: 20'")
    values = parser.parse_args(args)
    fields = {f.name: _plain(getattr(values, f.name)) for f in dataclasses.fields(config_class)}
    for f in dataclasses.fields(config_class):
        if fields[f.name] is None and "None" not in str(f.type):  # `epochs:` without a value, in YAML
            parser.error(f"{f.name}: null is not a value of {f.type}")
    return config_class(**fields)


def main(script: Callable[[Any], None], config_class: type, doc: str | None, args: list[str] | None = None) -> None:
    """Parse, run, and say what the user can put right in one line instead of a traceback (exit code 2).

    A signal ends it with 128 + its number (docs/RUNNING.md). Any other exception, such as the loss of another
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
    """Rules between options, for those that a script has. Raises UserError naming the options."""
    values = to_dict(config)
    has = set(values)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: {value} is not a finite number")
    if "warmup_epochs" in has and config.warmup_epochs >= config.epochs:
        raise UserError(
            f"warmup_epochs: a warm-up of {config.warmup_epochs} epochs leaves nothing of epochs: {config.epochs}; "
            f"add --warmup_epochs {config.epochs // 10}"
        )
    if "size_crops" in has:
        kinds = ("size_crops", "nmb_crops", "min_scale_crops", "max_scale_crops")
        if len({len(getattr(config, name)) for name in kinds}) > 1 or not config.size_crops:
            raise UserError(f"{', '.join(kinds)}: must all have one value per kind of crop")
        if config.nmb_crops[0] < 2:
            raise UserError("nmb_crops: the first kind needs at least 2 crops, between which assignments are swapped")
        for low, high in zip(config.min_scale_crops, config.max_scale_crops, strict=True):
            if not low <= high <= 1:
                raise UserError(f"min_scale_crops, max_scale_crops: need min <= max <= 1, got {low} and {high}")
    if "lambda_inter" in has and not (config.lambda_intra or config.lambda_inter or config.lambda_mask):
        raise UserError("lambda_intra, lambda_inter, lambda_mask: at least one must be above 0")
    if "d_model" in has and config.d_model % 8:
        raise UserError(f"d_model: {config.d_model} must be a multiple of 8, the number of attention heads")
    if "min_scale_images" in has and config.min_scale_images > 1:
        raise UserError(f"min_scale_images: a view cannot cover {config.min_scale_images} of an image; at most 1")
    masks = "mask_ratio" in has and getattr(config, "lambda_mask", 1)
    if masks and config.target_shape[0] < 2:
        raise UserError("target_shape: masking needs views of at least 2 slices")


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
