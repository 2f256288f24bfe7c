"""Boxes are read, checked and merged as documented; detection is scored as COCO does, and learns from small images."""

from __future__ import annotations

import copy
import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from test_task import stopping
from tiny import save
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from downstream import detect, task
from downstream.boxes import Annotated, fuse, read_boxes
from downstream.detect import Config, Detection, build_model, freeze, run, score
from downstream.splits import Split
from downstream.task import Task
from models.resnet import GREY_MEAN, GREY_STD
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
GREY = np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)


def config(folder: Path, **changes: Any) -> Config:
    given = {"data_path": str(folder), "annotations": str(folder / "boxes.json"), "arch": "resnet18", "image_size": 64}
    given |= {"anchor_sizes": [12, 16, 24, 32, 48], "pyramid_channels": 64, "proposals": 32, "batch_size": 4}
    return Config(**(given | {"device": "cpu"} | changes))


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """60 images of 64 x 64 pixels, each with a bright disc or square frame on noise, and boxes.json."""
    root, rng, (y, x) = tmp_path_factory.mktemp("images"), np.random.default_rng(0), np.mgrid[:64, :64]
    images, marks = [], []
    for i in range(60):
        r, disc = rng.uniform(8, 12), bool(i % 2)
        cx, cy = rng.uniform(r, 64 - r, 2)
        across = np.maximum(abs(x - cx), abs(y - cy))
        shape = np.hypot(x - cx, y - cy) <= r if disc else (across <= r) & (across > r - 4)
        pixels = rng.normal(70, 20, (64, 64)) + 110 * shape
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"image_{i:03}.png")
        images.append({"id": i, "file_name": f"image_{i:03}.png"})
        marks.append({"image_id": i, "category_id": 1 if disc else 2, "bbox": [cx - r, cy - r, 2 * r, 2 * r]})
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "frame"}]
    content = {"images": images, "annotations": marks, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))
    return root


