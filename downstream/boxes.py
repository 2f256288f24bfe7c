"""Bounding boxes from a COCO file or VinDr-CXR's table, checked against the images that they are drawn on."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from conversion.dicom import dicom_header
from conversion.volume import BadFile
from datasets.index import IMAGE_FORMATS, IMAGE_SUFFIXES, bad_files
from utils.errors import UserError
from utils.files import read_csv

DICOM_SUFFIXES = {".dcm", ".dicom"}
NO_FINDING = "No finding"  # VinDr-CXR's class of images without boxes
OVERHANG = 1.0  # pixels by which a box may leave the image, for rounding; it is cut to the image
TABLE_COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")


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


def read_boxes(
    annotations: str | Path, data_path: str | Path, classes: Sequence[str] | None = None, merge_iou: float = 0.5
) -> tuple[list[Annotated], list[str]]:
    """(images ordered by name, names of the classes) of a COCO `.json` or a VinDr-CXR `.csv`.

    classes: those to keep, in this order; None: all, in the file's order (COCO) or by name (VinDr-CXR).
    merge_iou: boxes of one class by several readers that overlap by more are one finding; see `fuse`.
    Only headers of the images are read. Raises one UserError that lists the first ten problems, each with its remedy.
    """
    path, root = Path(annotations), Path(data_path)
    if not path.is_file():
        raise UserError(f"annotations: {path}: no such file; give a COCO .json or VinDr-CXR's train.csv")
    if not root.is_dir():
        raise UserError(f"data_path: {root} is not a folder; it should hold the images that {path.name} names")
    readers = {".json": _read_coco, ".csv": _read_table}
    if path.suffix.lower() not in readers:
        raise UserError(f"annotations: {path}: must be a COCO .json or a .csv with {', '.join(TABLE_COLUMNS)}")
    problems: list[str] = []
    images, marks, found = readers[path.suffix.lower()](path, root, problems)
    _measure(images, problems)
    for image in images:
        _check(image, marks[image.name], path, problems)
    if problems:
        raise bad_files(problems, f"annotations {path}")
    if not images:
        raise UserError(f"annotations: {path} names no image")
    chosen = list(classes) if classes else found
    unknown = [name for name in chosen if name not in found]
    if unknown:
        raise UserError(f"classes: {', '.join(unknown)} not in {path}, which has {', '.join(found)}")
    for image in images:
        _fill(image, [mark for mark in marks[image.name] if mark.name in chosen], chosen, merge_iou)
    return sorted(images, key=lambda image: image.name), chosen


@dataclass(frozen=True)
class Mark:
    """One box of one reader."""

    name: str  # of its class
    box: tuple[float, float, float, float]
    where: str  # in the annotations, for messages
    reader: str = ""
    crowd: bool = False


def fuse(boxes: np.ndarray, readers: Sequence[str], iou: float) -> np.ndarray:
    """Boxes [n, 4] of one class by several readers -> one mean box per finding, [m, 4].

    Weighted box fusion (Solovyev, Wang and Gabruseva 2021) with equal weights, as readers give no scores: every box
    joins the finding whose mean box it overlaps most, if by more than `iou` and if none of the finding's boxes is of
    the same reader, else it founds one. Larger boxes come first, equal ones by position, so the order of the rows does
    not matter.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    findings: list[list[int]] = []
    for i in np.lexsort((*boxes.T[::-1], -area)):
        open_to = [members for members in findings if readers[i] not in {readers[j] for j in members}]
        overlaps = [overlap(boxes[members].mean(axis=0), boxes[i]) for members in open_to]
        if overlaps and max(overlaps) > iou:
            open_to[int(np.argmax(overlaps))].append(int(i))
        else:
            findings.append([int(i)])
    return np.array([boxes[members].mean(axis=0) for members in findings]).reshape(-1, 4)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    common = max(0.0, width) * max(0.0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


Read = tuple[list[Annotated], dict[str, list[Mark]], list[str]]


def _read_coco(path: Path, root: Path, problems: list[str]) -> Read:
    """Images, their marks, and the classes by category id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"annotations: {path}: is not JSON ({error}); export it again") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise UserError(f"annotations: {path}: a COCO file has the lists {', '.join(parts)}")
    try:
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        entries = {entry["id"]: entry for entry in content["images"]}
        names = {i: str(entry["file_name"]) for i, entry in entries.items()}
        classes = [categories[i] for i in sorted(categories)]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"annotations: {path}: an entry of images or categories is not right ({error}); images have id and "
            "file_name, categories id and name, and ids are all numbers or all texts"
        ) from None
    for what, texts in (("categories", categories), ("images", names)):
        if len(texts) < len(content[what]):
            raise UserError(f"annotations: {path}: two {what} have the same id; number them again")
        text, count = Counter(texts.values()).most_common(1)[0] if texts else ("", 0)
        if count > 1:
            raise UserError(f"annotations: {path}: {what}: {text!r} is there twice; merge the entries")

    marks: dict[str, list[Mark]] = defaultdict(list)
    for number, entry in enumerate(content["annotations"]):
        where = f"annotation {entry.get('id', number) if isinstance(entry, dict) else number}"
        try:
            image, category, (x, y, w, h) = entry["image_id"], entry["category_id"], map(float, entry["bbox"])
            hash((image, category))  # a list, say, raises TypeError
        except (KeyError, TypeError, ValueError):
            problems.append(f"{where}: needs image_id, category_id and bbox [x, y, width, height]; correct it")
            continue
        if image not in names:
            problems.append(f"{where}: image_id {image} is not among the images; add the image or remove the box")
        elif category not in categories:
            problems.append(f"{where}: category_id {category} is not among the categories; add it or remove the box")
        else:
            mark = Mark(categories[category], (x, y, x + w, y + h), where, crowd=bool(entry.get("iscrowd")))
            marks[names[image]].append(mark)

    images = []
    for i, name in names.items():
        entry = entries[i]
        patient = str(entry.get("patient_id", entry.get("patient", name)))
        images.append(Annotated(name, root / name, patient, entry.get("height", 0), entry.get("width", 0)))
    return images, marks, classes


def _read_table(path: Path, root: Path, problems: list[str]) -> Read:
    """Images, their marks, and the classes by name, of VinDr-CXR's table."""
    lines = read_csv(path, "annotations", TABLE_COLUMNS)
    files = _by_stem(root)
    names: dict[str, str] = {}  # of a class_id
    images: dict[str, Annotated] = {}
    marks: dict[str, list[Mark]] = defaultdict(list)
    for number, row in enumerate(lines, start=2):
        where, image, name = f"line {number}", row["image_id"], row["class_name"]
        if not image or not name:
            problems.append(f"{where}: has no {'class_name' if image else 'image_id'}; fill it in or remove the line")
            continue
        number_of_class = row.get("class_id", "")
        if number_of_class and names.setdefault(number_of_class, name) != name:
            was = names[number_of_class]
            problems.append(f"{where}: class_id {number_of_class} is {name!r} here but {was!r} above; correct one")
            continue
        if image not in images:
            found = files.get(image, [])
            if len(found) != 1:
                there = f"{len(found)} files: {', '.join(map(str, found))}" if found else f"no image below {root}"
                problems.append(f"{where}: image_id {image} has {there}; keep one of .png .jpg .tif .dcm .dicom")
            patient = row.get("patient_id") or row.get("patient") or image
            images[image] = Annotated(image, found[0] if len(found) == 1 else Path(), patient)
        texts = [row[column] for column in TABLE_COLUMNS[2:]]
        if name.lower() == NO_FINDING.lower():
            if any(texts):
                problems.append(f"{where}: {NO_FINDING!r} has a box; correct the class or leave the box empty")
            continue
        try:
            box = tuple(map(float, texts))
        except ValueError:
            problems.append(f"{where}: x_min, y_min, x_max, y_max must be four numbers, not {texts}; correct them")
            continue
        marks[image].append(Mark(name, box, where, row.get("rad_id", "")))
    classes = sorted({mark.name for some in marks.values() for mark in some})
    return list(images.values()), marks, classes


def _by_stem(root: Path) -> dict[str, list[Path]]:
    """Image files below root by name without suffix."""
    found: dict[str, list[Path]] = defaultdict(list)
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES | DICOM_SUFFIXES:
                found[stem].append(Path(parent) / name)
    return found


def _measure(images: Iterable[Annotated], problems: list[str]) -> None:
    """Height and width from the headers; where the annotations state them too, they must agree."""

    def size(image: Annotated) -> tuple[int, int] | str:
        if image.path == Path():  # reported already
            return 0, 0
        try:
            if image.path.suffix.lower() in DICOM_SUFFIXES:
                header = dicom_header(image.path)
                return int(header.Rows), int(header.Columns)
            with Image.open(image.path, formats=IMAGE_FORMATS) as file:
                return file.height, file.width
        except BadFile as error:
            return f"{image.path}: {error}"
        except FileNotFoundError:
            return f"{image.path}: no such file, but {image.name} has annotations; copy it there or correct data_path"
        except Exception as error:  # decoders fail in many ways on arbitrary bytes
            return f"{image.path}: cannot be read as an image ({error}); export it again or remove its annotations"

    images = list(images)
    with ThreadPoolExecutor(8) as pool:
        for image, found in zip(images, pool.map(size, images), strict=True):
            if isinstance(found, str):
                problems.append(found)
                image.height = image.width = 0
                continue
            stated = image.height, image.width
            if all(stated) and stated != found:
                problems.append(
                    f"{image.path}: is {found[1]} x {found[0]} pixels, but the annotations were made for "
                    f"{stated[1]} x {stated[0]}; give the original images, or scale the boxes with them"
                )
            image.height, image.width = found


def _check(image: Annotated, marks: Iterable[Mark], path: Path, problems: list[str]) -> None:
    """Note each box that is not one, or that leaves its image by more than rounding does."""
    for mark in marks:
        x_min, y_min, x_max, y_max = mark.box
        which = f"{path.name} {mark.where}: box {[round(x, 1) for x in mark.box]} ({mark.name}) of {image.name}"
        if not all(map(math.isfinite, mark.box)):
            problems.append(f"{which} is not finite; correct it")
        elif x_max <= x_min or y_max <= y_min:
            problems.append(f"{which} has no area; correct it or remove it")
        elif image.height and (
            min(x_min, y_min) < -OVERHANG
            or x_max > image.width + OVERHANG
            or y_max > image.height + OVERHANG
            or min(x_max, y_max, image.width - x_min, image.height - y_min) <= 0
        ):
            problems.append(
                f"{which} leaves the image of {image.width} x {image.height} pixels; correct it (were the images "
                "resized after they were annotated?)"
            )


def _fill(image: Annotated, marks: list[Mark], classes: list[str], merge_iou: float) -> None:
    """Set boxes, labels and crowd; boxes of several readers are fused class by class."""
    boxes, labels, crowd = [], [], []
    several = len({mark.reader for mark in marks}) > 1
    for label, name in enumerate(classes, start=1):
        own = [mark for mark in marks if mark.name == name]
        found = np.array([mark.box for mark in own]).reshape(-1, 4)
        flags = [mark.crowd for mark in own]
        if several:
            found = fuse(found, [mark.reader for mark in own], merge_iou)
            flags = [False] * len(found)
        boxes.append(found)
        labels += [label] * len(found)
        crowd += flags
    limits = np.array([image.width, image.height] * 2)
    image.boxes = np.concatenate(boxes).clip(0, limits).astype(np.float32)
    image.labels, image.crowd = np.array(labels, dtype=np.int64), np.array(crowd, dtype=bool)
