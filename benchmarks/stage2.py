"""An epoch of stage 2: ours, ours from cached embeddings, and the plain way to write it.

    python -m benchmarks.stage2                    # CPU, (64, 128, 128), 2 views, ResNet-50: under 3 minutes
    python -m benchmarks.stage2 --device cuda --batch_size 16
    python -m benchmarks.stage2 --arch resnet18 --target_shape [16,64,64]     # to try it: seconds

All read the same volumes, see the same views (made by our loader, so augmentation is no part of the difference) and
train the same transformer with the updates of mask_swav.py. They take turns:
  reference  torchvision's three-channel ResNet, channels-first in float32, BatchNorm in eval mode and not folded, whose
             parameters require gradients that nobody uses, as in the method's released code
  ours       the frozen ResNet folded, channels-last, in chunks, without a graph
  cached     embeddings that an epoch before left on disk (`cached_views`)
`encode` is the forward pass of the frozen ResNet and the projection alone: folded against not folded, both ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.training import Options, training_of, write_volumes
from datasets.batch import Batch
from datasets.embeddings import EmbeddingLoader
from datasets.loaders import OneAhead, canvas_size
from models.encoder import JointEncoder
from models.folding import FrozenSlices
from models.transformer import SliceTransformer
from objectives.learners import Learner
from objectives.masked import masked_loss
from training.train import Training
from utils import config as options
from utils import distributed
from utils.distributed import Run
from utils.precision import Precision

SCRIPT = "mask_swav"


@dataclass
class Config(Options):
    steps: PositiveInt = 2
    """steps of an epoch"""
    repeats: PositiveInt = 4
    """measured epochs of each kind"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    cfg.precisions = cfg.precisions or timing.formats(run.device)
    slices, height, width = cfg.target_shape
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "batch_size": cfg.batch_size}
    results["slices of an epoch"] = 2 * cfg.batch_size * cfg.steps * slices
    with tempfile.TemporaryDirectory(prefix="benchmark_stage2_") as folder:
        data, side = Path(folder, "data"), canvas_size(height, width)
        # As deep as a view, so that no slice is padding.
        write_volumes(data, (side, side, slices), cfg.batch_size * cfg.steps)
        results["encode"] = encode(cfg, run)
        results["epoch"] = epochs(data, cfg, run)
    timing.write(timing.file_name("stage2", cfg, "arch", "target_shape"), results, run.device)


def encode(cfg: Config, run: Run) -> dict[str, Any]:
    """The frozen ResNet and projection on a batch of volumes, folded or not."""
    slices, height, width = cfg.target_shape
    encoder = JointEncoder(cfg.arch, layers=1).eval().to(run.device)
    volumes = torch.rand(cfg.batch_size, slices, height, width, device=run.device)
    mask = torch.ones(cfg.batch_size, slices, dtype=torch.bool, device=run.device)
    number = Precision(cfg.precisions[-1], run.device)

    @torch.no_grad()
    def run_with(encode: Callable[[Tensor, Tensor], object]) -> None:
        with number.autocast():
            encode(volumes, mask)

    print(f"\nencode {mask.numel()} slices, {number.name}, {timing.device_name(run.device)}")
    work = {"folded": partial(run_with, FrozenSlices(encoder)), "unfolded": partial(run_with, encoder.tokens)}
    return {"precision": number.name, **timing.compare(work, cfg.repeats, device=run.device)}


def epochs(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    """Epochs of each kind, and how much longer the reference takes."""
    chosen = {name: getattr(cfg, name) for name in ("arch", "target_shape", "batch_size", "workers")}
    plain = training_of(SCRIPT, data, run, precision="fp32", **chosen)
    plain = Training(Reference(plain.config), plain.loader, plain.config, run)
    plain.core.frozen.requires_grad_(True)  # not to be trained, but to be differentiated
    work = {"reference": epoch_of(plain)}
    for precision in cfg.precisions:
        for name, views in (("ours", 0), ("cached", 1)):
            training = training_of(SCRIPT, data, run, precision=precision, cached_views=views, **chosen)
            if views:
                training = cached(training)
            work[f"{name} {precision}"] = epoch_of(training)
    print(f"\nepoch of {cfg.steps} steps, {timing.device_name(run.device)}")
    pairs = [("reference", name) for name in work if name != "reference"]
    return timing.compare(work, cfg.repeats, device=run.device, pairs=pairs)


def cached(training: Training) -> Training:
    """The same from embeddings on disk, as mask_swav.py builds it."""
    loader = EmbeddingLoader(training.loader, training.core, training.config)
    return Training(training.core, loader, training.config, training.run)


def epoch_of(training: Training) -> Callable[[], None]:
    """A function that trains for one epoch, always the first, whose embeddings are cached after its first call."""
    training.core.begin_epoch(0)
    training.learner.train()

    def epoch() -> None:
        batches = OneAhead(training.loader.epoch(0))
        while batches.next is not None:
            training.update(batches, 0)

    return epoch


class Reference(Learner):
    """Masked slices the plain way: everything in one graph, only the transformer's part of which is used."""

    stage = 2

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(cfg.arch, weights=None)
        projection = nn.Linear(resnet.fc.in_features * (1 + 2 + 4 + 8) // 8, cfg.d_model)
        self.frozen = nn.ModuleDict({"resnet": resnet, "projection": projection}).requires_grad_(False)
        self.transformer = SliceTransformer(cfg.d_model)
        self.mask_token = nn.Parameter(torch.randn(cfg.d_model) * 0.02)
        self.decoder = nn.Linear(cfg.d_model, cfg.d_model)

    def train(self, mode: bool = True) -> Reference:
        super().train(mode)
        self.frozen.eval()
        return self

    def tokens(self, images: Tensor) -> Tensor:
        net = self.frozen["resnet"]
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        features = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            features.append(F.normalize(x.mean(dim=(2, 3)), dim=1))
        return self.frozen["projection"](torch.cat(features, dim=1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.frozen.zero_grad(set_to_none=True)
        images = batch.views.flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1)
        targets = self.tokens(images).view(*batch.views.shape[:3], -1)
        return masked_loss(self.transformer, self.mask_token, self.decoder, targets, batch)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
