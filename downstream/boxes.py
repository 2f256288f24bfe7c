"""Bounding boxes from a COCO file or VinDr-CXR's table, checked against the images that they are drawn on."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from conversion.dicom import dicom_header
from conversion.volume import BadFile
from datasets.index import IMAGE_FORMATS, IMAGE_SUFFIXES, bad_files
from utils.errors import UserError
from utils.files import read_csv

DICOM_SUFFIXES = {".dcm", ".dicom"}
NO_FINDING = "no finding"  # VinDr-CXR's class of images without boxes, in lower case
OVERHANG = 1.0  # pixels by which a box may leave the image, for rounding; it is cut to the image
TABLE_COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
COCO = (
    "it needs the lists images (id, file_name), categories (id, name; ids all numbers or all texts) and annotations "
    "(image_id and category_id of these, and bbox [x, y, width, height])"
)


@dataclass(frozen=True)
class Mark:
    """One box of one reader."""

    name: str  # of its class
    box: tuple[float, ...]  # x_min y_min x_max y_max
    where: str  # in the annotations, for messages
    reader: str = ""
    crowd: bool = False


@dataclass
class Annotated:
    """An image and what is marked on it. Coordinates are pixels of the file, x to the right and y down."""

    name: str
    path: Path
    patient: str
    height: int = 0
    width: int = 0
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # [n, 4] x_min y_min x_max y_max
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [n] 1..K, positions in the classes + 1
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [n] COCO's iscrowd: not trained on or scored
    marks: list[Mark] = field(default_factory=list)  # what the boxes are made of

    def fill(self, classes: Sequence[str], merge_iou: float) -> None:
        """Set boxes, labels and crowd; boxes of several readers are fused class by class."""
        boxes, labels, crowd = [np.zeros((0, 4))], [], []
        several = len({mark.reader for mark in self.marks if mark.name in classes}) > 1
        for label, name in enumerate(classes, start=1):
            own = [mark for mark in self.marks if mark.name == name]
            found, flags = np.array([mark.box for mark in own]).reshape(-1, 4), [mark.crowd for mark in own]
            if several:
                found = fuse(found, [mark.reader for mark in own], merge_iou)
                flags = [False] * len(found)
            boxes.append(found)
            labels += [label] * len(found)
            crowd += flags
        self.boxes = np.concatenate(boxes).clip(0, [self.width, self.height] * 2).astype(np.float32)
        self.labels, self.crowd = np.array(labels, dtype=np.int64), np.array(crowd, dtype=bool)


def read_boxes(
    annotations: str | Path, data_path: str | Path, classes: Sequence[str] | None = None, merge_iou: float = 0.5
) -> tuple[list[Annotated], list[str]]:
    """(images ordered by name, names of the classes) of a COCO `.json` or a VinDr-CXR `.csv`, by the images' headers.

    classes: those to keep, in this order; None: all, by category id (COCO) or name (VinDr-CXR).  merge_iou: see `fuse`.
    Raises one UserError that lists the first ten problems, each with its remedy.
    """
    path, root = Path(annotations), Path(data_path)
    readers = {".json": _read_coco, ".csv": _read_table}
    if not path.is_file() or path.suffix.lower() not in readers:
        raise UserError(f"annotations: {path}: no such file; give a COCO .json, or a .csv as VinDr-CXR's train.csv")
    if not root.is_dir():
        raise UserError(f"data_path: {root} is not a folder; it should hold the images that {path.name} names")
    images, found, problems = readers[path.suffix.lower()](path, root)
    with ThreadPoolExecutor(8) as pool:
        problems += filter(None, pool.map(_measure, images))
    problems += [problem for image in images for problem in _wrong_boxes(image, path)]
    if problems:
        raise bad_files(problems, f"annotations {path}")
    if not images:
        raise UserError(f"annotations: {path} names no image")
    chosen = list(classes) if classes else found
    if unknown := [name for name in chosen if name not in found]:
        raise UserError(f"classes: {', '.join(unknown)} not in {path}, which has {', '.join(found)}")
    for image in images:
        image.fill(chosen, merge_iou)
    return sorted(images, key=lambda image: image.name), chosen


def fuse(boxes: np.ndarray, readers: Sequence[str], iou: float) -> np.ndarray:
    """Boxes [n, 4] of one class by several readers -> one mean box per finding, [m, 4].

    Weighted box fusion (Solovyev, Wang and Gabruseva 2021) with equal weights: every box joins the finding whose mean
    box it overlaps most, if by more than `iou` and if none of the finding's boxes is of the same reader, else it founds
    one. Larger boxes come first, equal ones by position, so the order of the rows does not matter.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    findings: list[list[int]] = []

    def means(some: list[list[int]]) -> np.ndarray:
        return np.array([boxes[members].mean(axis=0) for members in some]).reshape(-1, 4)

    for i in np.lexsort((*boxes.T[::-1], -area)).tolist():
        open_to = [members for members in findings if readers[i] not in {readers[j] for j in members}]
        overlaps = box_iou(*map(torch.from_numpy, (means(open_to), boxes[[i]]))).flatten()
        if len(overlaps) and overlaps.max() > iou:
            open_to[int(overlaps.argmax())].append(i)
        else:
            findings.append([i])
    return means(findings)


