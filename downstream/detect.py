"""Detection: Faster R-CNN or RetinaNet with a feature pyramid on our ResNet, scored by mAP and AP50, tested once.

    python -m downstream.detect --data_path vindr/train --annotations vindr/train.csv --weights weights/swav3D.pth
    python -m downstream.detect --data_path images --annotations boxes.json --labelled 100 --model retinanet --seed 0

Annotations are a COCO `.json` or VinDr-CXR's `.csv`, images PNG, JPEG, TIFF, BMP or DICOM. docs/DOWNSTREAM.md has more.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import tqdm

from conversion.dicom import read_dicom_image
from datasets.cache import cache_folder, cached, key_of
from datasets.index import bad_files
from datasets.render import content_size, read_grey, robust_limits
from downstream import results, task
from downstream.boxes import DICOM_SUFFIXES, Annotated, read_boxes
from downstream.encoders import grey, load_encoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet
from utils import config
from utils.errors import UserError
from utils.files import csv_text
from utils.options import FREE, constants, data, running
from utils.options import model as network
from utils.precision import Precision
from utils.seeding import SHARED, SHUFFLE, stream

FORMAT = 3  # of the prepared images; raise it when their content changes
LEVELS = 5  # of both pyramids, each with its own anchor size
PREDICTIONS = ("image_id", "class_name", "score", "x_min", "y_min", "x_max", "y_max")  # columns
STAGES = ("layer4", "layer3", "layer2", "layer1", "stem")  # in the order in which they are set free


@constants
class Config(task.Options):
    """Options of detection."""

    fractions = [0.7, 0.1, 0.2]
    dump_path = "runs/detect"

    annotations: str = data(MISSING, "COCO .json, or a .csv as VinDr-CXR's (image_id, class_name, x_min, ...; rad_id)")
    classes: list[str] | None = data(None, "classes to detect; null: all that the annotations have")
    merge_iou: OpenUnitInterval = data(0.5, "overlap above which several readers' boxes are one finding, their mean")
    empty: Literal["keep", "drop"] = data("keep", "images without boxes: kept in training and test, or left out")
    image_size: PositiveInt = data(512, "pixels of an image's longer side, up or down, aspect kept")
    flip: bool = data(True, "half of the training images mirrored left to right")
    cache_path: str | None = data(None, "folder for images at image_size; null: .cache in data_path", FREE)
    model: Literal["fasterrcnn", "retinanet"] = network("fasterrcnn", "detector of two stages or of one")
    trainable_layers: Literal[0, 1, 2, 3, 4, 5] = network(5, "parts of the ResNet that train, from its end; 5: all")
    norm: Literal["auto", "frozen", "batch"] = network("auto", "BatchNorm; auto: frozen unless weights are random")
    anchor_sizes: list[PositiveInt] = network([32, 64, 128, 256, 512], "anchors' sides of five pyramid levels, pixels")
    pyramid_channels: PositiveInt = network(256, "width of the feature pyramid")
    proposals: PositiveInt = network(1000, "regions that Faster R-CNN's second stage sees; half as many train it")
    workers: PositiveInt = running(4, "threads that prepare images", FREE)


class Detection(task.Task):
    """Boxes in images, scored by `score`."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, device)
        if cfg.precision == "auto" and device.type == "cpu":
            # See NARROW in models/resnet.py: the pyramid of a small image ends with maps that narrow.
            self.precision = Precision("fp32", device)
        if len(cfg.anchor_sizes) != LEVELS:
            raise UserError(f"anchor_sizes: {cfg.anchor_sizes} must be {LEVELS} sizes, one for each pyramid level")
        images, self.classes = read_boxes(cfg.annotations, cfg.data_path, cfg.classes, cfg.merge_iou)
        self.images = {image.name: image for image in images if len(image.boxes) or cfg.empty == "keep"}
        self.patients = {name: image.patient for name, image in self.images.items()}
        self.sources = {name: image.path for name, image in self.images.items()}
        self.fingerprint = results.fingerprint(image.path for image in self.images.values())

    @functools.cached_property
    def parts(self) -> dict[str, list[Annotated]]:
        """The images that train, validate and test."""
        names = {"labelled": self.labelled, "validation": self.split.validation, "test": self.split.test}
        return {part: [self.images[name] for name in some] for part, some in names.items()}

    def count(self, images: Sequence[Annotated]) -> Counter[str]:
        """Boxes of each class."""
        return Counter(self.classes[label - 1] for image in images for label in image.labels[~image.crowd])

    def build(self) -> nn.Module:
        return build_model(self.cfg, len(self.classes))

    def examine(self) -> None:
        for part, images in self.parts.items():
            if not self.count(images):
                raise UserError(f"{part}: none of its {len(images)} images has a box; change --split, or --empty drop")
        self.files = prepare([image for images in self.parts.values() for image in images], self.cfg)

    def describe(self) -> str:
        boxes = pd.DataFrame({part: self.count(images) for part, images in self.parts.items()}, self.classes)
        return f"boxes:\n{boxes.fillna(0).astype(int).to_string()}"

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        loaded = {id(p) for p in model.backbone.body.parameters()}
        starts = {True: self.head_start, False: 0}
        split = [
            {
                **group,
                "params": [p for p in group["params"] if (id(p) in loaded) == within],
                "share": 1.0,
                "start": start,
            }
            for group in super().groups(model)
            for within, start in starts.items()
        ]
        return [group for group in split if group["params"]]

    def batch(self, epoch: int, step: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images [1, h, w] and their boxes [n, 4] and labels [n], without crowds, at working resolution."""
        images, cfg = self.parts["labelled"], self.cfg
        per_step = min(cfg.batch_size, len(images))
        total = self.steps * per_step
        draws = stream(cfg.seed, epoch, 0, SHARED, SHUFFLE)
        order = np.concatenate([draws.permutation(len(images)) for _ in range(math.ceil(total / len(images)))])
        mirror = (draws.random(total) < 0.5) & cfg.flip
        pixels, targets = [], []
        for place in range(step * per_step, (step + 1) * per_step):
            image = images[order[place]]
            boxes, labels = (torch.from_numpy(array[~image.crowd]) for array in (image.boxes, image.labels))
            own, boxes = self.read(image), boxes * self.scale(image)
            if mirror[place]:  # left to right
                own, width = own.flip(-1), own.shape[-1]
                boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
            pixels.append(own)
            targets.append({"boxes": boxes.to(self.device), "labels": labels.to(self.device)})
        return pixels, targets

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
        return sum(model(*batch).values())

    def validate(self, model: nn.Module) -> dict[str, float]:
        images = self.parts["validation"]
        scores = score(self.predict(model, images), images, self.classes)
        return {"ap50": scores["ap50"], "map": scores["map"]}

    def test(self, model: nn.Module) -> task.Outcome:
        images = self.parts["test"]
        found = self.predict(model, images)
        rows, boxes = [], []
        for image, own in zip(images, found, strict=True):
            counted = {"boxes": self.count([image]).total(), "found": len(own["boxes"])}
            rows.append({"case": image.name, "patient": image.patient, **counted})
            for label, value, box in zip(own["labels"], own["scores"], own["boxes"].tolist(), strict=True):
                line = image.name, self.classes[label - 1], f"{value:.4f}", *(f"{x:.1f}" for x in box)
                boxes.append(dict(zip(PREDICTIONS, line, strict=True)))
        about = {"images": len(images), "classes": self.classes}
        files = {"predictions.csv": csv_text(boxes, PREDICTIONS).encode(errors="backslashreplace")}
        return task.Outcome(score(found, images, self.classes), rows, about, files)

    def predict(self, model: nn.Module, images: list[Annotated]) -> list[dict[str, Tensor]]:
        """Of each image boxes [n, 4] in pixels of its file, best first, scores [n] and labels [n], on the CPU."""
        found = []
        for start in range(0, len(images), self.cfg.batch_size):
            some = images[start : start + self.cfg.batch_size]
            with self.precision.autocast():
                outputs = model([self.read(image) for image in some])
            for image, output in zip(some, outputs, strict=True):
                own = {key: value.cpu() for key, value in output.items()}
                found.append(own | {"boxes": own["boxes"].float() / self.scale(image), "scores": own["scores"].float()})
        return found

    def read(self, image: Annotated) -> Tensor:
        """The prepared copy [1, h, w] float32 in 0..1, on the device."""
        file = self.files[image.name]
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False)).float()[None].to(self.device)
        except (OSError, ValueError, EOFError):
            raise UserError(f"{file}: is damaged; remove it, and the same command makes it again") from None

    def scale(self, image: Annotated) -> Tensor:
        """[4] from coordinates in the file to those in its prepared copy."""
        height, width = content_size(image.height, image.width, self.cfg.image_size)
        return torch.tensor([width / image.width, height / image.height] * 2)


run, check = functools.partial(task.run, Detection), functools.partial(task.check, Detection)


def build_model(cfg: Config, classes: int) -> nn.Module:
    """The detector on cfg.weights; its other weights are the same for the same seed, whatever cfg.weights.

    Its own transform normalises images, because the pyramid takes the ResNet's layers one by one and not its forward.
    """
    encoder = load_encoder(cfg.weights, cfg.arch, cfg.seed)
    frozen = cfg.norm == "frozen" or (cfg.norm == "auto" and cfg.weights != "random")
    freeze(encoder, cfg.trainable_layers, frozen)
    torch.manual_seed(cfg.seed)
    first = 1 if cfg.model == "fasterrcnn" else 2  # stage of the ResNet that the pyramid begins with
    names = {f"layer{i}": str(i - first) for i in range(first, 5)}
    body = encoder, names, list(encoder.stage_features[first - 1 :]), cfg.pyramid_channels
    size = cfg.image_size
    transform = {"min_size": size, "max_size": size, "image_mean": [GREY_MEAN], "image_std": [GREY_STD]}
    ratios = ((0.5, 1.0, 2.0),) * LEVELS
    if cfg.model == "fasterrcnn":
        return FasterRCNN(
            BackboneWithFPN(*body),
            classes + 1,  # and the background
            rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in cfg.anchor_sizes), ratios),
            rpn_post_nms_top_n_train=2 * cfg.proposals,
            rpn_post_nms_top_n_test=cfg.proposals,
            box_batch_size_per_image=math.ceil(cfg.proposals / 2),
            **transform,
        )
    thirds = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in cfg.anchor_sizes)
    backbone = BackboneWithFPN(*body, LastLevelP6P7(cfg.pyramid_channels, cfg.pyramid_channels))
    anchors = AnchorGenerator(thirds, ratios)
    return RetinaNet(backbone, classes + 1, anchor_generator=anchors, **transform)  # class 0 stays unused


def freeze(encoder: GreyResNet, trainable_layers: int, norm: bool) -> None:
    """Leave `trainable_layers` of STAGES trainable; BatchNorm is fixed in the others, and with norm in all."""
    trainable = STAGES[:trainable_layers]
    for name, module in list(encoder.named_modules()):
        stage = name.split(".")[0] if name.startswith("layer") else "stem"
        if name and stage not in trainable:
            module.requires_grad_(False)
        if isinstance(module, nn.BatchNorm2d) and (norm or stage not in trainable):
            frozen = FrozenBatchNorm2d(module.num_features, module.eps)
            frozen.load_state_dict(module.state_dict())
            encoder.set_submodule(name, frozen)


def prepare(images: Sequence[Annotated], cfg: Config) -> dict[str, Path]:
    """Files with each image as [h, w] float16 in 0..1, the longer side image_size; made once.

    Intensities as in pre-training, bright where the file is shown bright. Raises one UserError that lists the images
    that cannot be read.
    """
    folder = cache_folder(Path(cfg.data_path), cfg.cache_path) / f"boxes_{cfg.image_size}px_v{FORMAT}"

    def render(image: Annotated, file: Path) -> None:
        pixels = (read_dicom_image if image.path.suffix.lower() in DICOM_SUFFIXES else read_grey)(image.path)
        low, high = robust_limits(pixels)
        if not high > low:  # also where there are NaN
            raise ValueError("is constant or holds NaN; export it again or remove its annotations")
        np.save(file, grey(pixels, low, high, content_size(*pixels.shape, cfg.image_size)).numpy())

    def file_of(image: Annotated) -> Path | str:
        status = image.path.stat()
        key = key_of(image.name, status.st_size, status.st_mtime_ns)
        try:
            return cached(folder, key, functools.partial(render, image))
        except ValueError as error:
            return f"{image.path}: {error}"

    with ThreadPoolExecutor(cfg.workers) as pool:
        made = list(tqdm(pool.map(file_of, images), "preparing images", len(images), disable=None, leave=False))
    if problems := [found for found in made if isinstance(found, str)]:
        raise bad_files(sorted(problems), f"data_path {cfg.data_path}")
    return {image.name: file for image, file in zip(images, made, strict=True)}


def score(found: list[dict[str, Tensor]], images: Sequence[Annotated], classes: Sequence[str]) -> dict[str, float]:
    """COCO's average precision over all images: `map` (mean over IoU 0.50:0.95) and `ap50`, and both per class.

    A class without boxes in the images is nan and left out of the mean; one with boxes of which none is found is 0.
    At most 100 boxes of an image count. Source: pycocotools, through torchmetrics.
    """
    from torchmetrics.detection import MeanAveragePrecision

    truth = [(image.boxes, image.labels, image.crowd.astype(int)) for image in images]
    targets = [dict(zip(("boxes", "labels", "iscrowd"), map(torch.from_numpy, one), strict=True)) for one in truth]
    scores: dict[str, float] = {}
    for name, thresholds in (("map", None), ("ap50", [0.5])):
        metric = MeanAveragePrecision(iou_thresholds=thresholds, class_metrics=True)
        metric.warn_on_many_detections = False
        metric.update(found, targets)
        result = metric.compute()
        labels, values = result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist()
        of_label = dict(zip(labels, values, strict=True)) | {0: result["map"].item()}
        for label, suffix in enumerate(["", *(f"_{one}" for one in classes)]):
            value = of_label.get(label, -1)
            scores[name + suffix] = math.nan if value < 0 else value  # -1 is pycocotools' word for no boxes
    return scores


if __name__ == "__main__":
    config.main(run, Config, __doc__)
