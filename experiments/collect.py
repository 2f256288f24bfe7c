"""Bring the results of runs back from a machine through few files of limited size, and make weights of them again.

    python -m experiments.collect --dump_path runs/gpu --parcel out                      # there
    python -m experiments.collect --dump_path runs/gpu --parcel back --restore true      # here, or on the next machine

A parcel is a folder: records.zip (logs, options, states of the runs, what made the weights), and weights in half
precision, cut into parts NAME.pth.0, NAME.pth.1 ..., the newest weights first. Parts that did not fit are named;
--start brings them with the next call, which empties the folder of other parts. So gather the parts of all calls in a
folder of its own to restore them. Weights that a finished stage 3 has started from stay behind.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from utils import checkpoint, exports
from utils import config as options
from utils.errors import UserError

RECORDS, PARTS = "records.zip", "parts.json"
PART = "*.pth.[0-9]*"  # matches the parts in a parcel
KEPT = {".json", ".yaml", ".csv", ".txt"}


@dataclass
class Config:
    dump_path: str = "runs/gpu"
    """folder of the runs and of weights/"""
    parcel: str = "runs/gpu_back"
    """folder to fill; with restore: to read"""
    restore: bool = False
    """write the records and the weights, in float32 again, to dump_path"""
    start: str = ""
    """first part to bring, of those that an earlier call has named as left; empty: the newest weights' first"""
    part_mib: PositiveFloat = 15.5
    """size of a part"""
    max_mib: PositiveFloat = 62.5
    """size of a parcel"""
    max_files: PositiveInt = 8
    """of a parcel"""


def main(cfg: Config) -> None:
    runs, parcel = Path(cfg.dump_path).expanduser(), Path(cfg.parcel).expanduser()
    if cfg.restore:
        restore(parcel, runs)
    else:
        collect(runs, parcel, cfg)


def collect(runs: Path, parcel: Path, cfg: Config) -> None:
    """Make the folder `parcel` hold records and as many parts as fit from cfg.start on, and no other parts.

    Raises UserError where `runs` is no folder or cfg.start is no part of its weights; the parcel stays as it was then.
    """
    if not runs.is_dir():
        raise UserError(f"dump_path: {runs} is not a folder; name that of experiments.run")
    about, parts = {}, {}
    for path in wanted(runs / "weights"):
        content = _half(path)
        cut = [content[i : i + _bytes(cfg.part_mib)] for i in range(0, len(content), _bytes(cfg.part_mib))]
        about[path.name] = {"parts": len(cut), "sha256": hashlib.sha256(content).hexdigest()}
        parts |= {f"{path.name}.{i}": part for i, part in enumerate(cut)}
    if cfg.start and cfg.start not in parts:
        raise UserError(f"start: there is no part {cfg.start} (any more); those are {', '.join(parts) or 'none yet'}")
    names = list(parts)
    begin = names.index(cfg.start) if cfg.start else 0
    parcel.mkdir(parents=True, exist_ok=True)
    for old in parcel.glob(PART):
        old.unlink()
    with zipfile.ZipFile(parcel / RECORDS, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(runs.glob("*/*")):
            if path.suffix in KEPT:
                file.write(path, path.relative_to(runs))
        file.writestr(PARTS, json.dumps(about))
    room, end = _bytes(cfg.max_mib) - (parcel / RECORDS).stat().st_size, begin
    for name in names[begin : begin + cfg.max_files - 1]:
        room -= len(parts[name])
        if room < 0:
            break
        (parcel / name).write_bytes(parts[name])
        end += 1
    print(f"{parcel}: {RECORDS} and {end - begin} of {len(parts)} parts of {', '.join(about) or 'no weights yet'}")
    if begin:
        print(f"before {cfg.start}: {', '.join(names[:begin])}")  # newer weights may have come since the earlier call
    if end < len(parts):
        print(f"left: {', '.join(names[end:])}; --start {names[end]} brings them")


def wanted(folder: Path) -> list[Path]:
    """The weights files, newest first, without stage 2's that a finished stage 3 has started from."""
    files = [path for path in folder.glob("*.pth") if path.with_suffix(".json").is_file()]  # written after the weights
    made_by = {path: json.loads(path.with_suffix(".json").read_text())["config"] for path in files}
    done = {config.get("trans_pretrained") for config in made_by.values()}
    return sorted((p for p in made_by if p.name not in done), key=lambda p: -p.stat().st_mtime_ns)


def restore(parcel: Path, runs: Path) -> None:
    """Write what a parcel holds to `runs`; weights of which parts are missing are named and left out."""
    try:
        with zipfile.ZipFile(parcel / RECORDS) as file:
            about = json.loads(file.read(PARTS))
            for name in file.namelist():
                if name != PARTS and Path(name).parent.name != "weights":  # those have other checksums, see below
                    file.extract(name, runs)
            made_by = {name: json.loads(file.read(f"weights/{Path(name).stem}.json")) for name in about}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"parcel: {parcel / RECORDS} cannot be read ({error}); copy the parcel again") from None
    for name, expected in about.items():
        files = [parcel / f"{name}.{i}" for i in range(expected["parts"])]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            print(f"{name}: not restored, {', '.join(missing)} missing")
            continue
        content = b"".join(file.read_bytes() for file in files)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise UserError(f"parcel: the parts of {name} in {parcel} are damaged or of several runs; copy them again")
        path = runs / "weights" / name
        state = torch.load(io.BytesIO(content), weights_only=True)
        checkpoint.write({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, path)
        record = made_by[name] | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rounded": "float16"}
        checkpoint.write_text(json.dumps(record, indent=2) + "\n", path.with_suffix(".json"))
        print(f"wrote {path}")


def _half(path: Path) -> bytes:
    content = io.BytesIO()
    torch.save(exports.halved(torch.load(path, map_location="cpu", weights_only=True)), content)
    return content.getvalue()


def _bytes(mib: float) -> int:
    return int(mib * 2**20)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
