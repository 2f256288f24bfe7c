"""What the training scripts can be told: every option's type, range, help and default, once.

A script's `Config` inherits the groups that it needs and gives, as plain attributes, the values that its readers should
see. An option stands in the help under its topic: the name of the function that declares it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_type_hints

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from utils.errors import UserError

# torchvision's ResNets
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
FREE = True  # an option that may differ when a run is continued: it changes neither data nor mathematics
QueueLength = restricted_number_type("QueueLength", int, (">=", -1))
Prototypes = NonNegativeInt | list[NonNegativeInt]


def topic(name: str) -> Callable[..., Any]:
    """A function that declares an option: its default, its help, and whether it may differ when a run is continued."""

    def option(default: Any, about: str, may_change: bool = False) -> Any:
        metadata = {"topic": name, "help": about, "may_change": may_change}
        return _field(default, metadata)

    return option


def _field(default: Any, metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


data, model, objective, optimisation, running = map(topic, ("data", "model", "objective", "optimisation", "running"))


def constants(cls: type) -> type:
    """A dataclass of options; its plain attributes are new defaults of those that it inherits. TypeError for others."""
    bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    known = {f.name: f for base in reversed(bases) for f in dataclasses.fields(base)}
    types = {name: hint for base in reversed(bases) for name, hint in get_type_hints(base).items()}
    added = inspect.get_annotations(cls)
    public = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    own = {name: value for name, value in public.items() if name not in added and not callable(value)}
    if unknown := own.keys() - known.keys():
        raise TypeError(f"{cls.__module__}: no such option: {', '.join(sorted(unknown))}")
    cls.__annotations__ = {name: types[name] for name in own} | added
    for name, value in own.items():
        setattr(cls, name, _field(value, known[name].metadata))
    return dataclass(kw_only=True)(cls)


class Group:
    """Options that belong together."""

    def check(self) -> None:
        """Rules between options. Raises UserError naming them."""


@dataclass
class Training(Group):
    """Options of every script."""

    # Of data the content is compared, not the place; batch_size has a rule of its own; more epochs may follow.
    data_path: str = data("Training_Data", "data sets: <data set>/<case>.npy volumes, and folders of 2D images", FREE)
    cache_path: str | None = data(None, "folder for the working copy of the data; null: .cache in data_path", FREE)
    on_bad: Literal["error", "skip"] = data("error", "unusable files: stop before training, or leave them out")
    policy: Literal["paper", "strong"] = data(
        "strong", "transforms of a view: one as in the paper, or a random crop and several"
    )
    sampling_temperature: PositiveFloat = data(1.0, "T > 1: small data sets more often, n ** (1 / T) draws of n")
    workers: NonNegativeInt = data(4, "data-loading processes per training process", FREE)

    arch: Literal[ARCHITECTURES] = model("resnet50", "torchvision ResNet that encodes slices")
    pretrained_path: str = model(
        "weights", "folder of weights: holds those to start from, receives checkpoint_name", FREE
    )
    resnet_pretrained: str = model("none", "ResNet to start from: a file of any layout, imagenet, or none (random)")
    checkpoint_name: str = model("", "name of the resulting weights file, below pretrained_path")

    epochs: PositiveInt = optimisation(100, "passes over the data", FREE)
    batch_size: PositiveInt = optimisation(4, "samples per process and forward pass", FREE)
    accumulate: PositiveInt = optimisation(1, "batches whose gradients are added up before an update")
    base_lr: PositiveFloat = optimisation(0.3, "peak learning rate of SGD with LARC, for the global batch as it is")
    final_lr: NonNegativeFloat = optimisation(0.0, "learning rate at the end of the cosine schedule")
    warmup_epochs: NonNegativeInt = optimisation(10, "epochs of linear warm-up")
    start_warmup: NonNegativeFloat = optimisation(0.0, "learning rate at the first step of the warm-up")
    wd: NonNegativeFloat = optimisation(1e-6, "weight decay")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = optimisation(
        "auto",
        "mixed precision; auto: bf16 where the device computes in it, else fp16 on GPUs, fp32 (k-means, too) on CPUs",
    )
    seed: NonNegativeInt = optimisation(31, "random seed")

    dump_path: str = running("", "folder of this run; a run found here is continued", FREE)
    device: Literal["auto", "cpu", "cuda"] = running("auto", "device to train on", FREE)
    dry_run: NonNegativeInt = running(0, "updates to measure, to say what the run costs; 0: train", FREE)
    fit_batch: NonNegativeFloat = running(0.0, "GiB for which to say the largest batch_size that fits; 0: train", FREE)
    checkpoint_freq: PositiveInt = running(25, "epochs between checkpoints that are kept for good", FREE)
    checkpoint_minutes: PositiveFloat = running(15, "minutes between checkpoints within an epoch", FREE)
    max_bad_steps: PositiveInt = running(10, "skipped updates (not finite) in a row to stop after", FREE)
    timeout_minutes: PositiveFloat = running(10, "collective time-out: minutes for a silent process", FREE)
    tensorboard: bool = running(False, "curves for TensorBoard, in dump_path/tensorboard", FREE)
    wandb_project: str | None = running(None, "project of Weights & Biases to log to as well; null: none", FREE)
    profile: bool = running(False, "seconds per epoch of each part of a step, in columns time_* of metrics.csv", FREE)

    def check(self) -> None:
        super().check()
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs: a warm-up of {self.warmup_epochs} epochs leaves nothing of epochs: {self.epochs}; "
                f"add --warmup_epochs {self.epochs // 10}"
            )


@dataclass
class Clustering(Group):
    """Options of stages 1 and 3, which train the ResNet and a projection head by clustering."""

    hidden_mlp: PositiveInt = model(2048, "width of the projection head")
    feat_dim: PositiveInt = model(128, "size of the embeddings of slices and images that are clustered")
    recompute: bool = model(False, "activation checkpointing: larger batches, a third more time", FREE)
    compile: bool = model(False, "torch.compile of the ResNet; worth a try on a GPU", FREE)
    nmb_prototypes: Prototypes = objective(0, "prototypes, or a list for several heads; 0: 2 * sqrt(number of samples)")
    temperature: PositiveFloat = objective(0.1, "temperature of the softmax over prototypes, and of positions")
    lambda_position: NonNegativeFloat = objective(1.0, "weight of the contrast between positions")
    position_threshold: ClosedUnitInterval = objective(
        0.0, "slices of aligned volumes whose relative positions differ by less are positives, too; 0: off"
    )


@dataclass
class Images(Group):
    """Options of stage 1."""

    stage: ClassVar[int] = 1

    slices_per_volume: NonNegativeInt = data(32, "evenly spaced slices of a volume that count as images; 0: all")
    size_crops: list[PositiveInt] = data([224, 96], "side in pixels of each kind; the first two get assignments")
    nmb_crops: list[PositiveInt] = data([2, 6], "number of crops of each kind")
    min_scale_crops: list[PositiveFloat] = data([0.25, 0.05], "smallest share of an image's area in a crop, per kind")
    max_scale_crops: list[PositiveFloat] = data([1.0, 0.25], "largest share of an image's area in a crop, per kind")

    def check(self) -> None:
        super().check()
        kinds = ("size_crops", "nmb_crops", "min_scale_crops", "max_scale_crops")
        if len({len(getattr(self, name)) for name in kinds}) > 1 or not self.size_crops:
            raise UserError(f"{', '.join(kinds)}: must all have one value per kind of crop")
        if self.nmb_crops[0] < 2:
            raise UserError("nmb_crops: the first kind needs at least 2 crops, between which assignments are swapped")
        for low, high in zip(self.min_scale_crops, self.max_scale_crops, strict=True):
            if not low <= high <= 1:
                raise UserError(f"min_scale_crops, max_scale_crops: need min <= max <= 1, got {low} and {high}")


@dataclass
class Volumes(Group):
    """Options of stages 2 and 3."""

    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = data(
        (64, 128, 128), "slices, height, width of a view in voxels, after cropping or padding"
    )
    d_model: PositiveInt = model(640, "size of slice and volume embeddings, a multiple of 8; as in the other stage")
    layers: PositiveInt = model(4, "layers of the transformer; as in the other stage")
    dropout: ClosedUnitInterval = model(0.1, "dropout rate in the transformer")
    mask_ratio: OpenUnitInterval = objective(0.6, "share of a volume's slices that are masked")
    mask_style: Literal["random", "span"] = objective("span", "masked slices anywhere, or in one contiguous run")

    def check(self) -> None:
        super().check()
        if self.d_model % 8:
            raise UserError(f"d_model: {self.d_model} must be a multiple of 8, the number of attention heads")
        if self.masks_slices and self.target_shape[0] < 2:
            raise UserError("target_shape: masking needs views of at least 2 slices")

    @property
    def masks_slices(self) -> bool:
        """Whether masked slice embeddings are predicted."""
        return True


@dataclass
class Masked(Volumes):
    """Options of stage 2."""

    stage: ClassVar[int] = 2

    attention: Literal["deformable", "ordinary"] = model(
        "deformable", "attention over slices: at learned positions between them, or to all of them"
    )
    projection_init: Literal["pca", "orthogonal"] = model(
        "pca", "slice projection, fixed in this stage: principal components of the data's slice features, or random"
    )
    lambda_cluster: NonNegativeFloat = objective(
        1.0, "weight of predicting which cluster a masked slice is in, beside its embedding; 0: off"
    )
    nmb_clusters: NonNegativeInt = objective(0, "clusters of slices; 0: 2 * sqrt(number of slices), at most 128")
    cached_views: NonNegativeInt = data(
        0,
        "0: new views in every epoch; n: epoch e sees version e mod n of a volume, embedded once and kept in the cache",
    )


@dataclass
class Joint(Volumes):
    """Options of stage 3."""

    stage: ClassVar[int] = 3

    trans_pretrained: str = model("none", "stage 2's slice projection and transformer, or none for random weights")
    attention: Literal["deformable", "ordinary", "mean"] = model(
        "deformable", "attention over slices, as in stage 2; mean: no transformer, a volume is the mean of its slices"
    )
    freeze: bool = model(False, "ResNet as loaded, its BatchNorm too; the rest is trained")
    intra_slices: PositiveInt = data(8, "random slices of each volume and step that enter L_intra")
    images_per_step: NonNegativeInt = data(8, "2D images per process and step that enter L_intra beside them")
    min_scale_images: PositiveFloat = data(0.25, "smallest share of a 2D image's area in a view")
    lambda_inter: NonNegativeFloat = objective(1.0, "weight of the loss between views of a volume; 0: off, at no cost")
    lambda_intra: NonNegativeFloat = objective(1.0, "weight of the loss between views of a slice or an image; 0: off")
    lambda_mask: NonNegativeFloat = objective(0.0, "weight of masked slice-embedding prediction beside them; 0: off")
    lambda_recon: NonNegativeFloat = objective(0.0, "weight of restoring hidden parts of slices; 0: off")
    hidden_pixels: OpenUnitInterval = objective(0.6, "share of every slice's blocks that are hidden for it")
    hidden_slices: ClosedUnitInterval = objective(0.2, "share of a volume's slices that are hidden whole")
    hidden_block: PositiveInt = objective(16, "side of a block in pixels")
    nmb_prototypes_intra: Prototypes = objective(0, "prototypes of slices and images; nmb_prototypes: those of volumes")

    @property
    def lambdas(self) -> dict[str, float]:
        """The weight of each loss."""
        position = self.lambda_position * (self.position_threshold > 0)
        weights = {"inter": self.lambda_inter, "intra": self.lambda_intra, "position": position}
        return weights | {"recon": self.lambda_recon, "mask": self.lambda_mask}

    @property
    def clusters_slices(self) -> bool:
        """Whether single slices, and images beside them, are clustered or compared."""
        return bool(self.lambdas["intra"] or self.lambdas["position"])

    @property
    def masks_slices(self) -> bool:
        return self.lambda_mask > 0

    def check(self) -> None:
        super().check()
        if not any(self.lambdas.values()):
            raise UserError(f"{', '.join(f'lambda_{name}' for name in self.lambdas)}: at least one must be above 0")
        if self.lambda_recon and min(self.target_shape[1:]) < 32:
            raise UserError(
                "target_shape: lambda_recon needs views of at least 32 x 32 pixels, which are halved five times"
            )
        if self.min_scale_images > 1:
            raise UserError(f"min_scale_images: a view cannot cover {self.min_scale_images} of an image; at most 1")


@dataclass
class SwAV(Group):
    """Options of SwAV's scripts."""

    epsilon: PositiveFloat = objective(
        0.02, "entropy weight of Sinkhorn-Knopp; smaller: harder assignments (SwAV's 0.05 stays at ln K on small data)"
    )
    sinkhorn_iterations: PositiveInt = objective(3, "iterations of Sinkhorn-Knopp")
    queue_length: QueueLength = objective(
        -1, "recent embeddings (all processes) that join the assignment; 0: none; -1: as many as the prototypes need"
    )
    epoch_queue_starts: NonNegativeInt = objective(5, "first epoch that fills and uses the queue")
    freeze_prototypes_niters: NonNegativeInt = objective(50, "first steps in which the prototypes stay fixed")


@dataclass
class JointSwAV(SwAV):
    """Options of SwAV at two levels."""

    queue_length_intra: QueueLength = objective(
        -1, "queue of slices and images, where queue_length is that of volumes; 0: none; -1: as many as they need"
    )


@dataclass
class DeepCluster(Group):
    """Options of DeepCluster-v2's scripts."""

    position_code: NonNegativeFloat = objective(
        0.0, "weight of a slice's place beside its embedding in k-means: clusters of one place; 0: off"
    )
    kmeans_iterations: PositiveInt = objective(10, "iterations of spherical k-means, once per epoch and head")
    kmeans_backend: Literal["auto", "faiss", "torch"] = objective(
        "auto",
        "torch (on the training device, spread over the processes), faiss (on one process, its GPU where that build "
        "of faiss can); auto is torch",
    )


def of_level(cfg: Any, name: str, level: str) -> tuple[str, Any]:
    """(option, value) of a level: nmb_prototypes_intra for slices where a script has it, else nmb_prototypes."""
    names = {f.name for f in dataclasses.fields(cfg)}
    option = f"{name}_{level}" if f"{name}_{level}" in names else name
    return option, getattr(cfg, option)
