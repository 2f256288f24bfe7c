"""Stage 1, DeepCluster-v2: cluster 2D images and slices of volumes to pre-train the slice encoder (L_intra alone).

    torchrun --nproc_per_node=2 ssl_deepcluster2D.py --data_path Training_Data  # every constant is an option
    python ssl_deepcluster2D.py --arch resnet18 --size_crops [64,32] --epochs 20   # one process, CPU

Result: weights/resnet_deepcluster2D.pth, a flat torchvision ResNet state dict. Method: Caron et al., NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from datasets.augment import MultiCrop
from datasets.index import fingerprint
from datasets.loaders import ImageLoader, Slices, canvas_size
from datasets.store import prepare
from models.heads import ProjectionHead
from models.resnet import ARCHITECTURES, GreyResNet
from objectives import DeepClusterV2, ImageClustering
from objectives.sizes import prototype_counts
from utils import config as options
from utils import distributed, memory, optim, train, weights


@dataclass
class Config:
    data_path: str = "Training_Data"
    """data sets: <data set>/<case>.npy volumes (height, width, slices) and folders of 2D images"""
    pretrained_path: str = "weights"
    """folder of weights: receives checkpoint_name"""
    checkpoint_name: str = "resnet_deepcluster2D.pth"
    """the result, a flat torchvision ResNet state dict"""
    dump_path: str = "runs/deepcluster2D"
    """log, configuration and checkpoints of this run; a run found here is continued"""
    resnet_pretrained: str = "none"
    """weights to start from (torchvision, SwAV, DeepCluster-v2 or VISSL layout, below pretrained_path), or none"""
    arch: Literal[ARCHITECTURES] = "resnet50"
    """torchvision ResNet that encodes slices"""

    slices_per_volume: NonNegativeInt = 32
    """evenly spaced slices of a volume that count as images; 0: all of them"""
    size_crops: list[PositiveInt] = field(default_factory=lambda: [224, 96])
    """side in pixels of each kind of crop; the first two crops of all get assignments"""
    nmb_crops: list[PositiveInt] = field(default_factory=lambda: [2, 6])
    """number of crops of each kind"""
    min_scale_crops: list[PositiveFloat] = field(default_factory=lambda: [0.25, 0.05])
    """smallest share of an image's area in a crop, for each kind"""
    max_scale_crops: list[PositiveFloat] = field(default_factory=lambda: [1.0, 0.25])
    """largest share of an image's area in a crop, for each kind"""
    policy: Literal["paper", "strong"] = "strong"
    """augmentation beside the crops: as in SwAV, or with rotation, bias field, gamma and noise as well"""

    hidden_mlp: PositiveInt = 2048
    """width of the projection head"""
    feat_dim: PositiveInt = 128
    """size of the embeddings that are clustered"""
    nmb_prototypes: NonNegativeInt | list[NonNegativeInt] = field(default_factory=lambda: [0, 0, 0])
    """prototypes of each head, clustered apart; 0: 2 * sqrt(number of images and slices)"""
    temperature: PositiveFloat = 0.1
    """of the softmax over prototypes"""
    kmeans_iterations: PositiveInt = 10
    """of spherical k-means, once per epoch and head"""
    kmeans_backend: Literal["auto", "faiss", "torch"] = "auto"
    """torch (on the training device, spread over the processes), faiss (on one process's CPU); auto is torch"""

    epochs: PositiveInt = 100
    """passes over the data"""
    batch_size: PositiveInt = 64
    """images per process and forward pass"""
    accumulate: PositiveInt = 1
    """batches whose gradients are added up before an update; assignments and BatchNorm still see one at a time"""
    sampling_temperature: PositiveFloat = 1.0
    """1: every sample once per epoch; more: small data sets more often, n ** (1 / temperature) draws of n samples"""
    base_lr: PositiveFloat = 1.2
    """peak learning rate of SGD with LARC, for the joint batch as it is"""
    final_lr: NonNegativeFloat = 0.0012
    """learning rate at the end of the cosine schedule"""
    warmup_epochs: NonNegativeInt = 10
    """epochs of linear warm-up"""
    start_warmup: NonNegativeFloat = 0.0
    """learning rate at the first step of the warm-up"""
    wd: NonNegativeFloat = 1e-6
    """weight decay"""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU; fp32: k-means as well"""
    recompute: bool = False
    """keep less for the backward pass and compute it again: larger batches fit, a third more time, the same result"""
    compile: bool = False
    """compile the ResNet with torch.compile; worth a try on a GPU (no gain on a CPU), the first steps take a minute"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    fit_batch: NonNegativeFloat = 0.0
    """GiB: find the largest batch_size whose step fits into this much memory, say it, and stop; 0: train"""
    workers: NonNegativeInt = 4
    """data-loading processes per training process"""
    seed: NonNegativeInt = 31
    """of all random numbers"""
    checkpoint_freq: PositiveInt = 25
    """epochs between checkpoints that are kept for good"""
    checkpoint_minutes: PositiveFloat = 15
    """minutes between checkpoints within an epoch"""
    max_bad_steps: PositiveInt = 10
    """steps in a row with a loss or gradient that is not finite (none is applied) after which the run stops"""
    timeout_minutes: PositiveFloat = 10
    """minutes that processes wait for one that does not answer before they end, for torchrun to start them again"""
    tensorboard: bool = False
    """also write curves and augmented views for TensorBoard, to dump_path/tensorboard"""
    wandb_project: str | None = None
    """project of Weights & Biases to log to as well (WANDB_MODE=offline needs no network); null: none"""
    profile: bool = False
    """also write where the time goes: seconds per epoch, columns time_* of metrics.csv"""
    cache_path: str | None = None
    """folder for the working copy of the data; null: .cache in data_path"""
    on_bad: Literal["error", "skip"] = "error"
    """what to do with unusable volumes and images: stop before training, or name them and go on without"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device, cfg.seed, cfg.timeout_minutes)
    samples, store = prepare(
        cfg.data_path, canvas_size(*cfg.size_crops), cfg.cache_path, cfg.on_bad, max(1, cfg.workers)
    )
    images = Slices(samples, store, cfg.slices_per_volume)
    crops = MultiCrop(
        sizes=[(side, side) for side in cfg.size_crops],
        counts=cfg.nmb_crops,
        scales=list(zip(cfg.min_scale_crops, cfg.max_scale_crops, strict=True)),
        policy=cfg.policy,
        seed=cfg.seed,
    )
    loader = ImageLoader(images, crops, cfg.batch_size, cfg.workers, cfg.seed, run, cfg.sampling_temperature)

    encoder = GreyResNet(cfg.arch, cfg.recompute)
    if cfg.resnet_pretrained != "none":
        weights.load_backbone(encoder, cfg.pretrained_path, cfg.resnet_pretrained, made_by="ssl_deepcluster2D.py")
    head = ProjectionHead(encoder.num_features, cfg.hidden_mlp, cfg.feat_dim)
    intra = DeepClusterV2(
        cfg.feat_dim,
        prototype_counts(cfg.nmb_prototypes, len(images), "nmb_prototypes"),
        samples=len(images),
        temperature=cfg.temperature,
        kmeans_iterations=cfg.kmeans_iterations,
        kmeans_backend=cfg.kmeans_backend,
        seed=cfg.seed,
        precision=cfg.precision,
    )
    if cfg.compile:
        encoder.compile()
    learner = distributed.wrap(ImageClustering(encoder, head, intra), run)

    optimizer = optim.LARC(optim.parameter_groups(learner, cfg.wd), cfg.base_lr)
    if cfg.fit_batch:
        memory.fit_batch(learner, loader, optimizer, cfg, run)
        return
    rate = train.schedule(cfg, loader.steps)
    result = train.fit(learner, loader, optimizer, rate, cfg, run, fingerprint(samples))

    made_by = weights.record(cfg, samples, result)
    weights.save_resnet(encoder, Path(cfg.pretrained_path) / cfg.checkpoint_name, made_by)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
