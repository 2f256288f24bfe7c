"""Bounding boxes from a COCO file or VinDr-CXR's table, checked against the images that they are drawn on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchvision.ops import box_iou

from conversion.dicom_header import dicom_header
from datasets.index import IMAGE_SUFFIXES, bad_files, image_header
from utils.errors import UserError
from utils.files import read_csv, read_json

DICOM_SUFFIXES = {".dcm", ".dicom"}
NO_FINDING = "no finding"  # VinDr-CXR's class of images without boxes, in lower case
OVERHANG = 1.0  # pixels by which a box may leave the image, for rounding; it is cut to the image
BOX = ["x_min", "y_min", "x_max", "y_max"]
COCO = (
    "it needs the lists images (id, file_name), categories (id, name; ids all numbers or all texts) and annotations "
    "(image_id and category_id of these, and bbox [x, y, width, height])"
)


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
    """(images ordered by name, names of the classes) of a COCO `.json` or a VinDr-CXR `.csv`, by the images' headers.

    classes: those to keep, in this order; None: all, by category id (COCO) or name (VinDr-CXR).  merge_iou: see `fuse`.
    Raises one UserError that lists the first ten problems, each with its remedy.
    """
    path, root = Path(annotations), Path(data_path)
    readers = {".json": _read_coco, ".csv": _read_table}
    if not path.is_file() or path.suffix.lower() not in readers:
        raise UserError(f"annotations: {path}: no such file; give a COCO .json, or a .csv as VinDr-CXR's train.csv")
    images, marks, found, problems = readers[path.suffix.lower()](path, root)
    with ThreadPoolExecutor(8) as pool:
        problems += filter(None, pool.map(_measure, images.values()))
    problems += _wrong_boxes(images, marks)
    if problems:
        raise bad_files(problems, f"annotations {path}")
    chosen = list(classes) if classes else found
    if unknown := [name for name in chosen if name not in found]:
        raise UserError(f"classes: {', '.join(unknown)} not in {path}, which has {', '.join(found)}")
    marks = marks[marks.class_name.isin(chosen)]
    marks = marks.assign(label=[chosen.index(name) + 1 for name in marks.class_name])
    for image, own in marks.sort_values("label", kind="stable").groupby("image"):
        _set_boxes(images[image], own, merge_iou)
    return sorted(images.values(), key=lambda image: image.name), chosen


def fuse(boxes: np.ndarray, readers: Sequence[str], iou: float) -> np.ndarray:
    """Boxes [n, 4] of one class by several readers -> one mean box per finding, [m, 4].

    Weighted box fusion (Solovyev, Wang and Gabruseva 2021) with equal weights: every box joins the finding whose mean
    box it overlaps most, if by more than `iou` and if none of the finding's boxes is of the same reader, else it founds
    one. Larger boxes come first, equal ones by position, so the order of the rows does not matter.
    """
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


# Images by their id, marks (image, class_name, BOX, reader, crowd, where: for messages), classes, problems.
Read = tuple[dict[str, Annotated], pd.DataFrame, list[str], list[str]]


def _read_coco(path: Path, root: Path) -> Read:
    """Classes by category id."""
    where, images, rows = "the file", {}, []
    try:
        content = read_json(path)
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        classes = [categories[i] for i in sorted(categories)]
        for entry in content["images"]:
            name, height, width = str(entry["file_name"]), entry.get("height", 0), entry.get("width", 0)
            patient = str(entry.get("patient_id", entry.get("patient", name)))
            images[entry["id"]] = Annotated(name, root / name, patient, height, width)
        for number, entry in enumerate(content["annotations"]):
            where = f"annotation {entry.get('id', number)}"
            name, (x, y, w, h) = categories[entry["category_id"]], map(float, entry["bbox"])
            image, crowd = images[entry["image_id"]].name, bool(entry.get("iscrowd"))
            rows.append((image, name, x, y, x + w, y + h, "", crowd, f"{path.name}, {where}"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"annotations: {path}: {where} is not as in COCO ({error!r}); {COCO}") from None
    by_name = {image.name: image for image in images.values()}
    for what, names in (("categories", set(classes)), ("images", by_name)):
        if len(names) < len(content[what]):
            raise UserError(f"annotations: {path}: two {what} have the same id or name; give each its own")
    columns = ["image", "class_name", *BOX, "reader", "crowd", "where"]
    outside = [name for name in by_name if Path(name).is_absolute() or ".." in Path(name).parts]
    problems = [f"{path.name}: file_name {name} leads out of data_path; write the path below it" for name in outside]
    return by_name, pd.DataFrame(rows, columns=columns), classes, problems


def _read_table(path: Path, root: Path) -> Read:
    """VinDr-CXR's table; classes by name."""
    table = pd.DataFrame(read_csv(path, "annotations", ("image_id", "class_name", *BOX)))
    table = table.assign(image=table.image_id, reader=table.get("rad_id", ""), crowd=False)
    table["where"] = [f"{path.name}, line {line}" for line in range(2, len(table) + 2)]
    files = defaultdict(list)
    for file in sorted(root.rglob("[!.]*")):
        if file.suffix.lower() in IMAGE_SUFFIXES | DICOM_SUFFIXES:
            files[file.stem].append(file)
    images, problems = {}, []
    for row in table.drop_duplicates("image").to_dict("records"):
        name, found = row["image"], files[row["image"]]
        if len(found) == 1:
            images[name] = Annotated(name, found[0], row.get("patient_id") or row.get("patient") or name)
        else:
            there = f"{len(found)} files: {', '.join(map(str, found))}" if found else f"no image below {root}"
            problems.append(f"{row['where']}: image_id {name} has {there}; keep one of .png .jpg .tif .dcm .dicom")
    marks = table[table.class_name.str.lower() != NO_FINDING].copy()
    marks[BOX] = marks[BOX].apply(pd.to_numeric, errors="coerce")
    return images, marks, sorted(set(marks.class_name)), problems


