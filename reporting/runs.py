"""What runs left in their folders (options, metrics, checkpoint, record of the weights), and tables of downstream/."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from downstream.results import warn_of
from training import scripts
from training.log import METRICS, WARNINGS
from utils import checkpoint
from utils.config import parse, read_yaml
from utils.errors import UserError
from utils.files import read_json
from utils.guards import BAD_STEPS

RESULTS = ("results.json", "summary.csv")  # of a downstream task, of a comparison
DEEPER = "\0"  # joins the names of nested metrics, which may hold dots
STAGES = {1: "stage 1, images and slices", 2: "stage 2, masked slices", 3: "stage 3, joint"}


@dataclass
class RunFolder:
    """One run folder."""

    name: str  # unique among the runs of a page
    path: Path
    script: ModuleType  # the training script
    config: Any  # its checked options
    metrics: pd.DataFrame  # a row per finished epoch
    state: dict[str, Any] | None  # the newest checkpoint
    record: dict[str, Any] | None  # the json beside the weights, when this run made them
    notes: list[str]  # what is missing and why, for the reader of the page
    warnings: list[str]  # what the run itself complained of

    @property
    def stage(self) -> int:
        return self.config.stage


def read_runs(folders: list[str]) -> list[RunFolder]:
    """Raises UserError where a folder is no run's, or a file in it is damaged."""
    paths = [Path(folder).expanduser() for folder in folders]
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise UserError(f"runs: {', '.join(folders)}: each run folder once")
    short = [os.path.basename(os.path.realpath(path)) for path in paths]
    names = short if len({*short}) == len(paths) else [str(path) for path in paths]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def script_of(folder: Path) -> tuple[ModuleType, Path]:
    """(the training script of a run, the file of the run's options). Raises UserError where it is no run's folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: is not the folder of a run (it has no config.yaml); name the --dump_path of one")
    values = read_yaml(path)
    try:
        return scripts.of_config(values if isinstance(values, dict) else {}), path
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_run(folder: Path, name: str) -> RunFolder:
    script, path = script_of(folder)
    config = parse(script.Config, args=["--config", str(path)])
    metrics = read_table(folder / METRICS, float)
    notes = [] if len(metrics) else ["No epoch is finished yet, so there are no curves."]
    state, record = _read_checkpoint(folder, notes), _read_record(config, notes)
    return RunFolder(name, folder, script, config, metrics, state, record, notes, read_warnings(folder))


def read_table(path: Path, types: dict[str, type] | type) -> pd.DataFrame:
    """A table with a column `epoch`, empty where there is no file. Raises UserError naming a file that is none.

    types: of these columns, or of all.
    """
    try:
        return pd.read_csv(path, index_col=False, encoding_errors="replace").astype(types).astype({"epoch": int})
    except FileNotFoundError:
        return pd.DataFrame(columns=[*types] if isinstance(types, dict) else ["epoch"])
    except (OSError, KeyError, ValueError) as error:  # what pandas raises are ValueErrors
        raise UserError(f"{path}: is not a run's table ({error}); restore it, or move it away") from None


def read_warnings(folder: Path) -> list[str]:
    """What a run warned of, with its epoch, and how many updates were skipped. Raises UserError for a broken file."""
    warnings = read_table(folder / WARNINGS, {"epoch": int, "text": str})
    said = [f"epoch {row.epoch + 1}: {row.text}" for row in warnings.itertuples()]
    if skipped := len(read_table(folder / BAD_STEPS, {"epoch": int})):
        updates = "1 update was" if skipped == 1 else f"{skipped} updates were"
        said.append(f"{updates} skipped, because loss or gradient was not finite; {BAD_STEPS} names the files")
    return said


def _read_checkpoint(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The newest whole checkpoint; unlike `checkpoint.load`, nothing in the folder is touched: the run may go on."""
    for path in (folder / checkpoint.LATEST, folder / checkpoint.PREVIOUS):
        try:
            return checkpoint.read(path)[0]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UserError as error:
            notes.append(f"A checkpoint was passed over: {error}")
    notes.append("There is no readable checkpoint, so nothing that needs the network can be shown.")
    return None


def _read_record(config: Any, notes: list[str]) -> dict[str, Any] | None:
    """What made the weights of this run, from the json beside them; None, and a note, where that is not to be had."""
    path = (Path(config.pretrained_path) / config.checkpoint_name).with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = read_json(path)
        if all(record["config"][name] == getattr(config, name) for name in ("dump_path", "seed")):
            return record
    notes.append(f"{path} is not of this run, which has not finished, or whose weights were moved or replaced.")
    return None


@dataclass
class Table:
    """What a downstream task or comparison wrote."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]
    data: str = ""  # data_path of a task
    tested: Sequence[str] = ()  # its test cases


def read_tables(paths: list[str]) -> list[Table]:
    """Tables of the files, and of those in folders that have the names which downstream/ gives.

    Raises UserError for what is not there or cannot be read.
    """
    tables = [_read(path) for given in paths for path in _files(Path(given).expanduser())]
    for table in tables:
        others = [t.title for t in tables if t.data and t.data == table.data and t.tested != table.tested]
        if others:
            table.about += f". WARNING: its test cases are not those of {', '.join(others)}: scores cannot be compared"
    return tables


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # The cells of a comparison are in its summary already.
    files = [f for f in sorted(path.rglob("*")) if f.name in RESULTS and "cells" not in f.relative_to(path).parts[:-1]]
    if not files:
        raise UserError(f"downstream: {path}: there is no {' or '.join(RESULTS)}, which downstream/ writes")
    return files


def _read(path: Path) -> Table:
    facts, data, tested = [], "", []
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            result = read_json(path)
            frame = _table_of(result["metrics"])
            facts = [f"{result[key]} {key}" for key in ("cases", "patients") if isinstance(result.get(key), int)]
            facts += [f"weights {result['weights']}"] if "weights" in result else []
            if seen := result.get("pretrained_on"):
                facts.append(f"WARNING: {warn_of(seen, result['cases'])}")
            data = result.get("config", {}).get("data_path", "")
            split = path.with_name("split.json")
            tested = read_json(split)["test"] if split.is_file() else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a results file of downstream/ that can be read ({error})") from None
    about = f"{path}: {', '.join(facts)}" if facts else str(path)
    return Table(path.parent.name, about, [*frame], frame.map(_cell).to_numpy().tolist(), data, tested)


def _table_of(metrics: dict[str, Any]) -> pd.DataFrame:
    """What stands in the last level of nested metrics makes the columns, what leads there the rows; no lists."""
    table: dict[str, dict[str, Any]] = {}
    for names, value in pd.json_normalize(metrics, sep=DEEPER).iloc[0].items():
        row, _, column = names.rpartition(DEEPER)
        if not isinstance(value, list):
            table.setdefault(row.replace(DEEPER, ".") or "all", {})[column] = "not defined" if value is None else value
    return pd.DataFrame.from_dict(table, orient="index", dtype=object).fillna("").reset_index(names="")


def _cell(value: Any) -> str:
    """Three digits after the point of what is no whole number."""
    try:
        return str(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else f"{float(value):.3f}"
    except ValueError:
        return str(value)
