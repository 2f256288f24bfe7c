"""A tiny tree of data and options with which every script runs in a second or two."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.encoder import JointEncoder
from training import train, weights
from utils import files, signals


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random vectors of unit length."""
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def shake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random numbers in every parameter and running statistic, so that no zero, one or symmetry hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype), alpha=0.1)
    return module


def save(path: Path, array: np.ndarray) -> Path:
    """An array as a volume (.npy) or image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def write_data(root: Path, volumes: int = 8, images: int = 4) -> Path:
    """Blobs that differ from case to case: 24 x 24 x 12 volumes and 24 x 24 images."""
    rng = np.random.default_rng(0)
    y, x, z = np.mgrid[-1:1:24j, -1:1:24j, -1:1:12j]
    (root / "Volumes").mkdir(parents=True)
    (root / "Images").mkdir()
    for i in range(volumes):
        a, b = rng.uniform(-0.4, 0.4, 2)
        blob = np.exp(-4 * ((x - a) ** 2 + (y - b) ** 2 + z**2)) + 0.05 * rng.standard_normal(x.shape)
        np.save(root / "Volumes" / f"case_{i}.npy", blob.astype(np.float32))
    for i in range(images):
        Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8)).save(root / "Images" / f"image_{i}.png")
    return root


def options(script: str, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of a script's Config, from random weights; `changes` win."""
    chosen: dict[str, Any] = {
        "data_path": str(data),
        "dump_path": str(out / "runs" / script),
        "pretrained_path": str(out / "weights"),
        "arch": "resnet18",
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "epochs": 2,
        "warmup_epochs": 0,
        "batch_size": 2,
        "base_lr": 0.5,
    }
    if "2D" in script:
        chosen |= {"size_crops": [32, 16], "nmb_crops": [2, 1], "slices_per_volume": 2, "batch_size": 4}
    else:
        chosen |= {"target_shape": [8, 32, 32], "d_model": 32, "layers": 1, "resnet_pretrained": "none"}
    if "2D" in script or "3D" in script:
        chosen |= {"hidden_mlp": 32, "feat_dim": 16}
    if "3D" in script:
        chosen |= {"intra_slices": 3, "images_per_step": 2, "trans_pretrained": "none"}
    if "deepcluster" in script and "mask" not in script:
        chosen |= {"kmeans_backend": "torch"}
    return chosen | changes


def save_weights(encoder: nn.Module, path: Path, record: dict[str, Any]) -> None:
    """The file of stage 3 for a joint encoder, of stage 1 for a ResNet."""
    stage, resnet = (3, encoder.resnet) if isinstance(encoder, JointEncoder) else (1, encoder)
    weights.save(SimpleNamespace(encoder=encoder, resnet=resnet, stage=stage), path, record)


def run(script: str, data: Path, out: Path, **changes) -> dict[str, torch.Tensor]:
    """The script in this process; returns the weights it wrote."""
    module = importlib.import_module(script)
    cfg = module.Config(**options(script, data, out, **changes))
    module.main(cfg)
    return torch.load(out / "weights" / cfg.checkpoint_name, weights_only=True)


def losses(folder: Path) -> list[dict[str, str]]:
    timing = {"seconds", "samples_per_second", "data_wait", "peak_memory_mib"}
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(file)]


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave as if SIGTERM came during that step."""
    agree, asked = train._agree, []

    def counted(*args: Any) -> train.Agreed:
        asked.append(1)  # the loop asks once per step
        return agree(*args)

    monkeypatch.setattr(train, "_agree", counted)
    monkeypatch.setattr(signals, "caught", lambda: 15 if len(asked) >= steps else 0)


def write_pairs(root: Path, cases: int = 8, shape: tuple[int, int, int] = (24, 20, 9)) -> Path:
    """A prepared data set: balls (dim, 1) with a brighter half (bright, 2); the last two cases are of one patient."""
    (root / "labels").mkdir(parents=True)
    rows = []
    for i in range(cases):
        rng = np.random.default_rng(i)
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
        centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
        label = ((((grid - centre) / [6, 6, 4]) ** 2).sum(-1) < 1).astype(np.uint8)
        label[(label == 1) & (grid[..., 0] > centre[0])] = 2
        np.save(root / f"c{i}.npy", (label * 40 + rng.normal(30, 4, shape)).astype(np.float32))
        np.save(root / f"labels/c{i}.npy", label)
        rows.append({"id": f"c{i}", "label": f"labels/c{i}.npy", "patient": f"p{min(i, cases - 2)}"})
    files.write_csv(rows, root / "cases.csv")
    (root / "dataset.yaml").write_text("spacing_mm: [1.5, 1, 2]\nslice_axis: 2\nstructures: {dim: [1], bright: [2]}\n")
    return root
