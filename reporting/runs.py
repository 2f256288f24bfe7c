"""What a run left in its folder: options, table of metrics, checkpoint, and what stands beside the weights."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.log import METRICS, WARNINGS
from utils import checkpoint
from utils.config import read_yaml
from utils.errors import UserError
from utils.guards import BAD_STEPS

Stage = Literal[1, 2, 3]
NEEDED = {"data_path", "cache_path", "on_bad", "pretrained_path", "checkpoint_name", "dump_path", "arch", "seed"}
STAGES: dict[Stage, str] = {1: "stage 1, images and slices", 2: "stage 2, masked slices", 3: "stage 3, joint"}


@dataclass
class Run:
    """One run folder."""

    name: str  # unique among the runs of a page
    folder: Path
    config: dict[str, Any]
    metrics: dict[str, list[float]]  # column -> a number per finished epoch, nan where a row has none
    state: dict[str, Any] | None  # the newest checkpoint
    record: dict[str, Any] | None  # the json beside the weights, when this run made them
    notes: list[str]  # what is missing and why, for the reader of the page
    warnings: list[str]  # what the run itself complained of

    @property
    def stage(self) -> Stage:
        return stage_of(self.config)


def stage_of(config: dict[str, Any]) -> Stage:
    """Each stage has options that no other has."""
    return 1 if "size_crops" in config else 3 if "lambda_inter" in config else 2


def method_of(config: dict[str, Any]) -> str:
    """Stage 2 is the same for both methods."""
    return "DeepCluster-v2" if "kmeans_backend" in config else "SwAV" if "epsilon" in config else "either method"


def read_runs(folders: list[str]) -> list[Run]:
    """Raises UserError where a folder is no run's, or a file in it is damaged."""
    paths = [Path(folder).expanduser() for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"runs: {', '.join(folders)}: each run folder once")
    return [_read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell all of them apart."""
    absolute = [path.resolve() for path in paths]
    depth = 1
    while len({path.parts[-depth:] for path in absolute}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in absolute]


def _read_run(folder: Path, name: str) -> Run:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: is not the folder of a run (it has no config.yaml); name the --dump_path of one")
    config = read_yaml(path)
    if not isinstance(config, dict) or not config.keys() >= NEEDED:
        raise UserError(f"{path}: is not the configuration of one of the six training scripts")
    notes = []
    metrics = read_metrics(folder / METRICS)
    if not metrics:
        notes.append("No epoch is finished yet, so there are no curves.")
    state, _ = _read_checkpoint(folder, notes)
    return Run(name, folder, config, metrics, state, _read_record(config, notes), notes, read_warnings(folder))


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of numbers; {} where there is no file. Raises UserError naming the file and the line."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if "epoch" not in names or len(set(names)) < len(names):
                raise ValueError("its first line must name every column once, epoch among them")
            columns: dict[str, list[float]] = {column: [] for column in names}
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} has not as many cells as the first line")
                for column, cell in row.items():
                    columns[column].append(float(cell) if cell else math.nan)
            if not all(math.isfinite(epoch) for epoch in columns["epoch"]):
                raise ValueError("epoch must be a number in every line")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: is not a table of metrics ({error}); restore it, or move it away") from None
    return columns if columns["epoch"] else {}


def _read_checkpoint(folder: Path, notes: list[str]) -> tuple[dict[str, Any] | None, bytes]:
    """The newest whole checkpoint; unlike `checkpoint.load`, nothing in the folder is touched: the run may go on."""
    for path in (folder / checkpoint.LATEST, folder / checkpoint.PREVIOUS):
        try:
            return checkpoint.read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UserError as error:
            notes.append(f"A checkpoint was passed over: {error}")
    notes.append("There is no readable checkpoint, so nothing that needs the network can be shown.")
    return None, b""


def _read_record(config: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    """What made the weights of this run, from the json beside them."""
    path = (Path(str(config["pretrained_path"])) / str(config["checkpoint_name"])).with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made_by = record["config"]["dump_path"], record["config"]["seed"]
    except (FileNotFoundError, NotADirectoryError):
        notes.append(f"{path} is not there: the run has not finished, or its weights were moved.")
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not the record of a weights file; restore it, or move it away") from None
    if made_by != (config["dump_path"], config["seed"]):
        notes.append(f"{path} is of another run (dump_path {made_by[0]}), which has replaced this one's weights.")
        return None
    return record


def read_warnings(folder: Path) -> list[str]:
    """What a run warned of, with its epoch, and how many steps were not applied. Raises UserError for a broken file."""
    said = [f"epoch {int(row['epoch']) + 1}: {row['text']}" for row in _rows(folder / WARNINGS, ("epoch", "text"))]
    bad = len(_rows(folder / BAD_STEPS, ("epoch", "step")))
    if bad:
        steps = "1 step was" if bad == 1 else f"{bad} steps were"
        said.append(f"{steps} not applied, because loss or gradient was not finite; {BAD_STEPS} names the files")
    return said


def _rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Lines of a table in which the needed columns stand, those of numbers checked; [] where there is no file."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["epoch"])
            if any(row.get(column) is None for column in needed):
                raise ValueError(f"it should have the columns {', '.join(needed)}")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: is not a run's table ({error}); restore it, or move it away") from None
    return rows
