"""What travels to a machine that only small files can reach, and what comes back from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from datasets.index import scan
from datasets.render import render
from experiments import collect, pack
from models.encoder import JointEncoder
from utils import weights
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
SIDE, PLENTY = 40, 2**30
GREY = 1 / 255  # half of it is what 8 bits lose


def smooth(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return sum(np.cos(rng.uniform(1, 4) * x + rng.uniform(0, 6)) for x in axes) + rng.normal(0, 0.05, shape)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Volumes with slices first, in a window of Hounsfield units; volumes of several sizes; images."""
    root = tmp_path / "data" / "pretrain"
    for name in ("CT", "MR", "Pictures"):
        (root / name).mkdir(parents=True)
    np.save(root / "CT" / "a.npy", (400 * smooth(7, 60, 80)).astype(np.int16))
    settings = {"window": [-300, 500], "slice_axis": 0, "spacing_mm": [5.0, 0.5, 0.7], "modality": "CT", "note": "ours"}
    (root / "CT" / "dataset.yaml").write_text(yaml.safe_dump(settings))
    for i, shape in enumerate([(24, 16, 6), (100, 50, 5)]):
        np.save(root / "MR" / f"{i}.npy", smooth(*shape, seed=i).astype(np.float32))
    (root / "MR" / "dataset.yaml").write_text(yaml.safe_dump({"spacing_mm": [1.0, 1.0, 2.0]}))
    picture = np.clip(128 + 60 * smooth(30, 36, seed=5), 0, 255).astype(np.uint8)
    Image.fromarray(picture).save(root / "Pictures" / "small.png")
    Image.fromarray(np.clip(128 + 60 * smooth(90, 60, seed=6), 0, 255).astype(np.uint8)).save(
        root / "Pictures" / "large.jpg"
    )
    return tmp_path / "data"


def there_and_back(tree: Path, tmp_path: Path) -> Path:
    pack.pack(tree, tmp_path / "x.zip", SIDE, PLENTY)
    pack.unpack(tmp_path / "x.zip", tmp_path / "back")
    return tmp_path / "back"


def test_training_sees_the_same_after_a_journey(tree: Path, tmp_path: Path) -> None:
    back = there_and_back(tree, tmp_path)
    before, after = scan(tree / "pretrain"), scan(back / "pretrain")
    assert [(s.dataset, s.kind, s.slices) for s in after] == [(s.dataset, s.kind, s.slices) for s in before]
    assert max(max(s.height, s.width) for s in after) == SIDE
    for old, new in zip(before, after, strict=True):
        difference = np.abs(render(new, SIDE).astype(np.float32) - render(old, SIDE).astype(np.float32))
        if old.kind == "volume":
            assert difference.max() < 0.65 * GREY  # 8 bits, and half precision in both working copies
        elif old.name.endswith("small.png"):  # its percentiles are where they were
            assert difference.max() < 2 * GREY
        else:  # it was reduced, which narrows its range, and is stretched again
            assert difference.mean() < 0.1


def test_small_slices_are_not_enlarged_and_slices_come_last(tree: Path, tmp_path: Path) -> None:
    back = there_and_back(tree, tmp_path) / "pretrain"
    shapes = {path.name: np.load(path).shape for path in back.glob("*/*.npy")}
    assert shapes == {"a.npy": (30, 40, 7), "0.npy": (24, 16, 6), "1.npy": (40, 20, 5)}
    assert np.load(back / "CT" / "a.npy").dtype == np.uint8


def test_dataset_yaml_describes_the_packed_volumes(tree: Path, tmp_path: Path) -> None:
    back = there_and_back(tree, tmp_path) / "pretrain"
    of_ct = yaml.safe_load((back / "CT" / "dataset.yaml").read_text())
    assert of_ct == {
        "window": [0, 255],
        "slice_axis": 2,
        "modality": "CT",
        "note": "ours",
        "source_intensities": [-300, 500],
        "spacing_mm": [1.0, 1.4, 5.0],  # 60 rows became 30; the slices lay along the first axis
    }
    # One volume was reduced and the other was not, so they have no spacing in common any more.
    assert yaml.safe_load((back / "MR" / "dataset.yaml").read_text()) == {"slice_axis": 2, "window": [0, 255]}