def write_table(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """VinDr-CXR's train.csv."""
    with open(path, "w", newline="") as file:
        columns = ("image_id", "class_name", "rad_id", "x_min", "y_min", "x_max", "y_max")
        csv.writer(file).writerows([columns, *rows])
    return path


# --- what is read ---


def test_coco_boxes_become_corners_and_categories_become_labels_by_id(tmp_path):
    save(tmp_path / "deep" / "a.png", GREY)
    save(tmp_path / "b.png", GREY)
    a = {"id": 7, "file_name": "deep/a.png", "patient_id": "p1", "width": 60, "height": 40}
    content = {
        "images": [a, {"id": 3, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 20]},
            {"image_id": 7, "category_id": 4, "bbox": [50, 30, 10.5, 10.5], "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "nodule"}, {"id": 4, "name": "effusion"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    (b, a), classes = read_boxes(tmp_path / "boxes.json", tmp_path)
    assert classes == ["effusion", "nodule"]
    assert (a.name, a.patient, a.height, a.width, b.patient) == ("deep/a.png", "p1", 40, 60, "b.png")
    # the second box leaves the image by half a pixel: cut to it
    assert a.boxes.tolist() == [[50, 30, 60, 40], [1, 2, 11, 22]]
    assert (a.labels.tolist(), a.crowd.tolist(), b.boxes.shape) == ([1, 2], [True, False], (0, 4))
    (_, a), classes = read_boxes(tmp_path / "boxes.json", tmp_path, ["nodule"])
    assert (classes, a.labels.tolist(), a.boxes.tolist()) == (["nodule"], [1], [[1, 2, 11, 22]])


def test_a_vindr_table_fuses_readers_class_by_class_and_keeps_images_without_findings(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "train" / f"{name}.png", GREY)
    rows = [
        ("a", "Mass", "R1", 10, 10, 20, 20),
        ("a", "Mass", "R2", 12, 10, 22, 20),
        ("a", "Mass", "R3", 40, 10, 50, 20),
        ("a", "Nodule", "R1", 10, 10, 20, 20),
        ("b", "No finding", "R1", "", "", "", ""),
    ]
    for given in (rows, rows[::-1]):
        (a, b), classes = read_boxes(write_table(tmp_path / "train.csv", given), tmp_path / "train")
        assert classes == ["Mass", "Nodule"]
        assert a.boxes.tolist() == [[11, 10, 21, 20], [40, 10, 50, 20], [10, 10, 20, 20]]
        assert a.labels.tolist() == [1, 1, 2]
        assert (b.name, len(b.boxes)) == ("b", 0)
    two = np.array([[0, 0, 10, 10], [1, 0, 11, 10]])  # overlap by 90 / 110; those of one reader stay apart
    by = ((["R1", "R1"], 0.5), (["R1", "R2"], 0.5), (["R1", "R2"], 0.9))
    assert [len(fuse(two, who, iou)) for who, iou in by] == [2, 1, 2]


def test_dicom_images_are_read_as_they_are_shown_and_as_png_would_be(tmp_path):
    data = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))  # 128 x 128
    data.save_as(tmp_path / "a.dicom")
    stored = data.pixel_array.astype(int)
    Image.fromarray((stored - stored.min()).astype(np.uint16)).save(tmp_path / "c.png")
    data.PhotometricInterpretation, data.Modality = "MONOCHROME1", "DX"  # a radiograph
    del data.ImagePositionPatient, data.ImageOrientationPatient
    data.PixelData = (stored.max() + stored.min() - stored).astype(np.int16).tobytes()
    data.save_as(tmp_path / "b.dcm")
    rows = [(name, "Mass", "R1", 6, 4, 60, 40) for name in "abc"]
    images, _ = read_boxes(write_table(tmp_path / "t.csv", rows), tmp_path)
    files = detect.prepare(images, config(tmp_path))
    pixels = [np.load(files[name]).astype(np.float32) for name in "abc"]
    assert pixels[0].shape == (64, 64)
    assert (pixels[0].min(), pixels[0].max()) == pytest.approx((0, 1), abs=0.02)
    np.testing.assert_allclose(pixels[0], pixels[1], atol=2e-3)
    np.testing.assert_allclose(pixels[0], pixels[2], atol=2e-3)


# --- what is refused ---


def one_image(path: Path) -> dict[str, Any]:
    save(path / "a.png", GREY)
    mark = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}
    images, categories = [{"id": 1, "file_name": "a.png"}], [{"id": 1, "name": "x"}]
    return {"images": images, "annotations": [mark], "categories": categories}


BAD = [
    ("annotations", {"bbox": [55, 30, 20, 5]}, r"annotation 5: box \[55.0, .*leaves the image of 60 x 40"),
    ("annotations", {"bbox": [5, 5, float("nan"), 9]}, "box .* has no class or area"),
    ("annotations", {"bbox": [5, 5]}, r"annotation 5 is not as in COCO .* bbox \[x, y, width, height\]"),
    ("images", {"width": 600, "height": 400}, "made for 600 x 400"),
    ("images", {"file_name": "boxes.json"}, "cannot be read as an image"),
    ("images", {"file_name": "../a.png"}, r"file_name \.\./a\.png leads out of data_path"),
]


@pytest.mark.parametrize(("part", "changes", "says"), BAD)
def test_a_bad_coco_file_is_named_with_its_remedy(part, changes, says, tmp_path):
    content = one_image(tmp_path)
    content[part][0].update(changes)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        read_boxes(tmp_path / "boxes.json", tmp_path)


def test_every_bad_row_of_a_table_is_named_with_its_remedy(tmp_path):
    rows = {
        ("a", "Mass", "R1", 10, 10, 90, 20): r"line 2: box .*\(Mass\) of a .* leaves the image of 60 x 40",
        ("b", "Mass", "R1", 10, 10, 20, 20): "line 3: image_id b has no image below",
        ("a", "", "R1", 10, 10, 20, 20): r"line 4: box .* \(no class\)",
        ("c", "Mass", "R1", 10, 10, 20, 20): r"line 5: image_id c has 2 files: .*c\.png",
    }
    for name in ("a.png", "c.png", "c.tif"):
        save(tmp_path / name, GREY)
    with pytest.raises(UserError) as refused:
        read_boxes(write_table(tmp_path / "train.csv", list(rows)), tmp_path)
    for says in rows.values():
        assert re.search(says, str(refused.value))


