"""Detection: Faster R-CNN or RetinaNet with a feature pyramid on our ResNet, scored by mAP and AP50, tested once.

    python -m downstream.detect --data_path vindr/train --annotations vindr/train.csv --weights weights/swav3D.pth
    python -m downstream.detect --data_path images --annotations boxes.json --labelled 100 --model retinanet --seed 0

Annotations are a COCO `.json` or VinDr-CXR's `.csv`, images PNG, JPEG, TIFF, BMP or DICOM. The detectors are
torchvision's. Layouts, readers' boxes, frozen layers, expected output: docs/DETECTION.md.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import tqdm

from datasets.index import IMAGE_FORMATS, bad_files
from datasets.render import PERCENTILES, content_size
from datasets.store import cache_folder
from downstream.boxes import DICOM_SUFFIXES, Annotated, read_boxes
from downstream.encoders import choose_arch, describe_weights, load_encoder
from downstream.splits import choose_labelled, draw_split, write_split
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet
from utils import checkpoint, distributed
from utils import config as options
from utils.architectures import ARCHITECTURES
from utils.errors import UserError
from utils.files import write_json
from utils.optim import WarmupCosine, parameter_groups
from utils.precision import Precision
from utils.seeding import SHARED, SHUFFLE, stream

FORMAT = 1  # of the prepared images; raise it when their content changes
LEVELS = 5  # of both pyramids, each with its own anchor size
STAGES = ("layer4", "layer3", "layer2", "layer1", "stem")  # in the order in which they are set free


@dataclass
class Config:
    data_path: str
    """folder of the images: PNG, JPEG, TIFF, BMP or DICOM"""
    annotations: str
    """COCO .json, or VinDr-CXR's .csv (image_id, class_name, x_min, y_min, x_max, y_max; rad_id)"""
    classes: list[str] | None = None
    """classes to detect; null: all that the annotations have"""
    merge_iou: OpenUnitInterval = 0.5
    """boxes of several readers (rad_id) that overlap by more are one finding, their mean"""
    empty: Literal["keep", "drop"] = "keep"
    """images without boxes: train and test on them, or leave them out"""
    split: str | None = None
    """YAML or JSON file with the images of train, validation and test; null: draw one, by patient where named"""
    fractions: list[NonNegativeFloat] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    """of the patients in train, validation and test, where the split is drawn"""
    split_seed: NonNegativeInt = 0
    """of the split that is drawn: the same test images whatever the seed below"""
    labelled: NonNegativeInt = 0
    """training images whose boxes are used; 0: all. Chosen by the seed; 5 are among the 10 of the same seed"""

    weights: str = "random"
    """random, imagenet (from torch's cache), or a file of weights of any stage"""
    arch: Literal[ARCHITECTURES] | None = None
    """ResNet of the body; null: what the .json beside the weights says, else resnet50"""
    model: Literal["fasterrcnn", "retinanet"] = "fasterrcnn"
    """two stages or one"""
    trainable_layers: Literal[0, 1, 2, 3, 4, 5] = 5
    """how much of the ResNet trains, from its end: 0 nothing, 3 layer2 to layer4, 5 the stem too"""
    norm: Literal["auto", "frozen", "batch"] = "auto"
    """BatchNorm of the ResNet: fixed as loaded, or statistics of the batch; auto: frozen unless weights are random"""

    image_size: PositiveInt = 512
    """pixels of an image's longer side, up or down, aspect kept"""
    anchor_sizes: list[PositiveInt] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """side in pixels (of image_size) of the anchors of the five pyramid levels"""
    pyramid_channels: PositiveInt = 256
    """width of the feature pyramid"""
    proposals: PositiveInt = 1000
    """Faster R-CNN: regions of an image that its second stage looks at; half as many train it"""
    flip: bool = True
    """mirror half of the training images left to right"""
    epochs: PositiveInt = 40
    """passes over the labelled images"""
    steps_per_epoch: NonNegativeInt = 0
    """steps of an epoch, however many images are labelled; 0: one pass"""
    batch_size: PositiveInt = 16
    """images of a step"""
    base_lr: PositiveFloat = 0.0001
    """peak learning rate of AdamW, cosine schedule"""
    wd: NonNegativeFloat = 0.0001
    """weight decay"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the GPU computes in it, else fp16 on a GPU and fp32 on a CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    workers: PositiveInt = 4
    """threads that prepare images"""
    seed: NonNegativeInt = 0
    """of random weights, the choice of labelled images, order and mirroring"""

    dump_path: str = "runs/detect"
    """receives results.json, predictions.csv, split.json and best.pth"""
    cache_path: str | None = None
    """folder for images at image_size; null: .cache in data_path"""


def main(cfg: Config) -> None:
    run(cfg)


def run(cfg: Config) -> dict[str, Any]:
    """Train, keep the epoch with the best validation AP50, test it once. Everything is checked before training.

    Returns {"metrics": {"map", "ap50", "map_<class>", "ap50_<class>"}, "images": number of test images, ...}, which
    results.json holds too (there, null stands for nan: a class without boxes in the test). Raises UserError.
    """
    began = time.monotonic()
    place = distributed.start(cfg.device, cfg.seed)
    if len(cfg.anchor_sizes) != LEVELS:
        raise UserError(f"anchor_sizes: {cfg.anchor_sizes} must be {LEVELS} sizes, one for each pyramid level")
    images, classes = read_boxes(cfg.annotations, cfg.data_path, cfg.classes, cfg.merge_iou)
    if cfg.empty == "drop":
        images = [image for image in images if len(image.boxes)]
    patients = {image.name: image.patient for image in images}
    split = draw_split(cfg.split, cfg.fractions, patients, cfg.split_seed)
    labelled = choose_labelled(split.train, cfg.labelled, cfg.seed)
    label = describe_weights(cfg.weights)
    model = build_model(cfg, len(classes)).to(place.device)

    by_name = {image.name: image for image in images}
    parts = [[by_name[name] for name in names] for names in (labelled, split.validation, split.test)]
    _check_parts(parts, classes)
    files = prepare([image for part in parts for image in part], cfg)
    train, validation, test = ([Example(image, files[image.name]) for image in part] for part in parts)

    out = Path(cfg.dump_path)
    write_split(split, out / "split.json")
    history = fit(model, train, validation, classes, cfg, place.device)
    best = _best(history)
    checkpoint.write({key: value.cpu() for key, value in model.state_dict().items()}, out / "best.pth")
    found = predict(model, test, cfg)
    scores = score(found, [example.target() for example in test], classes)
    _print_table(scores, parts[2], classes)
    print(f"{len(test)} test images; epoch {best + 1} of {cfg.epochs} was the best on validation")

    result = {
        "metrics": scores,
        "images": len(test),
        "cases": len(test),
        "weights": label,
        "classes": classes,
        "labelled": labelled,
        "best_epoch": best + 1,
        "history": history,
        "seconds": round(time.monotonic() - began, 1),
        "torch": torch.__version__,
        "config": options.to_dict(cfg),
    }
    write_json(result, out / "results.json")
    write_predictions(found, test, classes, out / "predictions.csv")
    print(f"wrote {out}/results.json and predictions.csv", flush=True)
    return result


def build_model(cfg: Config, classes: int) -> nn.Module:
    """The detector on cfg.weights; its other weights are the same for the same seed, whatever cfg.weights.

    The ResNet takes grey images as it was trained: the detector's own transform normalises them, because its pyramid
    takes the ResNet's layers one by one and not its forward.
    """
    encoder = load_encoder(cfg.weights, choose_arch(cfg.weights, cfg.arch), cfg.seed)
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


def _precision(cfg: Config, device: torch.device) -> Precision:
    """On a CPU float32: see NARROW in models/resnet.py, and the pyramid of a small image ends with maps that narrow."""
    return Precision("fp32" if cfg.precision == "auto" and device.type == "cpu" else cfg.precision, device)


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


@dataclass(frozen=True)
class Example:
    """An image with its prepared copy."""

    image: Annotated
    file: Path  # [h, w] float16 in 0..1

    def pixels(self) -> Tensor:
        """[1, h, w] float32 in 0..1."""
        try:
            return torch.from_numpy(np.load(self.file, allow_pickle=False)).float()[None]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: prepared copy cannot be read ({error}); delete it and start again") from None

    def target(self, scale: tuple[float, float] = (1.0, 1.0)) -> dict[str, Tensor]:
        """boxes [n, 4], labels [n] and iscrowd [n]; scale: of x and y, from the pixels of the file."""
        boxes = torch.from_numpy(self.image.boxes) * torch.tensor([*scale, *scale])
        labels, crowd = torch.from_numpy(self.image.labels), torch.from_numpy(self.image.crowd)
        return {"boxes": boxes, "labels": labels, "iscrowd": crowd.long()}

    def scale(self, pixels: Tensor) -> tuple[float, float]:
        """Of x and y, from the file to the prepared copy."""
        return pixels.shape[2] / self.image.width, pixels.shape[1] / self.image.height


def prepare(images: Sequence[Annotated], cfg: Config) -> dict[str, Path]:
    """Files with each image as [h, w] float16 in 0..1, the longer side image_size; made once.

    Intensities as in pre-training: linear between the 0.5th and 99.5th percentile, clipped. Raises one UserError that
    lists the images that cannot be read.
    """
    folder = cache_folder(Path(cfg.data_path), cfg.cache_path) / f"boxes_{cfg.image_size}px_v{FORMAT}"
    problems: list[str] = []

    def one(image: Annotated) -> Path | None:
        status = image.path.stat()
        source = repr((image.name, status.st_size, status.st_mtime_ns))
        target = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.npy"
        if target.exists():
            return target
        try:
            pixels = _normalised(read_grey(image.path), cfg.image_size)
        except ValueError as error:
            problems.append(f"{image.path}: {error}")
            return None
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, pixels, allow_pickle=False)
        os.replace(temporary, target)
        return target

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(cfg.workers) as pool:
            made = list(
                tqdm(pool.map(one, images), total=len(images), desc="preparing images", disable=None, leave=False)
            )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder: --cache_path") from None
    if problems:
        raise bad_files(sorted(problems), f"data_path {cfg.data_path}")
    return {image.name: file for image, file in zip(images, made, strict=True)}


def read_grey(path: Path) -> np.ndarray:
    """[H, W] grey values, bright where the file is shown bright. Raises ValueError: what is wrong and the remedy."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        from conversion.dicom import read_dicom_image

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


