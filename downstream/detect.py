"""Detection: Faster R-CNN or RetinaNet with a feature pyramid on our ResNet, scored by mAP and AP50, tested once.

    python -m downstream.detect --data_path vindr/train --annotations vindr/train.csv --weights weights/swav3D.pth
    python -m downstream.detect --data_path images --annotations boxes.json --labelled 100 --model retinanet --seed 0

Annotations are a COCO `.json` or VinDr-CXR's `.csv`, images PNG, JPEG, TIFF, BMP or DICOM. The detectors are
torchvision's. Layouts, readers' boxes, frozen layers, expected output: docs/DOWNSTREAM.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import tqdm

from datasets.cache import cache_folder, cached, key_of
from datasets.index import IMAGE_FORMATS, bad_files
from datasets.render import PERCENTILES, content_size
from downstream import options, task
from downstream.boxes import DICOM_SUFFIXES, Annotated, read_boxes
from downstream.encoders import load_encoder
from downstream.task import Outcome, Task, fingerprint
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet
from utils import config
from utils.errors import UserError
from utils.files import write_csv
from utils.options import constants
from utils.precision import Precision
from utils.seeding import SHARED, SHUFFLE, stream

FORMAT = 1  # of the prepared images; raise it when their content changes
LEVELS = 5  # of both pyramids, each with its own anchor size
STAGES = ("layer4", "layer3", "layer2", "layer1", "stem")  # in the order in which they are set free


@dataclass(kw_only=True)
class Boxes:
    """Boxes"""

    annotations: str
    """COCO .json, or VinDr-CXR's .csv (image_id, class_name, x_min, y_min, x_max, y_max; rad_id)"""
    classes: list[str] | None = None
    """classes to detect; null: all that the annotations have"""
    merge_iou: OpenUnitInterval = 0.5
    """boxes of several readers (rad_id) that overlap by more are one finding, their mean"""
    empty: Literal["keep", "drop"] = "keep"
    """images without boxes: train and test on them, or leave them out"""
    image_size: PositiveInt = 512
    """pixels of an image's longer side, up or down, aspect kept"""
    flip: bool = True
    """mirror half of the training images left to right"""
    workers: PositiveInt = field(default=4, metadata=options.FREE)
    """threads that prepare images"""
    cache_path: str | None = field(default=None, metadata=options.FREE)
    """folder for images at image_size; null: .cache in data_path"""


@dataclass(kw_only=True)
class Detector:
    """Detector"""

    model: Literal["fasterrcnn", "retinanet"] = "fasterrcnn"
    """detector of two stages or of one"""
    trainable_layers: Literal[0, 1, 2, 3, 4, 5] = 5
    """how much of the ResNet trains, from its end: 0 nothing, 3 layer2 to layer4, 5 the stem too"""
    norm: Literal["auto", "frozen", "batch"] = "auto"
    """BatchNorm of the ResNet: fixed as loaded, or statistics of the batch; auto: frozen unless weights are random"""
    anchor_sizes: list[PositiveInt] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """side in pixels (of image_size) of the anchors of the five pyramid levels"""
    pyramid_channels: PositiveInt = 256
    """width of the feature pyramid"""
    proposals: PositiveInt = 1000
    """Faster R-CNN: regions of an image that its second stage looks at; half as many train it"""


@constants
class Config(options.Running, options.Training, Detector, options.Start, Boxes, options.Data):
    fractions = [0.7, 0.1, 0.2]  # noqa: RUF012
    dump_path = "runs/detect"


def main(cfg: Config) -> None:
    run(cfg)


def run(cfg: Config) -> dict[str, Any]:
    """Train, keep the epoch with the best validation AP50, test it once; see `task.run`.

    Metrics are map, ap50, map_<class> and ap50_<class> over the test images; nan for a class without boxes there.
    """
    return task.run(Detection, cfg)


def check(cfg: Config) -> None:
    """Raise UserError for whatever would stop `run`."""
    task.check(Detection, cfg)