def _measure(image: Annotated) -> str | None:
    """Set height and width from the header, or say what is wrong; those that the annotations state must agree."""
    stated, image.height, image.width = (image.height, image.width), 0, 0
    try:
        if image.path.suffix.lower() in DICOM_SUFFIXES:
            header = dicom_header(image.path)
            found = int(header.Rows), int(header.Columns)
        else:
            header = image_header(image.path)
            found = header["height"], header["width"]
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


def _wrong_boxes(images: dict[str, Annotated], marks: pd.DataFrame) -> list[str]:
    """A line for each mark without a name or area, or that leaves its image by more than rounding does."""
    readable = [name for name, image in images.items() if image.height]  # what is wrong with others is said already
    marks = marks[marks.image.isin(readable)]
    boxes = marks[BOX].to_numpy(float)
    sizes = np.array([[images[name].width, images[name].height] * 2 for name in marks.image]).reshape(-1, 4)
    cut = boxes.clip(0, sizes)
    inside = (cut[:, 2:] > cut[:, :2]).all(axis=1) & (abs(boxes - cut) <= OVERHANG).all(axis=1)
    return [
        f"{mark.where}: box {box.round(1).tolist()} ({mark.class_name or 'no class'}) of {mark.image} has no class or "
        f"area, or leaves the image of {size[0]} x {size[1]} pixels; correct it (was the image resized?)"
        for mark, box, size, good in zip(marks.itertuples(), boxes, sizes, inside, strict=True)
        if not (good and mark.class_name)
    ]


def _set_boxes(image: Annotated, marks: pd.DataFrame, merge_iou: float) -> None:
    """Boxes, labels and crowd of the marks of an image; those of several readers are fused class by class."""
    boxes, labels, crowd = marks[BOX].to_numpy(float), marks.label.to_numpy(), marks.crowd.to_numpy(bool)
    if marks.reader.nunique() > 1:
        by_class = {k: fuse(own[BOX].to_numpy(), own.reader.tolist(), merge_iou) for k, own in marks.groupby("label")}
        boxes = np.concatenate(list(by_class.values()))
        labels = np.repeat(list(by_class), [len(own) for own in by_class.values()])
        crowd = np.zeros(len(boxes), dtype=bool)
    image.boxes = boxes.clip(0, [image.width, image.height] * 2).astype(np.float32)
    image.labels, image.crowd = labels, crowd
