"""The options that downstream scripts share: type, range and help, once. Values stand in the scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from utils.architectures import ARCHITECTURES

FREE = {"free": True}  # metadata of an option that may differ between the parts of one run


@dataclass(kw_only=True)
class Data:
    """Data and labels"""

    data_path: str = field(metadata=FREE)
    """folder of the data"""
    split: str | None = None
    """YAML or JSON file with the cases of train, validation and test; null: a split drawn by patient"""
    fractions: list[NonNegativeFloat] = field(default_factory=lambda: [0.6, 0.15, 0.25])
    """shares of the patients in train, validation and test, where the split is drawn"""
    split_seed: NonNegativeInt = 0
    """random seed of the split that is drawn: the same test cases whatever the seed of the run"""
    labelled: NonNegativeInt = 0
    """training cases whose labels are used, chosen by the seed; 0: all; 5 are among the 10 of the same seed"""


@dataclass(kw_only=True)
class Prepared:
    """Working copy of the data"""

    cache_path: str | None = field(default=None, metadata=FREE)
    """folder for the working copy of the data; null: .cache in data_path"""
    on_bad: Literal["error", "skip"] = "error"
    """what to do with unusable files: stop before training, or name them and go on without"""


@dataclass(kw_only=True)
class Start:
    """Weights to start from"""

    weights: str = "random"
    """random, imagenet (torchvision's, from torch's cache), or a file of weights of any stage"""
    arch: Literal[ARCHITECTURES] | None = None
    """torchvision ResNet of the encoder; null: what the .json beside the weights says, else resnet50"""


@dataclass(kw_only=True)
class Training:
    """Training"""

    epochs: PositiveInt = 40
    """passes over the labelled cases; of several, the one with the best validation is tested"""
    steps_per_epoch: NonNegativeInt = 0
    """steps of an epoch, however many cases are labelled; 0: one pass"""
    batch_size: PositiveInt = 16
    """samples of a step"""
    base_lr: PositiveFloat = 0.0001
    """peak learning rate of AdamW, cosine schedule"""
    wd: NonNegativeFloat = 0.0001
    """weight decay"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU"""


@dataclass(kw_only=True)
class Running:
    """Running"""

    seed: NonNegativeInt = 0
    """random seed of new weights, the choice of labelled cases, order and augmentation"""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=FREE)
    """where to compute"""
    dump_path: str = field(default="", metadata=FREE)
    """receives results.json, cases.csv, split.json, config.yaml and best.pth; a run found here is continued"""
