"""An epoch of stage 2: ours, ours from cached embeddings, and the plain way to write it.

    python -m benchmarks.stage2                    # CPU, (64, 128, 128), 2 views, ResNet-50: under 3 minutes
    python -m benchmarks.stage2 --device cuda
    python -m benchmarks.stage2 --arch resnet18 --target_shape [16,64,64]     # to try it: seconds

All read the same volumes, see the same views (made by our loader, so augmentation is no part of the difference) and
train the same transformer with the same optimiser. They take turns:
  reference  torchvision's three-channel ResNet, channels-first in float32, BatchNorm in eval mode and not folded, whose
             parameters require gradients that nobody uses, as in the method's released code
  ours       the frozen ResNet folded, channels-last, in chunks, without a graph
  cached     embeddings that an epoch before left on disk (`cached_views`)
`encode` is the forward pass of the frozen ResNet and the projection alone: folded against not folded, both ours.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.data import write_raw
from benchmarks.training import Options, file_name, volume_loader
from datasets.embeddings import EmbeddingLoader
from datasets.loaders import VolumeLoader, canvas_size
from models.encoder import JointEncoder
from models.folding import FrozenSlices
from models.transformer import SliceTransformer
from objectives import MaskedSlices
from objectives.learners import masked_loss
from utils import config as options
from utils import distributed, optim
from utils.distributed import Run
from utils.precision import Precision


@dataclass
class Config(Options):
    d_model: PositiveInt = 640
    """size of a slice embedding"""
    batch_size: NonNegativeInt = 0
    """volumes per step; 0: 1 on a CPU, 4 on a GPU"""
    steps: PositiveInt = 2
    """of an epoch"""
    precisions: list[Literal["fp32", "bf16"]] = ("fp32", "bf16")
    """number formats of ours; a CPU without bf16 units is better off with fp32 alone"""
    repeats: PositiveInt = 4
    """measured epochs of each kind"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    cfg.batch_size = cfg.batch_size or (1 if run.device.type == "cpu" else 4)
    slices, height, width = cfg.target_shape
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "d_model": cfg.d_model}
    root = Path(tempfile.mkdtemp(prefix="benchmark_stage2_"))
    try:
        # As deep as a view, so that no slice is padding.
        write_raw(root, (canvas_size(height, width),) * 2 + (slices,), "int16", cfg.batch_size * cfg.steps)
        results["encode"] = encode(cfg, run)
        results["epoch"] = epochs(root, cfg, run)
    finally:
        shutil.rmtree(root)
    print(f"\nwritten to {timing.write(file_name('stage2', cfg), results, run.device)}")


def encode(cfg: Config, run: Run) -> dict[str, Any]:
    """Milliseconds per slice of the frozen ResNet and projection, folded or not."""
    slices, height, width = cfg.target_shape
    torch.manual_seed(0)
    encoder = JointEncoder(cfg.arch, cfg.d_model, layers=1).eval().to(run.device)
    folded = FrozenSlices(encoder)
    volumes = torch.rand(cfg.batch_size, slices, height, width, device=run.device)
    mask = torch.ones(cfg.batch_size, slices, dtype=torch.bool, device=run.device)
    work: dict[str, Callable[[], object]] = {}

    def add(precision: str) -> None:
        number = Precision(precision, run.device)

        def unfolded() -> None:
            with torch.no_grad(), number.autocast():
                encoder.tokens(volumes, mask)

        def ours() -> None:
            with number.autocast():
                folded(volumes, mask)

        work[f"unfolded {precision}"], work[f"folded {precision}"] = unfolded, ours

    for precision in cfg.precisions:
        add(precision)
    times = timing.measure(work, repeats=cfg.repeats, warmup=1, device=run.device)
    for name, t in times.items():
        print(f"encode, {name:14s} {t.median / mask.numel() * 1e3:8.2f} ms a slice", flush=True)
    ratios = {p: times[f"unfolded {p}"].over(times[f"folded {p}"]) for p in cfg.precisions}
    return {"slices": mask.numel(), "unfolded_over_folded": ratios, **{name: t.record() for name, t in times.items()}}


def epochs(root: Path, cfg: Config, run: Run) -> dict[str, Any]:
    """Seconds of an epoch of each kind, and how much longer the reference takes."""
    volumes = partial(volume_loader, root, cfg, run, mask_ratio=0.15)
    reference = Reference(cfg).to(run.device)
    work = {"reference": epoch_of(reference, volumes(), "fp32", run)}
    reference.frozen.requires_grad_(True)  # not to be trained, but to be differentiated
    for precision in cfg.precisions:
        torch.manual_seed(0)
        learner = MaskedSlices(JointEncoder(cfg.arch, cfg.d_model)).to(run.device)
        learner.begin_epoch(0)
        number = Precision(precision, run.device)
        cached = EmbeddingLoader(volumes(), learner, 1, cfg.d_model, cfg.workers, number)
        work[f"ours {precision}"] = epoch_of(learner, volumes(), precision, run)
        work[f"cached {precision}"] = epoch_of(learner, cached, precision, run)
    times = timing.measure(work, cfg.repeats, warmup=1, device=run.device)
    count = 2 * cfg.batch_size * cfg.steps * cfg.target_shape[0]
    ratios = {name: times["reference"].over(t) for name, t in times.items() if name != "reference"}
    for name, t in times.items():
        line = f"epoch, {name:14s} {t.median:9.3f} s, {count / t.median:8.1f} slices/s"
        print(line + (f"; the reference takes {ratios[name]:.1f} x as long" if name in ratios else ""), flush=True)
    shapes = {"batch_size": cfg.batch_size, "steps": cfg.steps, "slices_of_both_views": count}
    return {**shapes, "reference_over": ratios, **{name: t.record() for name, t in times.items()}}


def epoch_of(
    learner: nn.Module, loader: VolumeLoader | EmbeddingLoader, precision: str, run: Run
) -> Callable[[], None]:
    """A function that trains for one epoch, always the first, whose embeddings are cached after its first call."""
    optimizer = optim.LARC(optim.parameter_groups(learner, 1e-6), 0.1)
    number = Precision(precision, run.device)
    learner.train()

    def epoch() -> None:
        for batch in loader.epoch(0):
            with number.autocast():
                loss = learner(**batch)["loss"]
            number.backward(loss)
            number.step(optimizer)
            learner.zero_grad(set_to_none=True)

    return epoch


class Reference(nn.Module):
    """Masked slices the plain way: everything in one graph, only the transformer's part of which is used."""

    def __init__(self, cfg: Config) -> None:
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

    def embed(self, images: Tensor) -> Tensor:
        net = self.frozen["resnet"]
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        features = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            features.append(F.normalize(x.mean(dim=(2, 3)), dim=1))
        return self.frozen["projection"](torch.cat(features, dim=1))

    def forward(self, views: Tensor, mask: Tensor, hidden: Tensor, **_: Any) -> dict[str, Tensor]:
        images = views.flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1)
        tokens = self.embed(images).unflatten(0, (-1, views.shape[2]))
        mask = mask.repeat(len(views), 1)
        return masked_loss(self.transformer, self.mask_token, self.decoder, tokens, mask, hidden.flatten(0, 1))


if __name__ == "__main__":
    options.main(main, Config, __doc__)
