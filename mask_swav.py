"""Stage 2, SwAV: predict masked slice embeddings to pre-train the transformer over slices.

    torchrun --nproc_per_node=2 mask_swav.py --data_path Training_Data   # every constant is an option
    python mask_swav.py --arch resnet18 --target_shape [32,48,48]           # one process, CPU

Needs weights/resnet_swav2D.pth from ssl_swav2D.py or elsewhere. Result: weights/mask_swav.pth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from datasets.augment import VolumeViews
from datasets.embeddings import EmbeddingLoader
from datasets.index import fingerprint
from datasets.loaders import VolumeLoader, VolumeWindows, canvas_size
from datasets.store import prepare
from models.encoder import JointEncoder
from models.resnet import ARCHITECTURES
from objectives import MaskedSlices
from objectives.masked import fit_projection
from utils import config as options
from utils import distributed, memory, optim, train, weights
from utils.precision import Precision


@dataclass
class Config:
    data_path: str = "Training_Data"
    """data sets: <data set>/<case>.npy volumes (height, width, slices) and folders of 2D images"""
    pretrained_path: str = "weights"
    """folder of weights: holds resnet_pretrained, receives checkpoint_name"""
    resnet_pretrained: str = "resnet_swav2D.pth"
    """stage 1's ResNet (torchvision, SwAV, DeepCluster-v2 or VISSL layout), or none for random weights"""
    checkpoint_name: str = "mask_swav.pth"
    """the result: slice encoder, slice projection, transformer, mask token, decoder"""
    dump_path: str = "runs/mask_swav"
    """log, configuration and checkpoints of this run; a run found here is continued"""
    arch: Literal[ARCHITECTURES] = "resnet50"
    """torchvision ResNet that encodes slices; frozen here"""
    d_model: PositiveInt = 640
    """size of a slice embedding; a multiple of 8"""
    layers: PositiveInt = 4
    """of the transformer"""
    attention: Literal["deformable", "ordinary"] = "deformable"
    """over slices: at learned positions between them, or to all of them"""
    dropout: ClosedUnitInterval = 0.1
    """in the transformer"""
    projection_init: Literal["pca", "orthogonal"] = "pca"
    """slice projection, fixed in this stage: principal components of the data's slice features, or random"""

    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height, width of a view in voxels, after cropping or padding"""
    policy: Literal["paper", "strong"] = "strong"
    """augmentation of a view: one transform as in the original method, or a random crop and several composed"""
    mask_ratio: OpenUnitInterval = 0.15
    """share of a volume's slices that are hidden"""
    mask_style: Literal["random", "span"] = "random"
    """hide slices anywhere, or one contiguous run of them"""
    cached_views: NonNegativeInt = 0
    """0: new views in every epoch; n: epoch e sees version e mod n of a volume, embedded once and kept in the cache"""

    epochs: PositiveInt = 100
    """passes over the data"""
    batch_size: PositiveInt = 4
    """volumes per process and forward pass"""
    accumulate: PositiveInt = 1
    """batches whose gradients are added up before an update; assignments and BatchNorm still see one at a time"""
    sampling_temperature: PositiveFloat = 1.0
    """1: every sample once per epoch; more: small data sets more often, n ** (1 / temperature) draws of n samples"""
    base_lr: PositiveFloat = 3.0
    """peak learning rate of SGD with LARC, for the joint batch as it is"""
    final_lr: NonNegativeFloat = 0.0
    """learning rate at the end of the cosine schedule"""
    warmup_epochs: NonNegativeInt = 10
    """epochs of linear warm-up"""
    start_warmup: NonNegativeFloat = 0.0
    """learning rate at the first step of the warm-up"""
    wd: NonNegativeFloat = 1e-6
    """weight decay"""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU"""
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
    slices, height, width = cfg.target_shape
    encoder = JointEncoder(cfg.arch, cfg.d_model, cfg.layers, cfg.dropout, attention=cfg.attention)
    weights.load_backbone(encoder.encoder, cfg.pretrained_path, cfg.resnet_pretrained, made_by="ssl_swav2D.py")

    size = canvas_size(height, width)
    samples, store = prepare(
        cfg.data_path, size, cfg.cache_path, cfg.on_bad, max(1, cfg.workers), target_shape=cfg.target_shape
    )
    volumes = VolumeWindows(samples, store, slices, cfg.seed)
    views = VolumeViews(height, width, cfg.policy, cfg.seed)
    loader = VolumeLoader(
        volumes,
        views,
        cfg.batch_size,
        cfg.workers,
        cfg.seed,
        run,
        mask_ratio=cfg.mask_ratio,
        mask_style=cfg.mask_style,
        sampling_temperature=cfg.sampling_temperature,
    )

    if cfg.projection_init == "pca":
        fit_projection(encoder, volumes, (height, width), run)
    learner = MaskedSlices(encoder)
    if cfg.cached_views:
        precision = Precision(cfg.precision, run.device)
        loader = EmbeddingLoader(loader, learner, cfg.cached_views, cfg.d_model, cfg.workers, precision)
    wrapped = distributed.wrap(learner, run)

    optimizer = optim.LARC(optim.parameter_groups(learner, cfg.wd), cfg.base_lr)
    if cfg.fit_batch:
        memory.fit_batch(wrapped, loader, optimizer, cfg, run)
        return
    rate = train.schedule(cfg, loader.steps)
    result = train.fit(wrapped, loader, optimizer, rate, cfg, run, fingerprint(samples))

    made_by = weights.record(cfg, samples, result)
    weights.save_masked(learner, Path(cfg.pretrained_path) / cfg.checkpoint_name, made_by)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
