"""What a run left in its folder: options, table of metrics, checkpoint, and what stands beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from training import scripts
from training.log import METRICS, WARNINGS
from utils import checkpoint
from utils.config import parse, read_yaml
from utils.errors import UserError
from utils.guards import BAD_STEPS

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
        table = pd.read_csv(path, index_col=False, encoding_errors="replace").astype(types)
        if table["epoch"].isna().any():
            raise ValueError("a line lacks its epoch")
    except FileNotFoundError:
        return pd.DataFrame(columns=[*types] if isinstance(types, dict) else ["epoch"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, ValueError) as error:  # what pandas raises are ValueErrors
        raise UserError(f"{path}: is not a run's table ({error}); restore it, or move it away") from None
    return table


def read_warnings(folder: Path) -> list[str]:
    """What a run warned of, with its epoch, and how many updates were skipped. Raises UserError for a broken file."""
    warnings = read_table(folder / WARNINGS, {"epoch": int, "text": str})
    said = [f"epoch {epoch + 1}: {text}" for epoch, text in zip(warnings["epoch"], warnings["text"], strict=True)]
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
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made_by = record["config"]["dump_path"], record["config"]["seed"]
    except (FileNotFoundError, NotADirectoryError):
        notes.append(f"{path} is not there: the run has not finished, or its weights were moved.")
    except (OSError, ValueError, KeyError, TypeError):
        notes.append(f"{path} cannot be read as the record of a weights file.")
    else:
        if made_by == (config.dump_path, config.seed):
            return record
        notes.append(f"{path} is of another run (dump_path {made_by[0]}), which has replaced this one's weights.")
    return None
