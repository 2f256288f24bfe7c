"""Label maps that come as DICOM: on the voxels they were drawn on, with one value for a name in all cases."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from scans import AXIAL, at, convert, dicom_slice, enhanced, item, load, refused, settings, write_series

from conversion.table import read_table

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
    ("label", "said"),
    [
        (segmentation({"a": TUMOUR}, shift=0.2), "lies on another grid"),
        (segmentation({"a": TUMOUR}, shift=20), "does not lie on the image"),
        (segmentation({"a": TUMOUR}, uid="9.9"), "is a segmentation of a series that is not there"),
        (structure_set(shift=1.0), "contours that do not lie in the slices"),
        (structure_set(shift=100.0), "does not lie on the image"),
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