def test_the_same_data_give_the_same_archive(tree: Path, tmp_path: Path) -> None:
    for name in ("x.zip", "y.zip"):
        pack.pack(tree, tmp_path / name, SIDE, PLENTY)
    assert (tmp_path / "x.zip").read_bytes() == (tmp_path / "y.zip").read_bytes()


def test_an_archive_above_the_limit_is_not_left_behind(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    with pytest.raises(UserError, match=r"would have 0.0 MiB, more than 0.001.*lower --view"):
        pack.main(pack.Config(data=str(tree), archive=str(archive), max_mib=0.001))
    assert not list(tmp_path.glob("*x.zip*"))


def test_unpacking_goes_on_where_it_ended_and_touches_nothing_else(tree: Path, tmp_path: Path) -> None:
    back = there_and_back(tree, tmp_path)
    (back / "pretrain" / "MR" / "0.npy").unlink()
    kept = back / "pretrain" / "MR" / "1.npy"
    before = kept.stat().st_mtime_ns  # the working copy of training goes by it
    assert pack.unpack(tmp_path / "x.zip", back) == (1, 6)
    assert kept.stat().st_mtime_ns == before


def test_a_wrong_archive_is_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.zip is not there"):
        pack.unpack(tmp_path / "none.zip", tmp_path / "back")
    pack.pack(tree, tmp_path / "x.zip", SIDE, PLENTY)
    whole = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "short.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"short.zip is damaged"):
        pack.unpack(tmp_path / "short.zip", tmp_path / "back")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("../outside.txt", "x")
    with pytest.raises(UserError, match=r"other.zip was not made by this command \(\.\./outside.txt\)"):
        pack.unpack(tmp_path / "other.zip", tmp_path / "back")
    assert not (tmp_path / "outside.txt").exists()


def test_scripts_train_from_an_unpacked_tree(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pretrain").symlink_to(data, target_is_directory=True)
    back = there_and_back(tmp_path / "data", tmp_path)
    state = tiny.run("ssl_swav2D", back / "pretrain", tmp_path, epochs=1)
    assert state["conv1.weight"].isfinite().all()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Stages 1 to 3 of one method, as experiments.run leaves them."""
    torch.manual_seed(0)
    out, joint = tmp_path / "runs", JointEncoder("resnet18", 32, 1)
    starts = {"resnet_pretrained": "first.pth"}
    for name, config in (("first", {}), ("second", starts), ("third", starts | {"trans_pretrained": "second.pth"})):
        (out / name).mkdir(parents=True)
        (out / name / "status.json").write_text('{"done": true}')
        (out / name / "checkpoint.pth").write_text("large")
        record = {"config": {"arch": "resnet18", "d_model": 32, "layers": 1} | config}
        if name == "first":
            weights.save_resnet(joint.encoder, out / "weights" / f"{name}.pth", record)
        else:
            weights.save_joint(joint, out / "weights" / f"{name}.pth", record)
    (out / "weights" / "second_encoder.pth").unlink()  # stage 2 writes none
    return out


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def parcels(runs: Path, parcel: Path, **changes) -> collect.Config:
    return collect.Config(**({"dump_path": str(runs), "parcel": str(parcel), "part_mib": 9, "max_mib": 32} | changes))


def test_weights_come_back_in_parts_as_what_they_were_to_half_precision(runs, tmp_path, capsys) -> None:
    parcel, gathered, again = tmp_path / "parcel", tmp_path / "gathered", tmp_path / "again"
    # About 22 MiB each; what stage 3 has started from in stage 2 stays behind.
    parts = [f"{name}.{i}" for name in ("third_encoder.pth", "third.pth", "first.pth") for i in range(3)]
    collect.main(parcels(runs, parcel))
    assert f"left: {', '.join(parts[4:])}; --start {parts[4]} brings them" in capsys.readouterr().out
    assert files(parcel) == {*parts[:4], "records.zip"}  # as many as 32 MiB hold
    shutil.copytree(parcel, gathered)
    collect.main(parcels(runs, parcel, start=parts[4], max_mib=50))
    assert "left" not in capsys.readouterr().out
    assert files(parcel) == {*parts[4:], "records.zip"}
    shutil.copytree(parcel, gathered, dirs_exist_ok=True)
    collect.main(parcels(again, gathered, restore=True))
    assert (again / "third" / "status.json").is_file()
    assert not list(again.glob("*/checkpoint.pth"))
    restored = weights.load_joint(again / "weights" / "third.pth").state_dict()
    original = weights.load_joint(runs / "weights" / "third.pth").state_dict()
    for key, value in original.items():
        assert restored[key].dtype == value.dtype
        torch.testing.assert_close(restored[key], value, rtol=1e-3, atol=1e-6)
    assert json.loads((again / "weights" / "third.json").read_text())["rounded"] == "float16"


def test_a_parcel_replaces_the_one_before_and_names_what_has_come_in_between(runs, tmp_path, capsys) -> None:
    parcel = tmp_path / "parcel"
    collect.main(parcels(runs, parcel))
    (parcel / "gone.pth.0").write_bytes(b"of weights that are not wanted any more")
    (parcel / "notes.txt").write_text("not a part")
    for suffix in (".pth", ".json"):  # a run that finishes before the next call
        shutil.copy(runs / "weights" / f"first{suffix}", runs / "weights" / f"newest{suffix}")
    capsys.readouterr()
    collect.main(parcels(runs, parcel, start="third.pth.1"))
    before = files(parcel)
    assert before == {"records.zip", "notes.txt", "third.pth.1", "third.pth.2", "first.pth.0", "first.pth.1"}
    assert "before third.pth.1: newest.pth.0, newest.pth.1, newest.pth.2, third_encoder" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"start: there is no part second.pth.0 \(any more\); those are newest"):
        collect.main(parcels(runs, parcel, start="second.pth.0"))
    assert files(parcel) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("run", "collected"), [(0, 0), (3, 0), (0, 4), (3, 4)])
def test_experiments_gpu_fails_where_a_run_or_its_collection_has_failed(
    run: int, collected: int, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *experiments.run*) exit {run};; *experiments.collect*)\n'
        f"touch {tmp_path}/collected; exit {collected};; esac\n"
    )
    python.chmod(0o755)
    done = subprocess.run(["make", "experiments-gpu", f"PYTHON={python}"], cwd=ROOT, capture_output=True)
    assert (done.returncode != 0) == (run != 0 or collected != 0)
    assert (tmp_path / "collected").exists()


def test_weights_of_which_a_part_is_missing_or_damaged_are_not_restored(runs, tmp_path, capsys) -> None:
    parcel, again = tmp_path / "parcel", tmp_path / "again"
    collect.main(parcels(runs, parcel, max_mib=100, max_files=10))
    (parcel / "third.pth.1").unlink()
    collect.main(parcels(again, parcel, restore=True))
    assert "third.pth: not restored, third.pth.1 missing" in capsys.readouterr().out
    whole = {"third_encoder.pth", "third_encoder.json", "first.pth", "first.json"}
    assert {p.name for p in (again / "weights").iterdir()} == whole
    (parcel / "third.pth.1").write_bytes(b"other")
    with pytest.raises(UserError, match=r"parts of third.pth in .* are damaged or of several runs"):
        collect.main(parcels(again, parcel, restore=True))
    (parcel / "records.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"records.zip cannot be read"):
        collect.main(parcels(again, parcel, restore=True))


def test_stages_that_stage_3_needs_come_back_until_it_is_finished(runs) -> None:
    for path in (runs / "weights").glob("third*"):
        path.unlink()
    assert {path.name for path in collect.wanted(runs / "weights")} == {"first.pth", "second.pth"}
