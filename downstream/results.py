"""What a finished run leaves, what it depends on, and how far its test cases can be trusted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets.origins import shared
from downstream.encoders import NAMED, content_of
from training.loading import read_record
from utils import config
from utils.errors import UserError
from utils.files import read_json

RESULTS = "results.json"  # of a run that is finished


def pretrained_on(weights: str, test: Mapping[str, Path]) -> list[str]:
    """The test cases that the weights were trained on, or whose patients; as far as the record of the weights says."""
    record = None if weights in NAMED else read_record(Path(weights))
    return shared(test, (record or {}).get("data", {}).get("files", []))


def warn_of(seen: Sequence[str], count: int) -> str:
    """What to say where test cases were pre-trained on."""
    some = ", ".join(seen[:3]) + ", ..." * (len(seen) > 3)
    return f"{len(seen)} of {count} test cases ({some}) or their patients were pre-trained on: scores may be too high"


def fingerprint(files: Iterable[Path]) -> str:
    """sha256 (hex) over names, sizes and times of files: changes when one of them is written again."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a finished run, with nan in place of null."""
    path = folder / RESULTS
    try:
        result = read_json(path)
        return result | {"metrics": _with_nan(result["metrics"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged, or of another version; remove it to have the run repeated") from None


def settings_of(cfg: Any) -> dict[str, Any]:
    """What a result depends on beside the data: options, and the content of the files that they name."""
    values = config.to_dict(cfg)
    chosen = {f.name: values[f.name] for f in fields(cfg) if not f.metadata.get("may_change")}
    files = {name: content for name, value in chosen.items() if (content := content_of(value)) != value}
    return {"options": {name: value for name, value in chosen.items() if name not in files}, "files": files}


def differences(old: dict[str, Any] | None, new: dict[str, Any]) -> list[str]:
    """In what the settings of two runs differ."""
    if not old:
        return ["of another script"]
    (before, files), (now, others) = ((settings["options"], settings["files"]) for settings in (old, new))
    changed = [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    changed += [f"the content of {name}" for name in others if files.get(name) != others[name]]
    return changed + ["the files below data_path"] * (old["data"] != new["data"])


def _with_nan(metrics: Any) -> Any:
    if isinstance(metrics, dict):
        return {name: _with_nan(value) for name, value in metrics.items()}
    return math.nan if metrics is None else metrics
