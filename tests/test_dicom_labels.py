"""Label maps that come as DICOM: on the voxels they were drawn on, with one value for a name in all cases."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from scans import (
    AXIAL,
    LESION,
    at,
    convert,
    dicom_slice,
    enhanced,
    item,
    load,
    refused,
    settings,
    write_nifti,
    write_series,
)

from conversion.table import read_table
from utils.errors import UserError

TUMOUR, ORGAN = AXIAL > 900, (AXIAL > 500) & (AXIAL < 800)


def segmentation(parts: dict[str, np.ndarray], uid: str = "1.2.3", flip: int = 1, shift: float = 0.0) -> Dataset:
    """SEG whose frames hold what is not empty, from the last slice; flip: -1 stores columns the other way round."""
    frames, pixels = [], []
    for number, mask in enumerate(parts.values(), 1):
        for k in reversed(np.flatnonzero(mask.any((0, 1))).tolist()):
            place = at(0.5 * 9 * (flip < 0) + shift, 0, 2.0 * k)
            facing = {"PlaneOrientationSequence": {"ImageOrientationPatient": [flip, 0, 0, 0, 1, 0]}}
            frames.append(place | facing | {"SegmentIdentificationSequence": {"ReferencedSegmentNumber": number}})
            pixels.append(mask[:, ::flip, k])
    bits = np.packbits(np.ravel(pixels), bitorder="little").tobytes()
    data = enhanced(np.array(pixels, dtype=np.uint8), frames, {}, Modality="SEG", SegmentationType="BINARY")
    data.BitsAllocated = data.BitsStored = 1
    data.HighBit, data.PixelData = 0, bits + b"\0" * (len(bits) % 2)
    data.SegmentSequence = [item(SegmentNumber=n, SegmentLabel=name) for n, name in enumerate(parts, 1)]
    data.ReferencedSeriesSequence = [item(SeriesInstanceUID=uid)]
    return data


def structure_set(uid: str = "1.2.3", shift: float = 0.0) -> Dataset:
    """A frame two pixels wide, of an outer and an inner contour, and a box within it that it overlaps."""

    def box(low: float, high: float, k: int) -> Dataset:
        corners = [(low, low), (high, low), (high, high), (low, high)]  # of indices, at the borders of pixels
        points = [x for column, row in corners for x in (0.5 * (column - 0.5), 0.75 * (row - 0.5), 2.0 * k + shift)]
        return item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=points)

    data = dicom_slice(np.zeros((2, 2), np.uint8), Modality="RTSTRUCT", SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3")
    for name in ("PixelData", "Rows", "Columns", "BitsAllocated", "SeriesInstanceUID"):
        delattr(data, name)
    series = item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=uid)])
    data.ReferencedFrameOfReferenceSequence = [item(RTReferencedStudySequence=[series])]
    data.StructureSetROISequence = [item(ROINumber=4, ROIName="ring"), item(ROINumber=7, ROIName="box")]
    data.ROIContourSequence = [
        item(ReferencedROINumber=4, ContourSequence=[box(1, 9, 3), box(3, 7, 3), box(1, 9, 4)]),
        item(ReferencedROINumber=7, ContourSequence=[box(2, 4, 4)]),
    ]
    return data


def nameless() -> Dataset:
    data = segmentation({"a": TUMOUR})
    del data.SegmentSequence
    return data


@pytest.mark.parametrize("flip", [1, -1])
def test_segmentations_keep_their_names_values_and_places(flip, tmp_path):
    for case, uid, parts in (
        ("a", "1.1", {"tumour": TUMOUR, "organ": ORGAN}),
        ("b", "1.2", {"vessel": AXIAL < 99, "tumour": TUMOUR}),
    ):
        write_series(tmp_path / f"in/{case}", SeriesInstanceUID=uid, PatientID=case)
        (tmp_path / f"in/labels/{case}").mkdir(parents=True)
        segmentation(parts, uid, flip).save_as(tmp_path / f"in/labels/{case}/x.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "in", tmp_path / "out")
    assert settings(dest)["structures"] == {"organ": [1], "tumour": [2], "vessel": [3]}
    np.testing.assert_array_equal(load(dest, "labels/a.npy"), 2 * TUMOUR + 1 * ORGAN)
    np.testing.assert_array_equal(load(dest, "labels/b.npy"), 2 * TUMOUR + 3 * (AXIAL < 99))


def test_structure_sets_fill_the_pixels_whose_centres_are_inside(tmp_path, capsys):
    folder = write_series(tmp_path / "scan")
    structure_set().save_as(folder / "rtss", enforce_file_format=True)
    expected = np.zeros_like(AXIAL)
    expected[1:9, 1:9, 3:5] = 2
    expected[3:7, 3:7, 3] = 0
    expected[2:4, 2:4, 4] = 1  # the smaller one
    dest = convert(folder, tmp_path / "out")
    np.testing.assert_array_equal(load(dest, "labels/scan.npy"), expected)
    assert settings(dest)["structures"] == {"box": [1], "ring": [2]}
    assert "overlap in 4 voxels" in capsys.readouterr().out


def test_a_segmentation_of_a_uid_that_several_have_goes_to_its_patient_or_nowhere(tmp_path, capsys):
    for patient in "ab":
        write_series(tmp_path / f"in/{patient}/scan", PatientID=patient)
    label = segmentation({"tumour": TUMOUR})
    label.PatientID = "b"
    label.save_as(tmp_path / "in/label.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "in", tmp_path / "out")
    labelled = {case.source.split("/")[1] for case in read_table(dest).values() if case.label}
    assert labelled == {"b"}
    shutil.copytree(tmp_path / "in/b", tmp_path / "in/c")
    for file in (tmp_path / "in/c/scan").iterdir():
        data = pydicom.dcmread(file)
        data.PixelData = bytes(range(240))
        data.SOPInstanceUID = f"1.{file.stem}9"
        data.save_as(file)
    convert(tmp_path / "in", tmp_path / "more", on_error="skip")
    assert "whose UID several have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scan", "label", "patterns"),
    [
        ("images/case", "labels/case.nii.gz", {}),
        ("images/case", "labels/case_mask.nii", {}),
        ("case", "case/labels/case.nii", {}),
        ("case", "case_seg.nii", {"labels": "*_seg.nii"}),
        ("case", "case/case_seg[1].nii", {"labels": "*_seg[[]1].nii"}),
        ("images/case.dcm", "labels/case.nii", {}),
    ],
)
def test_series_have_label_maps_of_other_formats(scan, label, patterns, tmp_path, capsys):
    if scan.endswith(".dcm"):
        (tmp_path / "in/images").mkdir(parents=True)
        frames = [at(0, 0, 2.0 * k) for k in range(9)]
        enhanced(np.moveaxis(AXIAL, 2, 0), frames, {}).save_as(tmp_path / "in" / scan, enforce_file_format=True)
    else:
        write_series(tmp_path / "in" / scan)
        write_series(tmp_path / "in" / scan, "scout{}.dcm".format, SeriesInstanceUID="1.9", Rows=9, Columns=10)
        for file in list((tmp_path / "in" / scan).glob("scout[3-8].dcm")):
            file.unlink()
    write_nifti(tmp_path / "in" / label, LESION)
    write_nifti(tmp_path / "in/labels/none.nii", LESION)
    dest = convert(tmp_path / "in", tmp_path / "out", on_error="skip", **patterns)
    [labelled] = [case for case in read_table(dest).values() if case.label]
    np.testing.assert_array_equal(load(dest, labelled.label), AXIAL > 900)
    assert "label map stored" not in labelled.notes  # as it lies where the image lies
    assert "none.nii: is a label map without an image" in capsys.readouterr().err or patterns
    write_nifti(tmp_path / "in" / label, LESION, np.diag([-0.5, -0.75, 2, 1]) + np.eye(4, k=3) * 9)
    convert(tmp_path / "in", dest, on_error="skip", **patterns)
    assert "9 mm apart" in capsys.readouterr().out


def test_pictures_and_frames_have_masks(tmp_path, capsys):
    (tmp_path / "in/masks").mkdir(parents=True)
    film = np.moveaxis(AXIAL, 2, 0).astype(np.uint16)
    for name, fields in (("film", {"NumberOfFrames": 9}), ("one", {})):
        data = dicom_slice(film if fields else film[0], Modality="US", SeriesInstanceUID="1.7", **fields)
        data.save_as(tmp_path / f"in/{name}.dcm", enforce_file_format=True)
    for k, name in ((0, "one"), (4, "film_004")):
        Image.fromarray((AXIAL[:, :, k] > 900).astype(np.uint8)).save(tmp_path / f"in/masks/{name}.png")
    segmentation({"tumour": TUMOUR}, uid="1.7").save_as(tmp_path / "in/seg.dcm", enforce_file_format=True)
    dicom_slice(film[0]).save_as(tmp_path / "in/masks/mask.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "in", tmp_path / "out", on_error="skip")
    labels = {case.id: case.label for case in read_table(dest).values() if case.label}
    assert labels == {"one": "labels/one.png", "film_004": "labels/film_004.png"}
    said = capsys.readouterr().err
    assert "seg.dcm: is a segmentation of pictures" in said
    assert "masks: 1 DICOM files in the place of label maps are neither SEG nor RTSTRUCT" in said


@pytest.mark.parametrize(
    ("first", "then", "structures"),
    [  # names and values of a dataset.json, or names of a segmentation
        (("b",), ("a",), {"b": [1], "a": [2]}),
        (("b",), ("a", "b"), {"b": [1], "a": [2]}),
        ({"b": 1}, ("a", "b"), {"b": [1], "a": [2]}),
        ({"b": 1}, {"b": 1, "a": 2}, {"b": [1], "a": [2]}),
        (("b",), {"a": 2}, {"b": [1], "a": [2]}),
        (("b",), {"a": 1}, "[1] are 'b', in those to be added [1] are 'a'"),
        ({"b": 1}, {"b": 2}, "[1] are 'b', in those to be added [2] are 'b'"),
    ],
)
def test_values_keep_their_meaning_when_a_later_run_adds_cases(first, then, structures, tmp_path):
    for k, names in enumerate((first, then)):
        folder = write_series(tmp_path / f"{k}/scan{k}")
        if isinstance(names, dict):
            (tmp_path / f"{k}/dataset.json").write_text(json.dumps({"labels": names}))
            write_nifti(tmp_path / f"{k}/labels/scan{k}.nii", LESION)
        else:
            parts = {name: TUMOUR if name == "a" else ORGAN for name in names}
            segmentation(parts).save_as(folder / "seg.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "0", tmp_path / "out")
    if isinstance(structures, str):
        with pytest.raises(UserError, match=re.escape(structures)):
            convert(tmp_path / "1", dest)
        assert list(settings(dest)["structures"]) == ["b"]
        return
    before = (dest / "labels/scan0.npy").stat().st_mtime_ns
    for source in ("1", "0", "1"):
        convert(tmp_path / source, dest)
        assert settings(dest)["structures"] == structures
    assert (dest / "labels/scan0.npy").stat().st_mtime_ns == before
    if isinstance(then, tuple):
        np.testing.assert_array_equal(load(dest, "labels/scan1.npy") == structures["a"][0], TUMOUR)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (segmentation({"a": TUMOUR}, shift=0.2), "lies on another grid"),
        (segmentation({"a": TUMOUR}, shift=20), "does not lie on the image"),
        (segmentation({"a": TUMOUR}, uid="9.9"), "is a segmentation of a series that is not there"),
        (structure_set(shift=1.0), "contours that do not lie in the slices"),
        (structure_set(shift=100.0), "does not lie on the image"),
        (nameless(), "draws a structure, 1, that it does not name"),
    ],
)
def test_label_maps_that_do_not_belong_are_refused(label, said, tmp_path, capsys):
    folder = write_series(tmp_path / "scan")
    label.save_as(Path(folder) / "label.dcm", enforce_file_format=True)
    if "not there" in said:
        assert load(convert(folder, tmp_path / "out", on_error="skip")).shape == AXIAL.shape
        assert said in capsys.readouterr().err
    else:
        assert said in refused(capsys, folder, tmp_path / "out")
