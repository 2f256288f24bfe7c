"""What the diagnostics cost: a training step of stage 3 with and without them, and the end of an epoch.

    python -m benchmarks.diagnostics                                 # CPU, ResNet-50, (64, 128, 128)
    python -m benchmarks.diagnostics --device cuda --batch_size 16

The same step takes turns with its observers on and off (ABAB). Because a small difference of large times is mostly
noise, `observers` also times the observers alone, on the embeddings of such a step. `share` is what an epoch gets
longer: (observers + end of epoch / steps of an epoch) / step without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt

from benchmarks import timing
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from objectives import JointClustering, SwAV
from objectives.diagnostics import Diagnostics
from objectives.sizes import prototype_counts
from utils import config as options
from utils import distributed, optim
from utils.precision import Precision

FEAT_DIM = 128  # of the intra embeddings, as in ssl_swav3D.py


@dataclass
class Config:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where"""
    arch: str = "resnet50"
    """torchvision ResNet"""
    d_model: PositiveInt = 640
    """size of a volume embedding"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    batch_size: PositiveInt = 1
    """volumes per step"""
    intra_slices: PositiveInt = 8
    """slices per volume and step that enter L_intra"""
    volumes: PositiveInt = 1000
    """of an epoch, all different: prototypes and the cost of an epoch's end follow from them"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """as in training"""
    repeats: PositiveInt = 10
    """measurements of each piece"""
    warmup: PositiveInt = 2
    """calls of each piece before"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    D, H, W = cfg.target_shape
    B, slices = cfg.batch_size, cfg.volumes * D
    precision = Precision(cfg.precision, run.device)
    sizes = {"inter": prototype_counts(0, cfg.volumes, "volumes"), "intra": prototype_counts(0, slices, "volumes")}
    encoder = JointEncoder(cfg.arch, cfg.d_model)
    head = ProjectionHead(encoder.encoder.num_features, feat_dim=FEAT_DIM)
    dims, samples = {"inter": cfg.d_model, "intra": FEAT_DIM}, {"inter": cfg.volumes, "intra": slices}
    objectives = {name: SwAV(dims[name], sizes[name]) for name in sizes}
    learner = JointClustering(encoder, head, objectives["intra"], objectives["inter"]).to(run.device).train()
    optimizer = optim.LARC(optim.parameter_groups(learner, 1e-6), 0.1)

    def observers() -> dict[str, Diagnostics]:
        """Two origins, so that the vote takes part."""
        return {
            name: Diagnostics(
                n, sizes[name][0], dims[name], 0.1, run.device, ["first"] * (n // 2) + ["second"] * (n - n // 2)
            )
            for name, n in samples.items()
        }

    torch.manual_seed(0)
    picked = torch.stack([torch.randperm(D)[: cfg.intra_slices] for _ in range(B)]).to(run.device)
    index = torch.arange(B, device=run.device)
    batch = {
        "views": torch.rand(2, B, D, H, W, device=run.device),
        "mask": torch.ones(B, D, dtype=torch.bool, device=run.device),
        "index": index,
        "picked": picked,
        "slice_index": (index.unsqueeze(1) * D + picked).flatten(),
        "rows": torch.arange(B * D, device=run.device),
    }
    counts = {"inter": [B], "intra": [B * picked.shape[1]]}
    watching = observers()

    def step(observed: bool) -> Callable[[], None]:
        def work() -> None:
            for name, objective in objectives.items():
                objective.observer = watching[name] if observed else None
            with precision.autocast():
                loss = learner(**batch)["loss"]
            precision.backward(loss)
            precision.step(optimizer)
            optimizer.zero_grad(set_to_none=True)

        return work

    embedded = {}
    for name, n in counts.items():
        z = F.normalize(torch.randn(2, n[0], dims[name], device=run.device), dim=-1)
        scores = z @ objectives[name].prototypes.heads[0].weight.detach().T
        embedded[name] = z, scores, torch.arange(n[0], device=run.device), n, scores[0].softmax(dim=1)

    def observe() -> None:
        for name, arguments in embedded.items():
            watching[name](*arguments)

    taken = timing.measure(
        {"with": step(True), "without": step(False), "observers": observe}, cfg.repeats, cfg.warmup, run.device
    )

    every = {}
    for name, n in samples.items():
        z = F.normalize(torch.randn(2, n, dims[name]), dim=-1)
        every[name] = z, z @ objectives[name].prototypes.heads[0].weight.detach().cpu().T

    ending = observers()

    def finish_all() -> None:
        for observer in ending.values():
            observer.finish()

    def epoch_of_random_embeddings() -> None:
        for name, observer in ending.items():
            for rows in torch.arange(samples[name]).split(4096):
                z, scores = (part[:, rows].to(run.device) for part in every[name])
                observer(z, scores, rows.to(run.device), [len(rows)])

    ends = timing.measure(
        {"filling": epoch_of_random_embeddings, "finish": finish_all}, max(3, cfg.repeats // 3), 1, run.device
    )
    steps = cfg.volumes // B
    share = (taken["observers"].median + ends["finish"].median / steps) / taken["without"].median
    results: dict[str, Any] = {
        "volumes": cfg.volumes,
        "target_shape": list(cfg.target_shape),
        "batch_size": B,
        "arch": cfg.arch,
        "precision": precision.name,
        "prototypes": {name: size[0] for name, size in sizes.items()},
        "steps": {name: t.record() for name, t in taken.items()},
        "with_over_without": taken["with"].over(taken["without"]),
        "finish": ends["finish"].record(),
        "share": share,
    }
    path = timing.write("diagnostics", results, run.device)
    for name, t in taken.items():
        print(f"{name:10s} {1e3 * t.median:9.2f} ms  (IQR {1e3 * t.iqr:.2f})")
    print(f"{'epoch end':10s} {1e3 * ends['finish'].median:9.2f} ms, once in {steps} steps")
    print(f"with / without {results['with_over_without']:.4f}; share of an epoch {share:.2%}\nwrote {path}")


if __name__ == "__main__":
    options.main(main, Config, __doc__)