def fit(
    model: nn.Module,
    train: list[Example],
    validation: list[Example],
    classes: list[str],
    cfg: Config,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train, and leave the weights of the epoch with the best validation AP50 in the model.

    Returns per epoch the mean loss, validation mAP and AP50. Raises UserError when the loss is not finite.
    """
    precision = _precision(cfg, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.wd), cfg.base_lr)
    steps = cfg.steps_per_epoch or math.ceil(len(train) / cfg.batch_size)
    rate = WarmupCosine(cfg.base_lr, 0.0, 0.0, min(steps, cfg.epochs * steps // 10), cfg.epochs * steps)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    for epoch in tqdm(range(cfg.epochs), desc="training", unit="epoch", disable=None):
        model.train()
        losses = []
        for step, (pixels, targets) in enumerate(batches(train, epoch, steps, cfg), start=epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            pixels = [one.to(device) for one in pixels]
            targets = [{key: value.to(device) for key, value in one.items()} for one in targets]
            with precision.autocast():
                loss = sum(model(pixels, targets).values())
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower --base_lr, or change --weights")
            optimizer.zero_grad()
            precision.backward(loss)
            precision.step(optimizer)
            losses.append(loss.item())
        found = score(predict(model, validation, cfg), [example.target() for example in validation], classes)
        history.append({"loss": float(np.mean(losses)), "map": found["map"], "ap50": found["ap50"]})
        if _best(history) == epoch:
            best = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        tqdm.write(f"epoch {epoch + 1:3}  loss {history[-1]['loss']:.4f}  validation AP50 {found['ap50']:.4f}")
    model.load_state_dict(best)
    return history


def _best(history: list[dict[str, float]]) -> int:
    """The epoch with the highest AP50; of equal ones the last, which has learned most."""
    return max(range(len(history)), key=lambda epoch: (history[epoch]["ap50"], epoch))


def batches(
    examples: list[Example], epoch: int, steps: int, cfg: Config
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """`steps` times images [1, h, w] and their targets at working resolution. A function of (seed, epoch).

    Crowd boxes are left out: COCO marks with them what nobody counted.
    """
    draws = stream(cfg.seed, epoch, 0, SHARED, SHUFFLE)
    per_step = min(cfg.batch_size, len(examples))
    order: list[int] = []
    while len(order) < steps * per_step:
        order += draws.permutation(len(examples)).tolist()
    for step in range(steps):
        pixels, targets = [], []
        for example in (examples[i] for i in order[step * per_step : (step + 1) * per_step]):
            image = example.pixels()
            target = example.target(example.scale(image))
            single = target.pop("iscrowd") == 0
            target = {key: value[single] for key, value in target.items()}
            if cfg.flip and draws.random() < 0.5:
                image, target["boxes"] = mirrored(image, target["boxes"])
            pixels.append(image)
            targets.append(target)
        yield pixels, targets


def mirrored(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Image [1, h, w] and its boxes, left to right."""
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


@torch.no_grad()
def predict(model: nn.Module, examples: list[Example], cfg: Config) -> list[dict[str, Tensor]]:
    """Of each image boxes [n, 4] in pixels of its file, scores [n] and labels [n], on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    precision = _precision(cfg, device)
    found = []
    for start in range(0, len(examples), cfg.batch_size):
        some = examples[start : start + cfg.batch_size]
        pixels = [example.pixels() for example in some]
        with precision.autocast():
            outputs = model([one.to(device) for one in pixels])
        for example, image, output in zip(some, pixels, outputs, strict=True):
            output = {key: value.cpu() for key, value in output.items()}
            x, y = example.scale(image)
            output["boxes"] = output["boxes"].float() / torch.tensor([x, y, x, y])
            output["scores"] = output["scores"].float()
            found.append(output)
    return found


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


def write_predictions(found: list[dict[str, Tensor]], test: list[Example], classes: Sequence[str], path: Path) -> None:
    """Every box that was found in the test images, in pixels of the file, best first."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image_id", "class_name", "score", "x_min", "y_min", "x_max", "y_max"])
        for example, output in zip(test, found, strict=True):
            for box, value, label in zip(*(output[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
                rows.writerow([example.image.name, classes[label - 1], f"{value:.4f}", *(f"{x:.1f}" for x in box)])


def _check_parts(parts: list[list[Annotated]], classes: list[str]) -> None:
    """Raise UserError where a part has no boxes; say which classes the labelled images lack."""
    for name, part in zip(("labelled", "validation", "test"), parts, strict=True):
        counts = Counter(classes[label - 1] for image in part for label in image.labels[~image.crowd])
        if not counts:
            raise UserError(
                f"{name}: none of its {len(part)} images has a box; use more images, another --split or seed, or "
                "--empty drop"
            )
        listed = ", ".join(f"{counts[one]} {one}" for one in classes)
        print(f"{name}: {len(part)} images, {counts.total()} boxes ({listed})", flush=True)


def _print_table(scores: dict[str, float], test: list[Annotated], classes: list[str]) -> None:
    width = max(map(len, [*classes, "all"]))
    print(f"{'class':{width}s}   boxes     AP50      mAP")
    for name, suffix in [*((one, f"_{one}") for one in classes), ("all", "")]:
        wanted = set(range(1, len(classes) + 1)) if not suffix else {classes.index(name) + 1}
        boxes = sum(int(np.isin(image.labels[~image.crowd], list(wanted)).sum()) for image in test)
        print(f"{name:{width}s}  {boxes:6d}   {scores[f'ap50{suffix}']:6.3f}   {scores[f'map{suffix}']:6.3f}")


if __name__ == "__main__":
    options.main(main, Config, __doc__)
