"""What the training scripts can be told: every option's type, range and help, once. Values stand in the scripts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from utils.architectures import ARCHITECTURES

QueueLength = restricted_number_type("QueueLength", int, (">=", -1))
Prototypes = NonNegativeInt | list[NonNegativeInt]


def constants(cls: type) -> type:
    """A dataclass whose plain attributes are new defaults of the options that it inherits."""
    known = {f.name: f for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    own = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    if unknown := own.keys() - known.keys():
        raise TypeError(f"{cls.__module__}: no such option: {', '.join(sorted(unknown))}")
    cls.__annotations__ = {name: known[name].type for name in own}
    for name, value in own.items():
        if isinstance(value, list):
            setattr(cls, name, field(default_factory=value.copy))
    return dataclass(cls)


@dataclass
class Training:
    """Of every script."""

    data_path: str = "Training_Data"
    """data sets: <data set>/<case>.npy volumes (height, width, slices) and folders of 2D images"""
    pretrained_path: str = "weights"
    """folder of weights: holds those to start from, receives checkpoint_name"""
    checkpoint_name: str = ""
    """the result"""
    dump_path: str = ""
    """log, configuration and checkpoints of this run; a run found here is continued"""
    resnet_pretrained: str = "none"
    """ResNet to start from (torchvision, SwAV, DeepCluster-v2 or VISSL layout, below pretrained_path), or none"""
    arch: Literal[ARCHITECTURES] = "resnet50"
    """torchvision ResNet that encodes slices"""
    policy: Literal["paper", "strong"] = "strong"
    """augmentation of a view: one transform as in the original method, or a random crop and several composed"""
    epochs: PositiveInt = 100
    """passes over the data"""
    batch_size: PositiveInt = 4
    """samples per process and forward pass"""
    accumulate: PositiveInt = 1
    """batches whose gradients are added up before an update; assignments and BatchNorm still see one at a time"""
    sampling_temperature: PositiveFloat = 1.0
    """1: every sample once per epoch; more: small data sets more often, n ** (1 / temperature) draws of n samples"""
    base_lr: PositiveFloat = 0.3
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
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU; fp32: k-means as well"""
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


@dataclass
class TrainedResNet:
    """Of stages 1 and 3, which train the ResNet and a projection head."""

    recompute: bool = False
    """keep less for the backward pass and compute it again: larger batches fit, a third more time, the same result"""
    compile: bool = False
    """compile the ResNet with torch.compile; worth a try on a GPU (no gain on a CPU), the first steps take a minute"""
    hidden_mlp: PositiveInt = 2048
    """width of the projection head"""
    feat_dim: PositiveInt = 128
    """size of the embeddings of slices and images that are clustered"""
    nmb_prototypes: Prototypes = 0
    """prototypes, or a list for several heads; 0: 2 * sqrt(number of samples)"""
    temperature: PositiveFloat = 0.1
    """of the softmax over prototypes"""


@dataclass
class Images:
    """Of stage 1."""

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


@dataclass
class Volumes:
    """Of stages 2 and 3."""

    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height, width of a view in voxels, after cropping or padding"""
    d_model: PositiveInt = 640
    """size of a slice embedding and of a volume embedding, a multiple of 8; the same in both stages"""
    layers: PositiveInt = 4
    """of the transformer; the same in both stages"""
    attention: Literal["deformable", "ordinary", "mean"] = "deformable"
    """over slices: at learned positions, or to all; mean (stage 3, trans_pretrained none): no transformer at all"""
    dropout: ClosedUnitInterval = 0.1
    """in the transformer"""
    mask_ratio: OpenUnitInterval = 0.15
    """share of a volume's slices that are hidden"""
    mask_style: Literal["random", "span"] = "random"
    """hide slices anywhere, or one contiguous run of them"""


@dataclass
class Masked:
    """Of stage 2 alone."""

    projection_init: Literal["pca", "orthogonal"] = "pca"
    """slice projection, fixed in this stage: principal components of the data's slice features, or random"""
    cached_views: NonNegativeInt = 0
    """0: new views in every epoch; n: epoch e sees version e mod n of a volume, embedded once and kept in the cache"""


@dataclass
class Joint:
    """Of stage 3 alone."""

    trans_pretrained: str = "none"
    """stage 2's slice projection and transformer, or none for random weights"""
    freeze: bool = False
    """keep the ResNet as loaded, its BatchNorm too; the heads, the slice projection and the transformer are trained"""
    intra_slices: PositiveInt = 8
    """random slices of each volume and step that enter L_intra"""
    images_per_step: NonNegativeInt = 8
    """2D images per process and step that enter L_intra beside them, where the data hold images"""
    min_scale_images: PositiveFloat = 0.25
    """smallest share of a 2D image's area in a view"""
    lambda_inter: NonNegativeFloat = 1.0
    """weight of the loss between views of a volume; 0 switches the branch and its cost off"""
    lambda_intra: NonNegativeFloat = 1.0
    """weight of the loss between views of a slice or an image; 0 switches it off"""
    lambda_mask: NonNegativeFloat = 0.0
    """weight of masked slice-embedding prediction beside them; 0 switches it off"""
    nmb_prototypes_intra: Prototypes = 0
    """prototypes of slices and images, where nmb_prototypes are those of volumes"""


@dataclass
class SwAV:
    """Of SwAV's scripts."""

    epsilon: PositiveFloat = 0.02
    """of Sinkhorn-Knopp; smaller makes assignments harder (0.05 in SwAV; on small data the loss then stays at ln K)"""
    sinkhorn_iterations: PositiveInt = 3
    """of Sinkhorn-Knopp"""
    queue_length: QueueLength = -1
    """recent embeddings (all processes) that join the assignment; 0: none; -1: as many as the prototypes need"""
    epoch_queue_starts: NonNegativeInt = 5
    """first epoch that fills and uses the queue"""
    freeze_prototypes_niters: NonNegativeInt = 50
    """first steps in which the prototypes stay fixed"""


@dataclass
class JointSwAV(SwAV):
    queue_length_intra: QueueLength = -1
    """the same for slices and images, where queue_length is that of volumes"""


@dataclass
class DeepCluster:
    """Of DeepCluster-v2's scripts."""

    kmeans_iterations: PositiveInt = 10
    """of spherical k-means, once per epoch and head"""
    kmeans_backend: Literal["auto", "faiss", "torch"] = "auto"
    """torch (on the training device, spread over the processes), faiss (on one process's CPU); auto is torch"""


def of_level(cfg: Any, name: str, level: str) -> tuple[str, Any]:
    """(option, value) of a level: nmb_prototypes_intra for slices where a script has it, else nmb_prototypes."""
    option = f"{name}_{level}" if hasattr(cfg, f"{name}_{level}") else name
    return option, getattr(cfg, option)