Read = tuple[list[Annotated], list[str], list[str]]  # images with their marks, classes, problems


def _read_coco(path: Path, root: Path) -> Read:
    """Classes by category id."""
    where, images = "the file", {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        classes = [categories[i] for i in sorted(categories)]
        for entry in content["images"]:
            name, height, width = str(entry["file_name"]), entry.get("height", 0), entry.get("width", 0)
            patient = str(entry.get("patient_id", entry.get("patient", name)))
            images[entry["id"]] = Annotated(name, root / name, patient, height, width)
        for number, entry in enumerate(content["annotations"]):
            where = f"annotation {entry.get('id', number)}"
            x, y, w, h = map(float, entry["bbox"])
            mark = Mark(categories[entry["category_id"]], (x, y, x + w, y + h), where, crowd=bool(entry.get("iscrowd")))
            images[entry["image_id"]].marks.append(mark)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"annotations: {path}: {where} is not as in COCO ({error!r}); {COCO}") from None
    for what, names in (("categories", classes), ("images", [image.name for image in images.values()])):
        if len(set(names)) < len(content[what]):
            raise UserError(f"annotations: {path}: two {what} have the same id or name; give each its own")
    return list(images.values()), classes, []


def _read_table(path: Path, root: Path) -> Read:
    """VinDr-CXR's table; classes by name."""
    files: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.suffix.lower() in IMAGE_SUFFIXES | DICOM_SUFFIXES and not hidden:
            files[file.stem].append(file)
    names: dict[str, str] = {}  # of a class_id
    images: dict[str, Annotated] = {}
    problems = []
    for number, row in enumerate(read_csv(path, "annotations", TABLE_COLUMNS), start=2):
        where, image, name, own_id = f"line {number}", row["image_id"], row["class_name"], row.get("class_id", "")
        if image not in images:
            found = files.get(image, [])
            if len(found) != 1:
                there = f"{len(found)} files: {', '.join(map(str, found))}" if found else f"no image below {root}"
                problems.append(f"{where}: image_id {image} has {there}; keep one of .png .jpg .tif .dcm .dicom")
            patient = row.get("patient_id") or row.get("patient") or image
            images[image] = Annotated(image, found[0] if len(found) == 1 else Path(), patient)
        texts = [row[column] for column in TABLE_COLUMNS[2:]]
        if not name:
            problems.append(f"{where}: has no class_name; fill it in or remove the line")
        elif own_id and names.setdefault(own_id, name) != name:
            problems.append(f"{where}: class_id {own_id} is {name!r} here but {names[own_id]!r} above; correct one")
        elif name.lower() == NO_FINDING:
            if any(texts):
                problems.append(f"{where}: {name!r} has a box; correct the class or leave the box empty")
        else:
            try:
                images[image].marks.append(Mark(name, tuple(map(float, texts)), where, row.get("rad_id", "")))
            except ValueError:
                problems.append(f"{where}: x_min, y_min, x_max, y_max must be four numbers, not {texts}; correct them")
    classes = {mark.name for image in images.values() for mark in image.marks}
    return list(images.values()), sorted(classes), problems


def _measure(image: Annotated) -> str | None:
    """Set height and width from the header, or say what is wrong; those that the annotations state must agree."""
    stated, image.height, image.width = (image.height, image.width), 0, 0
    if image.path == Path():  # reported already
        return None
    try:
        if image.path.suffix.lower() in DICOM_SUFFIXES:
            header = dicom_header(image.path)
            found = int(header.Rows), int(header.Columns)
        else:
            with Image.open(image.path, formats=IMAGE_FORMATS) as file:
                found = file.height, file.width
    except BadFile as error:
        return f"{image.path}: {error}"
    except FileNotFoundError:
        return f"{image.path}: no such file, but {image.name} has annotations; copy it there or correct data_path"
    except Exception as error:  # decoders fail in many ways on arbitrary bytes
        return f"{image.path}: cannot be read as an image ({error}); export it again or remove its annotations"
    image.height, image.width = found
    if all(stated) and stated != found:
        return (
            f"{image.path}: is {found[1]} x {found[0]} pixels, but the annotations were made for "
            f"{stated[1]} x {stated[0]}; give the original images, or scale the boxes with them"
        )
    return None


def _wrong_boxes(image: Annotated, path: Path) -> list[str]:
    """A line for each box that is not one, or that leaves its image by more than rounding does."""
    problems = []
    for mark in image.marks:
        x_min, y_min, x_max, y_max = mark.box
        which = f"{path.name} {mark.where}: box {[round(x, 1) for x in mark.box]} ({mark.name}) of {image.name}"
        beyond = -min(x_min, y_min), x_max - image.width, y_max - image.height
        inside = min(x_max, y_max, image.width - x_min, image.height - y_min) > 0
        if not (all(map(math.isfinite, mark.box)) and x_max > x_min and y_max > y_min):
            problems.append(f"{which} has no area; correct it or remove it")
        elif image.height and (max(beyond) > OVERHANG or not inside):
            problems.append(
                f"{which} leaves the image of {image.width} x {image.height} pixels; correct it (were the images "
                "resized after they were annotated?)"
            )
    return problems
