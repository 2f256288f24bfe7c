"""The scripts from end to end, and what they say when the input is wrong: before training, naming it and the remedy."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import losses, options, run, write_data
from trials import arguments

from utils.errors import UserError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_unusable_volumes_stop_a_run_or_are_left_out_when_asked(tmp_path, capfd):
    data = write_data(tmp_path / "data")
    np.save(data / "Volumes" / "flat.npy", np.ones((24, 24), np.float32))
    np.save(data / "Volumes" / "broken.npy", np.full((24, 24, 12), np.nan, np.float32))
    with pytest.raises(UserError, match=r"flat\.npy: is 2D \(24 x 24\)"):
        run("mask_swav", data, tmp_path)
    assert not (tmp_path / "runs").exists()
    run("mask_swav", data, tmp_path, epochs=1, on_bad="skip")
    assert "broken.npy" in "".join(capfd.readouterr())
    assert (tmp_path / "weights" / "mask_swav.pth").exists()


def test_trees_without_data(data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "Scans").mkdir(parents=True)
    (tmp_path / "other" / "Scans" / "a.nii.gz").write_bytes(b"x")
    for folder, says in (("missing", "does not exist"), ("empty", "holds no|no data set"), ("other", r"Scans.*\.npy")):
        with pytest.raises(UserError, match=f"(?s){says}"):
            run("ssl_swav2D", tmp_path / folder, tmp_path)
    images = tmp_path / "images"
    shutil.copytree(data / "Images", images / "Images")
    with pytest.raises(UserError, match="volumes"):
        run("mask_swav", images, tmp_path)


@pytest.mark.parametrize(
    ("script", "changes", "says"),
    [
        ("mask_swav", {"batch_size": 9}, r"batch_size: 9 .* need 9 volumes.* hold 8"),
        ("ssl_deepcluster2D", {"nmb_prototypes": [21]}, "nmb_prototypes: 21 prototypes are more than the 20"),
        ("ssl_swav3D", {"nmb_prototypes_intra": 101}, "nmb_prototypes_intra: 101 prototypes are more than the 100"),
        ("mask_swav", {"resnet_pretrained": "no.pth"}, r"no\.pth.*ssl_swav2D\.py.*--resnet_pretrained none"),
        ("ssl_swav3D", {"trans_pretrained": "no.pth"}, r"no\.pth.*mask_swav\.py.*--trans_pretrained none"),
    ],
)
def test_options_that_do_not_fit_the_data(script, changes, says, data, tmp_path):
    with pytest.raises(UserError, match=says):
        run(script, data, tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "mask_swav.py", "--data_path", str(tmp_path / "no"), "--resnet_pretrained", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["swav", "deepcluster"])
def test_three_stages_hand_over_and_two_processes_run_the_last(method, data, tmp_path):
    start = {"epochs": 1, "resnet_pretrained": f"resnet_{method}2D.pth"}
    run(f"ssl_{method}2D", data, tmp_path, epochs=1)
    run(f"mask_{method}", data, tmp_path, **start)
    script = f"ssl_{method}3D"
    chosen = options(script, data, tmp_path, **start, trans_pretrained=f"mask_{method}.pth", lambda_mask=0.5)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{script}.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *arguments(chosen)], cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {p.name for p in (tmp_path / "weights").glob("*.pth")}
    assert made == {f"resnet_{method}2D.pth", f"mask_{method}.pth", f"{method}3D.pth", f"{method}3D_encoder.pth"}
    for name in (f"ssl_{method}2D", f"mask_{method}", script):
        (row,) = losses(tmp_path / "runs" / name)
        assert math.isfinite(float(row["loss"]))
        assert (tmp_path / "runs" / name / "config.yaml").exists()
    assert {"inter", "intra", "mask"} <= row.keys()
    before, after = (
        torch.load(tmp_path / "weights" / f, weights_only=True) for f in (f"mask_{method}.pth", f"{method}3D.pth")
    )
    key = "transformer.layers.0.attention.to_q.weight"
    assert not torch.equal(before[key], after[key])  # it trained ...
    assert (before[key] - after[key]).norm() < 0.5 * before[key].norm()  # ... from where stage 2 ended