def test_parts_without_boxes_and_unreadable_pixels_stop_before_training(tmp_path):
    content = one_image(tmp_path)
    content["images"] = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("abc", start=1)]
    for name in "bc":
        save(tmp_path / f"{name}.png", GREY)
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "validation": ["b"], "test": ["c"]}))
    cfg = config(tmp_path, split=str(tmp_path / "split.json"), dump_path=str(tmp_path / "run"))
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="spot not in"):
        detect.check(replace(cfg, classes=["spot"]))
    with pytest.raises(UserError, match="validation: none of its 1 images has a box"):
        run(cfg)
    marks = [{"image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in (1, 2, 3)]
    (tmp_path / "boxes.json").write_text(json.dumps(content | {"annotations": marks}))
    Image.fromarray(np.full((40, 60), 7, dtype=np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:-900])
    with pytest.raises(UserError, match=r"(?s)2 problems.*b\.png: is constant.*c\.png: broken image data"):
        run(cfg)


# --- how it is scored ---


A, B = (10.0, 10.0, 20.0, 20.0), (40.0, 10.0, 60.0, 30.0)
MOST = (10.0, 10.0, 20.0, 16.2)  # of A: 6.2 / 10, so COCO's thresholds 0.50, 0.55 and 0.60 are met
NAN = math.nan
SCORED = {  # found, best first, and marked: (label, box), of a crowd with a minus
    "no boxes": ([], [(1, A), (1, B)], {"map": 0, "map_x": 0, "ap50_x": 0, "ap50_y": NAN}),
    "an IoU of 0.62 counts at 3 of 10 thresholds": ([(1, MOST)], [(1, A)], {"map": 0.3, "ap50": 1}),
    "a better scored false box halves precision": ([(1, B), (1, A)], [(1, A)], {"ap50": 0.5}),
    "a wrong class": ([(1, A), (3, B)], [(1, A), (2, B)], {"ap50_x": 1, "ap50_y": 0, "ap50_z": NAN, "ap50": 0.5}),
    "a crowd is no miss": ([(1, A)], [(1, A), (-1, B)], {"ap50": 1}),
}


@pytest.mark.parametrize("case", SCORED)
def test_scores_by_hand(case):
    found, marked, expected = SCORED[case]
    own = {
        "boxes": torch.tensor([box for _, box in found]).reshape(-1, 4),
        "labels": torch.tensor([label for label, _ in found], dtype=torch.long),
        "scores": torch.linspace(0.9, 0.1, len(found)),
    }
    labels, boxes = np.array([label for label, _ in marked]), np.array([box for _, box in marked], np.float32)
    scores = score([own], [Annotated("a", Path(), "a", 80, 80, boxes, abs(labels), labels < 0)], ["x", "y", "z"])
    assert {name: scores[name] for name in expected} == pytest.approx(expected, nan_ok=True)


# --- the network ---


@torch.no_grad()
@pytest.mark.parametrize(("name", "first"), [("fasterrcnn", 0), ("retinanet", 1)])
def test_the_body_gives_the_encoders_maps_of_a_grey_image_and_heads_depend_on_the_seed(name, first, joint, tmp_path):
    encoder, path = joint
    model = build_model(config(tmp_path, weights=path, model=name, arch=None), 2).eval()
    random, other = (build_model(config(tmp_path, model=name, seed=seed), 2) for seed in (0, 1))
    heads = [next(p for n, p in one.named_parameters() if "head" in n and p.ndim > 1) for one in (model, random, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert isinstance(model.backbone.body.bn1, FrozenBatchNorm2d)  # norm auto
    assert isinstance(random.backbone.body.bn1, nn.BatchNorm2d)
    image = torch.rand(1, 64, 64)
    normalised = model.transform([image])[0].tensors
    torch.testing.assert_close(normalised[0], (image - GREY_MEAN) / GREY_STD)
    expected = encoder.resnet(image[None])[first:]
    for stage, got in zip(expected, model.backbone.body(normalised).values(), strict=True):
        torch.testing.assert_close(got, stage, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "norm", "trained"),
    [(5, True, "conv1 layer1 layer2 layer3 layer4"), (2, False, "layer3 layer4"), (0, True, "")],
)
def test_frozen_layers_and_frozen_norm(joint, layers, norm, trained):
    encoder = copy.deepcopy(joint[0].encoder)
    freeze(encoder, layers, norm)
    assert {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad} == set(trained.split())
    assert isinstance(encoder.bn1, FrozenBatchNorm2d)
    assert torch.equal(encoder.layer1[0].bn1.running_mean, joint[0].encoder.layer1[0].bn1.running_mean)
    assert isinstance(encoder.layer4[0].bn1, FrozenBatchNorm2d) == norm


def test_a_pass_shows_every_image_once_and_mirrors_and_scales_boxes_without_crowds(tmp_path):
    cfg = config(tmp_path, image_size=30, batch_size=2, steps_per_epoch=5)
    detection = Detection.__new__(Detection)
    Task.__init__(detection, cfg, torch.device("cpu"))
    marks = np.array([[4, 4, 20, 40], [0, 0, 60, 40]], dtype=np.float32), np.array([1, 2]), np.array([False, True])
    detection.images = {str(i): Annotated(str(i), tmp_path, str(i), 40, 60, *marks) for i in range(5)}
    detection.files = {name: tmp_path / f"{name}.npy" for name in detection.images}
    detection.split, detection.labelled = Split([], [], []), list(detection.images)
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", np.full((20, 30), i / 10, dtype=np.float16))

    def drawn(epoch: int) -> list[tuple[float, str]]:
        steps = [zip(*detection.batch(epoch, step), strict=True) for step in reversed(range(5))][::-1]
        return [(round(float(image.mean()), 2), str(own["boxes"].tolist())) for step in steps for image, own in step]

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert sorted(image for image, _ in first[:5]) == sorted(image for image, _ in first[5:]) == [0, 0.1, 0.2, 0.3, 0.4]
    assert {boxes for _, boxes in first} == {"[[2.0, 2.0, 10.0, 20.0]]", "[[20.0, 2.0, 28.0, 20.0]]"}


# --- all of it ---


@pytest.mark.slow
def test_faster_rcnn_learns_discs_and_frames_in_40_steps(coco, tmp_path):
    """AP50 untrained: 0.00; after 40 steps 0.92 with this seed, 0.71 with the next."""
    given = {"pyramid_channels": 128, "fractions": [0.6, 0.1, 0.3], "cache_path": str(tmp_path), "base_lr": 5e-4}
    result = run(config(coco, **given, epochs=2, steps_per_epoch=20, dump_path=str(tmp_path / "run")))
    assert result["metrics"]["ap50"] > 0.3
    assert set(result["metrics"]) == {"map", "ap50", "map_disc", "ap50_disc", "map_frame", "ap50_frame"}
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert result["images"] == len(split["test"]) == 18
    boxes, cases = (pd.read_csv(tmp_path / "run" / f"{name}.csv") for name in ("predictions", "cases"))
    assert set(boxes.image_id) <= set(split["test"])
    assert set(boxes.class_name) == {"disc", "frame"}
    assert cases.found.sum() == len(boxes)


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(coco, tmp_path, joint):
    given = {"labelled": 4, "epochs": 1, "steps_per_epoch": 3, "batch_size": 2, "model": "retinanet", "arch": None}
    given |= {"weights": joint[1], "fractions": [0.9, 0.05, 0.05], "cache_path": str(tmp_path)}
    stopped, whole = (config(coco, **given, dump_path=str(tmp_path / one)) for one in ("stopped", "whole"))
    with pytest.raises(SystemExit):
        task.run(stopping(Detection, "batch", 2), stopped)
    first, second = run(stopped), run(whole)
    assert first["history"] == second["history"]
    assert len(first["labelled"]) == 4
    for file in ("best.pth", "predictions.csv"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
