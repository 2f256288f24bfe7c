"""The options that downstream scripts share, in the vocabulary of utils/options.py. Values stand in the scripts."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from utils.options import ARCHITECTURES, Group, data, model, optimisation, running


@dataclass(kw_only=True)
class Data(Group):
    """Data, its split, and the cases whose labels are used."""

    data_path: str = data(MISSING, "folder of the data", may_change=True)  # the content is compared instead
    split: str | None = data(
        None, "YAML or JSON file with the cases of train, validation and test; null: a split drawn by patient"
    )
    fractions: list[NonNegativeFloat] = data(
        [0.6, 0.15, 0.25], "shares of the patients in train, validation and test, where the split is drawn"
    )
    split_seed: NonNegativeInt = data(
        0, "random seed of the split that is drawn: the same test cases whatever the seed of the run"
    )
    labelled: NonNegativeInt = data(
        0, "training cases whose labels are used, chosen by the seed; 0: all; 5 are among the 10 of the same seed"
    )


@dataclass(kw_only=True)
class WorkingCopy(Group):
    """The copy of the data that tasks of many small files work on."""

    cache_path: str | None = data(
        None, "folder for the working copy of the data; null: .cache in data_path", may_change=True
    )
    on_bad: Literal["error", "skip"] = data(
        "error", "response to unusable files: stop before training, or name them and go on without"
    )


@dataclass(kw_only=True)
class Start(Group):
    """The weights to start from."""

    weights: str = model(
        "random", "random, imagenet (torchvision's, from torch's cache), or a file of weights of any stage"
    )
    arch: Literal[ARCHITECTURES] | None = model(
        None, "torchvision ResNet of the encoder; null: what the .json beside the weights says, else resnet50"
    )


@dataclass(kw_only=True)
class Training(Group):
    """Training by gradient descent."""

    epochs: PositiveInt = optimisation(
        40, "passes over the labelled cases; of several, the one with the best validation is tested"
    )
    steps_per_epoch: NonNegativeInt = optimisation(0, "steps of an epoch, however many cases are labelled; 0: one pass")
    batch_size: PositiveInt = optimisation(16, "samples of a step")
    base_lr: PositiveFloat = optimisation(0.0001, "peak learning rate of AdamW, cosine schedule")
    wd: NonNegativeFloat = optimisation(0.0001, "weight decay")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = optimisation(
        "auto", "auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU"
    )


@dataclass(kw_only=True)
class Running(Group):
    """Where and how to run."""

    seed: NonNegativeInt = running(
        0, "random seed of new weights, the choice of labelled cases, order and augmentation"
    )
    device: Literal["auto", "cpu", "cuda"] = running("auto", "where to compute", may_change=True)
    dump_path: str = running(
        "",
        "folder that receives results.json, cases.csv, split.json, config.yaml and best.pth; a run found there is "
        "continued",
        may_change=True,
    )
