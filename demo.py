"""Train all three stages with both methods on the bundled phantoms, and see what the frozen features have learned.

    make demo          installs what is needed first
    python demo.py     in an environment that has it

Everything is small (ResNet-18, 32 slices of 40 x 40, a few epochs), so that two CPU cores need minutes. The check asks
of phantoms from other seeds something that training never saw, their label maps: from the frozen features of one slice,
which structures does it show? A k-nearest-neighbour vote over the slices of a few labelled cases answers; the score is
the balanced accuracy over structures (0.5 is chance), for each initialisation of the ResNet.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from conversion.phantoms import ANATOMIES, STRUCTURES, phantom
from models.resnet import GreyResNet, pooled
from training import loading
from utils import config as options

Cases = tuple[Tensor, np.ndarray]  # images [N, D, H, W] in 0..1, which structures each slice shows [N, D, structures]
ARCH, SHAPE = "resnet18", (32, 40, 40)  # slices, height, width
LABELLED, UNLABELLED = 10, 20  # phantoms of each anatomy whose label maps the vote may use, and that it is tested on
IMAGES = "--size_crops [40] --nmb_crops [2] --min_scale_crops [0.25] --max_scale_crops [1.0] --slices_per_volume 16 "
IMAGES += "--batch_size 64 --epochs 10 --base_lr 2"
VOLUMES = "--target_shape [32,40,40] --d_model 128 --batch_size 5 --epochs 6"
RUNS = (  # script, its options, row of the table, weights in it
    ("ssl_swav2D", IMAGES, "swav stage 1 (2D)", "resnet_swav2D.pth"),
    ("mask_swav", VOLUMES, None, None),
    ("ssl_swav3D", f"{VOLUMES} --base_lr 1", "swav stage 3 (joint)", "swav3D_encoder.pth"),
    ("ssl_deepcluster2D", IMAGES, "deepcluster stage 1 (2D)", "resnet_deepcluster2D.pth"),
    ("mask_deepcluster", VOLUMES, None, None),
    ("ssl_deepcluster3D", f"{VOLUMES} --base_lr 0.1", "deepcluster stage 3 (joint)", "deepcluster3D_encoder.pth"),
)


@dataclass
class Config:
    data_path: str = "Training_Data"
    """data sets to train on"""
    dump_path: str = "runs/demo"
    """folder of everything that the demo writes; emptied at the start"""


def main(cfg: Config) -> None:
    started, folder = time.monotonic(), Path(cfg.dump_path)
    shutil.rmtree(folder, ignore_errors=True)
    networks = {"random, mean of 3": [resnet_of(None, seed) for seed in range(3)]}
    for script, args, name, file in RUNS:
        train(script, f"{args} --warmup_epochs 1".split(), cfg)
        if name:
            networks[name] = [resnet_of(folder / "weights" / file)]
    print("\n=== which structures does a slice show? k-NN on frozen features", flush=True)
    held_out = {anatomy: cases(anatomy, LABELLED + UNLABELLED) for anatomy in ANATOMIES}
    table = pd.DataFrame(index=list(networks), columns=list(held_out), dtype=float)
    for name, anatomy in itertools.product(networks, held_out):
        table.loc[name, anatomy] = np.mean([score(net, *held_out[anatomy]) for net in networks[name]])
    print(f"\n{table.assign(mean=table.mean(axis=1)).round(3).to_string()}")
    print(f"balanced accuracy; {LABELLED} labelled, {UNLABELLED} test phantoms of each anatomy\n")
    for script in ("mask_swav", "mask_deepcluster"):
        last = pd.read_csv(folder / script / "metrics.csv").iloc[-1]
        print(f"{script}: error {last.loss:.3f} on masked slices; interpolation of neighbours {last.interpolation:.3f}")
    minutes = (time.monotonic() - started) / 60
    print(f"\nweights  {folder}/weights\nlogs     {folder}/*/metrics.csv\ntook     {minutes:.1f} min")


def train(script: str, args: list[str], cfg: Config) -> None:
    """Run a script in a process of its own."""
    print(f"\n=== {script}.py {' '.join(args)}", flush=True)
    args = [*args, "--arch", ARCH, "--workers", "0", "--data_path", cfg.data_path]
    args += ["--dump_path", f"{cfg.dump_path}/{script}", "--pretrained_path", f"{cfg.dump_path}/weights"]
    if code := subprocess.run([sys.executable, f"{script}.py", *args]).returncode:
        raise SystemExit(f"demo stopped: {script}.py failed with exit code {code}")


def cases(anatomy: str, count: int) -> Cases:
    """Phantoms of seeds that the bundled data do not use."""
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


def resnet_of(path: Path | None, seed: int = 0) -> GreyResNet:
    """The network of a weights file, or a random one."""
    torch.manual_seed(seed)
    resnet = GreyResNet(ARCH)
    if path is not None:
        loading.load_resnet(resnet, path, "run demo.py again")
    return resnet.eval()


@torch.no_grad()
def score(resnet: GreyResNet, images: Tensor, shown: np.ndarray, k: int = 5) -> float:
    """Balanced accuracy over structures of a k-NN vote (cosine) from the slices of the labelled cases."""
    features = torch.cat([pooled(resnet(case.unsqueeze(1))) for case in images])  # [N * D, C]
    truth, known = shown.reshape(len(features), -1), LABELLED * shown.shape[1]
    voted = KNeighborsClassifier(k, metric="cosine").fit(features[:known], truth[:known]).predict(features[known:])
    parts = zip(truth[known:].T, voted.T, strict=True)
    return float(np.mean([balanced_accuracy_score(*of_structure) for of_structure in parts]))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)
    options.main(main, Config, __doc__)
