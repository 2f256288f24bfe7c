"""Train all three stages with both methods on the bundled phantoms, and see what the frozen features have learned.

    make demo          installs what is needed first
    python demo.py     in an environment that has it

Everything is small (ResNet-18, 32 slices of 40 x 40, a few epochs), so that two CPU cores need minutes. The check asks
of phantoms from other seeds something that training never saw, their label maps: from the frozen features of one slice,
which structures does it show? A k-nearest-neighbour vote over the slices of a few labelled cases answers; the score is
the balanced accuracy over structures (0.5 is chance), for each initialisation of the ResNet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conversion.phantoms import ANATOMIES, STRUCTURES, phantom
from models.resnet import GreyResNet, pooled
from training import weights
from utils import config as options

HERE = Path(__file__).resolve().parent
ARCH, SHAPE = "resnet18", (32, 40, 40)  # slices, height, width


@dataclass
class Config:
    data_path: str = "Training_Data"
    """data sets to train on"""
    dump_path: str = "runs/demo"
    """everything the demo writes; emptied at the start"""
    labelled: int = 10
    """phantoms of each anatomy whose label maps the vote may use"""
    unlabelled: int = 20
    """phantoms of each anatomy that it is tested on"""


def main(cfg: Config) -> None:
    started = time.monotonic()
    folder = Path(cfg.dump_path)
    if folder.exists():
        shutil.rmtree(folder)
    results = folder / "weights"
    seconds = {}
    for method in ("swav", "deepcluster"):
        for script, args in stages(method):
            began = time.monotonic()
            print(f"\n=== {script}.py {' '.join(args)}", flush=True)
            command = [sys.executable, str(HERE / f"{script}.py"), *args, "--data_path", cfg.data_path]
            command += ["--arch", ARCH, "--dump_path", str(folder / script), "--pretrained_path", str(results)]
            code = subprocess.run([*command, "--workers", "0"], cwd=HERE).returncode
            if code:
                raise SystemExit(f"demo stopped: {script}.py failed with exit code {code}")
            seconds[script] = time.monotonic() - began

    print("\n=== which structures does a slice show? k-NN on frozen features", flush=True)
    rows = [("random initialisation", [load(None, seed) for seed in range(3)], "")]
    for method in ("swav", "deepcluster"):
        rows.append((f"{method} stage 1 (2D)", [load(results / f"resnet_{method}2D.pth")], f"ssl_{method}2D"))
        rows.append((f"{method} stage 3 (joint)", [load(results / f"{method}3D_encoder.pth")], f"ssl_{method}3D"))
    held_out = [cases(anatomy, cfg.labelled + cfg.unlabelled) for anatomy in ANATOMIES]
    print(f"\n{'frozen ResNet':28s}" + "".join(f"{a:>9s}" for a in ANATOMIES) + f"{'mean':>9s}{'training':>11s}")
    for name, resnets, script in rows:
        scores = np.mean([[score(resnet, *drawn, cfg.labelled) for drawn in held_out] for resnet in resnets], axis=0)
        took = f"{seconds[script]:.0f} s" if script else "-"
        print(f"{name:28s}" + "".join(f"{s:9.3f}" for s in scores) + f"{scores.mean():9.3f}{took:>11s}", flush=True)
    print(
        f"balanced accuracy; {cfg.labelled} labelled, {cfg.unlabelled} test phantoms of each anatomy; random: 3 seeds\n"
    )
    for method in ("swav", "deepcluster"):
        loss, guess = masked_error(folder / f"mask_{method}" / "metrics.csv")
        print(f"mask_{method}: error {loss:.3f} on masked slices; interpolation between neighbours {guess:.3f}")
    print(
        f"\nweights  {results}\nlogs     {folder}/*/metrics.csv\ntook     {(time.monotonic() - started) / 60:.1f} min"
    )


def stages(method: str) -> list[tuple[str, list[str]]]:
    """Script and options of each stage."""
    images = ["--size_crops", "[40]", "--nmb_crops", "[2]", "--min_scale_crops", "[0.25]", "--max_scale_crops", "[1.0]"]
    images += ["--slices_per_volume", "16", "--batch_size", "64", "--epochs", "5", "--warmup_epochs", "1"]
    volumes = ["--target_shape", str(list(SHAPE)), "--d_model", "128", "--batch_size", "5", "--warmup_epochs", "1"]
    return [
        (f"ssl_{method}2D", [*images, "--base_lr", "2"]),
        (f"mask_{method}", [*volumes, "--epochs", "3"]),
        (f"ssl_{method}3D", [*volumes, "--epochs", "3", "--base_lr", "1" if method == "swav" else "0.1"]),
    ]


def cases(anatomy: str, count: int) -> tuple[Tensor, np.ndarray]:
    """Phantoms of seeds that the bundled data do not use: images [N, D, H, W] in 0..1, presence [N, D, structures]."""
    slices, height, width = SHAPE
    drawn = [phantom(anatomy, 10_000 + i, (height, width, slices)) for i in range(count)]
    images = []
    for case in drawn:
        low, high = np.percentile(case.image, [0.5, 99.5])
        images.append(((case.image - low) / (high - low)).clip(0, 1).astype(np.float32).transpose(2, 0, 1))
    labels = np.stack([case.labels.transpose(2, 0, 1) for case in drawn])
    # A structure is present when it covers 0.3 % of a slice; asked for are those that some slices show and some do not.
    shown = np.stack([(labels == k).mean(axis=(2, 3)) > 0.003 for k in STRUCTURES[anatomy]], axis=-1)
    share = shown.mean(axis=(0, 1))
    return torch.from_numpy(np.stack(images)), shown[..., (share > 0.15) & (share < 0.85)]


def load(path: Path | None, seed: int = 0) -> GreyResNet:
    torch.manual_seed(seed)
    resnet = GreyResNet(ARCH)
    if path is not None:
        weights.load_backbone(resnet, str(path.parent), path.name, made_by="demo.py")
    return resnet.eval()


@torch.no_grad()
def score(resnet: GreyResNet, images: Tensor, shown: np.ndarray, labelled: int, k: int = 5) -> float:
    """Balanced accuracy over structures of a k-NN vote (cosine) from the slices of the labelled cases."""
    features = torch.stack([F.normalize(pooled(resnet(case.unsqueeze(1))), dim=1) for case in images])  # [N, D, C]
    bank, queries = features[:labelled].flatten(0, 1), features[labelled:].flatten(0, 1)
    known, truth = (shown[part].reshape(-1, shown.shape[-1]) for part in (slice(labelled), slice(labelled, None)))
    nearest = (queries @ bank.T).topk(k, dim=1).indices.numpy()
    voted = known[nearest].mean(axis=1) > 0.5
    per_structure = [(voted[t, s].mean() + (~voted[~t, s]).mean()) / 2 for s, t in enumerate(truth.T)]
    return float(np.mean(per_structure))


def masked_error(path: Path) -> tuple[float, float]:
    names, *_, last = (line.split(",") for line in path.read_text().splitlines())
    row = dict(zip(names, last, strict=True))
    return float(row["loss"]), float(row["interpolation"])


if __name__ == "__main__":
    os.chdir(HERE)
    options.main(main, Config, __doc__)
