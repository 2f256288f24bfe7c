"""Stage 3, DeepCluster-v2: cluster slices and images (intra) and whole volumes (inter) together.

    torchrun --nproc_per_node=2 ssl_deepcluster3D.py --batch_size 8        # every constant is an option
    python ssl_deepcluster3D.py --arch resnet18 --target_shape [32,48,48]          # one process, CPU

L = lambda_inter * L_inter + lambda_intra * L_intra + lambda_mask * L_mask.
Needs weights/resnet_deepcluster2D.pth from stage 1 and weights/mask_deepcluster.pth from stage 2. Result:
weights/deepcluster3D.pth and weights/deepcluster3D_encoder.pth, the ResNet alone in torchvision's layout, to copy into
downstream code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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

from datasets.augment import MultiCrop, VolumeViews
from datasets.index import fingerprint
from datasets.loaders import VolumeLoader, VolumeWindows, canvas_size
from datasets.store import prepare
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from models.resnet import ARCHITECTURES
from objectives import DeepClusterV2, JointClustering
from objectives.sizes import prototype_counts
from utils import config as options
from utils import distributed, memory, optim, train, weights


@dataclass
class Config:
    data_path: str = "Training_Data"
    """data sets: <data set>/<case>.npy volumes (height, width, slices) and folders of 2D images"""
    pretrained_path: str = "weights"
    """folder of weights: holds resnet_pretrained and trans_pretrained, receives checkpoint_name"""
    resnet_pretrained: str = "resnet_deepcluster2D.pth"
    """stage 1's ResNet (torchvision, SwAV, DeepCluster-v2 or VISSL layout), or none for random weights"""
    trans_pretrained: str = "mask_deepcluster.pth"
    """stage 2's slice projection and transformer, or none for random weights"""
    checkpoint_name: str = "deepcluster3D.pth"
    """the result; the ResNet alone goes to the same name with _encoder"""
    dump_path: str = "runs/deepcluster3D"
    """log, configuration and checkpoints of this run; a run found here is continued"""
    arch: Literal[ARCHITECTURES] = "resnet50"
    """torchvision ResNet that encodes slices"""
    d_model: PositiveInt = 640
    """size of a slice embedding and of a volume embedding; as in stage 2"""
    layers: PositiveInt = 4
    """of the transformer; as in stage 2"""
    attention: Literal["deformable", "ordinary", "mean"] = "deformable"
    """over slices, as in stage 2; mean: no transformer (trans_pretrained none), a volume is the mean of its slices"""
    freeze: bool = False
    """keep the ResNet as loaded, its BatchNorm too; the heads, the slice projection and the transformer are trained"""
    dropout: ClosedUnitInterval = 0.1
    """in the transformer"""

    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height, width of a view in voxels, after cropping or padding"""
    policy: Literal["paper", "strong"] = "strong"
    """augmentation of a view: one transform as in the original method, or a random crop and several composed"""
    intra_slices: PositiveInt = 8
    """random slices of each volume and step that enter L_intra"""
    images_per_step: NonNegativeInt = 8
    """2D images per process and step that enter L_intra beside them, where the data hold images"""
    min_scale_images: PositiveFloat = 0.25
    """smallest share of a 2D image's area in a view"""
    mask_ratio: OpenUnitInterval = 0.15
    """share of a volume's slices that L_mask hides"""
    mask_style: Literal["random", "span"] = "random"
    """hide slices anywhere, or one contiguous run of them"""
    lambda_inter: NonNegativeFloat = 1.0
    """weight of the loss between views of a volume; 0 switches the branch and its cost off"""
    lambda_intra: NonNegativeFloat = 1.0
    """weight of the loss between views of a slice or an image; 0 switches it off"""
    lambda_mask: NonNegativeFloat = 0.0
    """weight of masked slice-embedding prediction beside them; 0 switches it off"""

    hidden_mlp: PositiveInt = 2048
    """width of the intra projection head"""
    feat_dim: PositiveInt = 128
    """size of the intra embeddings"""
    nmb_prototypes: NonNegativeInt | list[NonNegativeInt] = field(default_factory=lambda: [0, 0, 0])
    """inter prototypes of each head, clustered apart; 0: 2 * sqrt(number of volumes)"""
    nmb_prototypes_intra: NonNegativeInt | list[NonNegativeInt] = field(default_factory=lambda: [0, 0, 0])
    """intra prototypes of each head, clustered apart; 0: 2 * sqrt(number of slices and images)"""
    temperature: PositiveFloat = 0.1
    """of the softmax over prototypes"""
    kmeans_iterations: PositiveInt = 10
    """of spherical k-means, once per epoch and head"""
    kmeans_backend: Literal["auto", "faiss", "torch"] = "auto"
    """torch (on the training device, spread over the processes), faiss (on one process's CPU); auto is torch"""

    epochs: PositiveInt = 100
    """passes over the data"""
    batch_size: PositiveInt = 4
    """volumes per process and forward pass"""
    accumulate: PositiveInt = 1
    """batches whose gradients are added up before an update; assignments and BatchNorm still see one at a time"""
    sampling_temperature: PositiveFloat = 1.0
    """1: every sample once per epoch; more: small data sets more often, n ** (1 / temperature) draws of n samples"""
    base_lr: PositiveFloat = 0.03
    """peak learning rate of SGD with LARC, for the joint batch as it is; a tenth of SwAV's (docs/DECISIONS.md)"""
    final_lr: NonNegativeFloat = 0.00003
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
    slices, height, width = cfg.target_shape
    encoder = JointEncoder(cfg.arch, cfg.d_model, cfg.layers, cfg.dropout, cfg.recompute, cfg.attention)
    weights.load_backbone(encoder.encoder, cfg.pretrained_path, cfg.resnet_pretrained, made_by="ssl_deepcluster2D.py")
    weights.load_transformer(encoder, cfg.pretrained_path, cfg.trans_pretrained, made_by="mask_deepcluster.py")

    size = canvas_size(height, width)
    samples, store = prepare(
        cfg.data_path, size, cfg.cache_path, cfg.on_bad, max(1, cfg.workers), target_shape=cfg.target_shape
    )
    volumes = VolumeWindows(samples, store, slices, cfg.seed)
    views = VolumeViews(height, width, cfg.policy, cfg.seed)
    image_views = MultiCrop([(height, width)], [2], [(cfg.min_scale_images, 1.0)], cfg.policy, cfg.seed)
    loader = VolumeLoader(
        volumes,
        views,
        cfg.batch_size,
        cfg.workers,
        cfg.seed,
        run,
        mask_ratio=cfg.mask_ratio if cfg.lambda_mask else 0,
        mask_style=cfg.mask_style,
        intra_slices=cfg.intra_slices,
        images_per_step=cfg.images_per_step if cfg.lambda_intra else 0,
        image_views=image_views,
        sampling_temperature=cfg.sampling_temperature,
    )

    head = ProjectionHead(encoder.encoder.num_features, cfg.hidden_mlp, cfg.feat_dim)
    shared = {
        "temperature": cfg.temperature,
        "kmeans_iterations": cfg.kmeans_iterations,
        "kmeans_backend": cfg.kmeans_backend,
        "seed": cfg.seed,
        "precision": cfg.precision,
    }
    sizes = prototype_counts(cfg.nmb_prototypes, len(volumes), "nmb_prototypes")
    inter = DeepClusterV2(cfg.d_model, sizes, samples=len(volumes), **shared)
    sizes = prototype_counts(cfg.nmb_prototypes_intra, loader.intra_samples, "nmb_prototypes_intra")
    intra = DeepClusterV2(cfg.feat_dim, sizes, samples=loader.intra_samples, **shared)
    learner = JointClustering(
        encoder, head, intra, inter, cfg.lambda_intra, cfg.lambda_inter, cfg.lambda_mask, cfg.freeze
    )
    if cfg.lambda_mask:
        weights.load_mask_head(learner, cfg.pretrained_path, cfg.trans_pretrained)
    if cfg.compile:
        encoder.encoder.compile()
    wrapped = distributed.wrap(learner, run)

    optimizer = optim.LARC(optim.parameter_groups(learner, cfg.wd), cfg.base_lr)
    if cfg.fit_batch:
        memory.fit_batch(wrapped, loader, optimizer, cfg, run)
        return
    rate = train.schedule(cfg, loader.steps)
    result = train.fit(wrapped, loader, optimizer, rate, cfg, run, fingerprint(samples))

    made_by = weights.record(cfg, samples, result)
    weights.save_joint(encoder, Path(cfg.pretrained_path) / cfg.checkpoint_name, made_by)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