class Detection(Task):
    """Boxes in images."""

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
        self.fingerprint = fingerprint(image.path for image in self.images.values())

    @property
    def parts(self) -> dict[str, list[Annotated]]:
        """The images that train, validate and test."""
        names = {"labelled": self.labelled, "validation": self.split.validation, "test": self.split.test}
        return {part: [self.images[name] for name in some] for part, some in names.items()}

    def build(self) -> nn.Module:
        return build_model(self.cfg, len(self.classes))

    def examine(self) -> None:
        for part, images in self.parts.items():
            if not any((~image.crowd).any() for image in images):
                raise UserError(
                    f"{part}: none of its {len(images)} images has a box; use more images, another --split or seed, or "
                    "--empty drop"
                )
        self.files = prepare([image for images in self.parts.values() for image in images], self.cfg)

    def describe(self) -> str:
        lines = []
        for part, images in self.parts.items():
            counts = self.count(images)
            listed = ", ".join(f"{counts[one]} {one}" for one in self.classes)
            lines.append(f"{part}: {len(images)} images, {counts.total()} boxes ({listed})")
        return "\n".join(lines)

    def count(self, images: Sequence[Annotated]) -> Counter[str]:
        """Boxes of each class."""
        return Counter(self.classes[label - 1] for image in images for label in image.labels[~image.crowd])

    def batch(self, epoch: int, step: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images [1, h, w] and their targets at working resolution.

        Crowd boxes are left out: COCO marks with them what nobody counted.
        """
        images, cfg = self.parts["labelled"], self.cfg
        per_step = min(cfg.batch_size, len(images))
        total = self.steps * per_step
        draws = stream(cfg.seed, epoch, 0, SHARED, SHUFFLE)
        order = np.concatenate([draws.permutation(len(images)) for _ in range(math.ceil(total / len(images)))])
        mirror = (draws.random(total) < 0.5) & cfg.flip
        pixels, targets = [], []
        for place in range(step * per_step, (step + 1) * per_step):
            image = images[order[place]]
            own = self.read(image)
            target = target_of(image, own)
            single = target.pop("iscrowd") == 0
            target = {key: value[single] for key, value in target.items()}
            if mirror[place]:
                own, target["boxes"] = mirrored(own, target["boxes"])
            pixels.append(own.to(self.device))
            targets.append({key: value.to(self.device) for key, value in target.items()})
        return pixels, targets

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
        return sum(model(*batch).values())

    def validate(self, model: nn.Module) -> dict[str, float]:
        scores, _ = self.score(model, self.parts["validation"])
        return {"ap50": scores["ap50"], "map": scores["map"]}

    def test(self, model: nn.Module, folder: Path) -> Outcome:
        images = self.parts["test"]
        scores, found = self.score(model, images)
        write_csv(self.predictions(images, found), folder / "predictions.csv")
        rows = [
            {
                "case": image.name,
                "patient": image.patient,
                "boxes": self.count([image]).total(),
                "found": len(own["boxes"]),
            }
            for image, own in zip(images, found, strict=True)
        ]
        return Outcome(scores, rows, self.table(scores), {"images": len(images), "classes": self.classes})

    def score(self, model: nn.Module, images: list[Annotated]) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        found = self.predict(model, images)
        return score(found, [target_of(image) for image in images], self.classes), found

    def predict(self, model: nn.Module, images: list[Annotated]) -> list[dict[str, Tensor]]:
        """Of each image boxes [n, 4] in pixels of its file, scores [n] and labels [n], on the CPU."""
        found = []
        for start in range(0, len(images), self.cfg.batch_size):
            some = images[start : start + self.cfg.batch_size]
            pixels = [self.read(image) for image in some]
            with self.precision.autocast():
                outputs = model([one.to(self.device) for one in pixels])
            for image, own, output in zip(some, pixels, outputs, strict=True):
                output = {key: value.cpu() for key, value in output.items()}
                output["boxes"] = output["boxes"].float() / scale_of(image, own)
                output["scores"] = output["scores"].float()
                found.append(output)
        return found

    def read(self, image: Annotated) -> Tensor:
        """The prepared copy [1, h, w] float32 in 0..1."""
        return torch.from_numpy(np.load(self.files[image.name], allow_pickle=False)).float()[None]

    def predictions(self, images: list[Annotated], found: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """Lines of predictions.csv: every box that was found, in pixels of the file, best first."""
        rows = []
        for image, output in zip(images, found, strict=True):
            for box, value, label in zip(*(output[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
                corners = dict(zip(("x_min", "y_min", "x_max", "y_max"), (f"{x:.1f}" for x in box), strict=True))
                name = self.classes[label - 1]
                rows.append({"image_id": image.name, "class_name": name, "score": f"{value:.4f}"} | corners)
        return rows

    def table(self, scores: dict[str, float]) -> str:
        width, counts = max(map(len, [*self.classes, "all"])), self.count(self.parts["test"])
        lines = [f"{'class':{width}s}   boxes     AP50      mAP"]
        for name, suffix, boxes in [*((c, f"_{c}", counts[c]) for c in self.classes), ("all", "", counts.total())]:
            lines.append(
                f"{name:{width}s}  {boxes:6d}   {scores[f'ap50{suffix}']:6.3f}   {scores[f'map{suffix}']:6.3f}"
            )
        return "\n".join(lines)


def build_model(cfg: Config, classes: int) -> nn.Module:
    """The detector on cfg.weights; its other weights are the same for the same seed, whatever cfg.weights.

    The ResNet takes grey images as it was trained: the detector's own transform normalises them, because its pyramid
    takes the ResNet's layers one by one and not its forward.
    """
    encoder = load_encoder(cfg.weights, cfg.arch, cfg.seed)
    frozen = cfg.norm == "frozen" or (cfg.norm == "auto" and cfg.weights != "random")
    freeze(encoder, cfg.trainable_layers, frozen)
    torch.manual_seed(cfg.seed)
    grey = {
        "min_size": cfg.image_size,
        "max_size": cfg.image_size,
        "image_mean": [GREY_MEAN],
        "image_std": [GREY_STD],
    }
    ratios = ((0.5, 1.0, 2.0),) * LEVELS
    if cfg.model == "fasterrcnn":
        names, widths = {f"layer{i}": str(i - 1) for i in range(1, 5)}, list(encoder.stage_features)
        return FasterRCNN(
            BackboneWithFPN(encoder, names, widths, cfg.pyramid_channels),
            classes + 1,  # and the background
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in cfg.anchor_sizes), ratios),
            rpn_post_nms_top_n_train=2 * cfg.proposals,
            rpn_post_nms_top_n_test=cfg.proposals,
            box_batch_size_per_image=math.ceil(cfg.proposals / 2),
            **grey,
        )
    names, widths = {f"layer{i}": str(i - 2) for i in range(2, 5)}, list(encoder.stage_features[1:])
    pyramid = LastLevelP6P7(cfg.pyramid_channels, cfg.pyramid_channels)
    thirds = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in cfg.anchor_sizes)
    return RetinaNet(
        BackboneWithFPN(encoder, names, widths, cfg.pyramid_channels, pyramid),
        classes + 1,  # label 0 stays unused
        anchor_generator=AnchorGenerator(thirds, ratios),
        **grey,
    )


def freeze(encoder: GreyResNet, trainable_layers: int, norm: bool) -> None:
    """Leave only the last `trainable_layers` of STAGES trainable; fix BatchNorm in the others, and with norm in all.

    A frozen BatchNorm uses the loaded statistics, gains and biases, in training too: a batch of detection has few
    images, whose own statistics would be noise.
    """
    trainable = STAGES[:trainable_layers]
    for name, child in encoder.named_children():
        stage = name if name.startswith("layer") else "stem"
        child.requires_grad_(stage in trainable)
        if norm or stage not in trainable:
            setattr(encoder, name, _with_frozen_norm(child))


def _with_frozen_norm(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _with_frozen_norm(child))
    return module


def prepare(images: Sequence[Annotated], cfg: Config) -> dict[str, Path]:
    """Files with each image as [h, w] float16 in 0..1, the longer side image_size; made once.

    Intensities as in pre-training: linear between the 0.5th and 99.5th percentile, clipped. Raises one UserError that
    lists the images that cannot be read.
    """
    folder = cache_folder(Path(cfg.data_path), cfg.cache_path) / f"boxes_{cfg.image_size}px_v{FORMAT}"

    def one(image: Annotated) -> Path | str:
        def make(temporary: Path) -> None:
            np.save(temporary, _normalised(read_grey(image.path), cfg.image_size), allow_pickle=False)

        status = image.path.stat()
        try:
            return cached(folder, key_of(image.name, status.st_size, status.st_mtime_ns), make)
        except ValueError as error:
            return f"{image.path}: {error}"

    with ThreadPoolExecutor(cfg.workers) as pool:
        made = list(tqdm(pool.map(one, images), "preparing images", len(images), disable=None, leave=False))
    if problems := [found for found in made if isinstance(found, str)]:
        raise bad_files(sorted(problems), f"data_path {cfg.data_path}")
    return {image.name: file for image, file in zip(images, made, strict=True)}


def read_grey(path: Path) -> np.ndarray:
    """[H, W] grey values, bright where the file is shown bright. Raises ValueError: what is wrong and the remedy."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        from conversion.readers import read_dicom_image

        return read_dicom_image(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            own = image.mode in ("L", "I", "F") or image.mode.startswith("I;16")
            return np.asarray(image if own else image.convert("L"))
    except Exception as error:  # decoders fail in many ways on damaged data
        raise ValueError(f"broken image data ({error}); export it again or remove its annotations") from None


def _normalised(pixels: np.ndarray, size: int) -> np.ndarray:
    pixels = pixels.astype(np.float64)
    low, high = np.percentile(pixels, PERCENTILES)
    if low == high:  # an X-ray on a large empty ground
        low, high = pixels.min(), pixels.max()
    if not high > low:  # also where there are NaN
        raise ValueError("is constant or holds NaN; export it again or remove its annotations")
    grey = torch.from_numpy(((pixels - low) / (high - low)).clip(0, 1)).float()[None, None]
    resized = F.interpolate(grey, content_size(*pixels.shape, size), mode="bilinear", antialias=True)
    return resized[0, 0].clamp(0, 1).half().numpy()


def scale_of(image: Annotated, pixels: Tensor) -> Tensor:
    """[4], from coordinates in the file to those in its prepared copy [1, h, w]."""
    x, y = pixels.shape[2] / image.width, pixels.shape[1] / image.height
    return torch.tensor([x, y, x, y])


def target_of(image: Annotated, pixels: Tensor | None = None) -> dict[str, Tensor]:
    """boxes [n, 4], labels [n] and iscrowd [n], in coordinates of the prepared copy [1, h, w], or of the file."""
    boxes = torch.from_numpy(image.boxes)
    boxes = boxes if pixels is None else boxes * scale_of(image, pixels)
    return {"boxes": boxes, "labels": torch.from_numpy(image.labels), "iscrowd": torch.from_numpy(image.crowd).long()}


def mirrored(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Image [1, h, w] and its boxes, left to right."""
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def score(found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]], classes: Sequence[str]) -> dict[str, float]:
    """COCO's average precision over all images: `map` (mean over IoU 0.50:0.95) and `ap50`, and both per class.

    A class without boxes among the targets is nan and left out of the mean; one with boxes of which none is found is 0.
    At most 100 boxes of an image count. Source: pycocotools, through torchmetrics.
    """
    from torchmetrics.detection import MeanAveragePrecision

    scores: dict[str, float] = {}
    for name, thresholds in (("map", None), ("ap50", [0.5])):
        metric = MeanAveragePrecision(iou_thresholds=thresholds, class_metrics=True)
        metric.warn_on_many_detections = False
        metric.update(found, targets)
        result = metric.compute()
        labels, values = result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist()
        per_class = dict(zip(labels, values, strict=True))
        scores[name] = _or_nan(result["map"].item())
        scores |= {f"{name}_{one}": _or_nan(per_class.get(label, -1)) for label, one in enumerate(classes, start=1)}
    return scores


def _or_nan(value: float) -> float:
    return math.nan if value < 0 else value  # -1 is pycocotools' word for no boxes


if __name__ == "__main__":
    config.main(main, Config, __doc__)
