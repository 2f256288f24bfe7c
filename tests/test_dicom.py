"""DICOM: what is a series, in which order, with which intensities; nobody is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import Dataset
from scans import AXIAL, affine_of, convert, dicom_slice, load, located, refused, settings, stored, write_series

from conversion.table import read_table
from datasets.index import scan

SLANTS = [((1 - sine**2) ** 0.5, sine) for sine in (0.249999, 0.250001)]
SHIPPED = Path(pydicom.__file__).parent / "data/test_files"


def test_a_series_is_ordered_by_position_and_names_nobody(tmp_path):
    write_series(tmp_path / "in/scan")
    write_series(tmp_path / "in/again", SeriesInstanceUID="9.9")
    dest = convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(load(dest, "scan.npy"), AXIAL)
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
    assert settings(dest)["modality"] == "CT"
    one, other = read_table(dest).values()
    assert one.patient == other.patient != ""
    for file in dest.rglob("*"):
        if file.is_file():
            assert b"secret" not in file.read_bytes().lower(), file
            assert "secret" not in file.name.lower()


@pytest.mark.parametrize("codes", ["IPL", "ILP", "SAL"])
def test_a_series_may_be_acquired_in_any_plane(codes, tmp_path):
    array, affine = stored(codes)  # rows, columns, slices
    steps = (np.diag([-1, -1, 1]) @ affine[:3, :3]).T  # mm to the left, back and head
    mm = np.linalg.norm(steps, axis=1)
    (tmp_path / "scan").mkdir()
    for k in range(array.shape[2]):
        data = dicom_slice(
            array[:, :, k],
            ImagePositionPatient=(steps[2] * k + affine[:3, 3] * [-1, -1, 1]).tolist(),
            ImageOrientationPatient=[*steps[1] / mm[1], *steps[0] / mm[0]],
            PixelSpacing=mm[:2].tolist(),
        )
        data.save_as(tmp_path / f"scan/{k}", enforce_file_format=True)
    dest = convert(tmp_path / "scan", tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
    np.testing.assert_allclose(located(AXIAL, affine_of(dest), 77), located(array, affine, 77))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"RescaleSlope": 1, "RescaleIntercept": -1000}, AXIAL - 1000),
        # PET has a scale in every slice
        ({"Modality": "PT", "RescaleSlope": lambda k: k + 0.5, "RescaleIntercept": 0}, AXIAL * (np.arange(9) + 0.5)),
        # on both sides of where rounding to one digit changes
        ({"ImageOrientationPatient": lambda k: [1, 0, 0, 0, *SLANTS[k % 2]]}, AXIAL),
    ],
)
def test_every_slice_may_have_its_own_scale_and_rounding_of_directions(fields, expected, tmp_path):
    write_series(tmp_path / "both", lambda k: f"{k}", **fields)
    write_series(tmp_path / "both", lambda k: f"1{k}", SeriesInstanceUID="9.9")
    dest = convert(tmp_path / "both", tmp_path / "out")
    found = [np.load(file) for file in dest.glob("both_*.npy")]
    assert len(found) == 2
    assert any(np.array_equal(array, expected) for array in found)


def test_missing_slices_are_noticed_copies_count_once_and_several_at_a_position_are_channels(tmp_path, capsys):
    folder = write_series(tmp_path / "scan", lambda k: f"{k}.dcm")
    (folder / "4.dcm").rename(tmp_path / "4.dcm")
    expected = "2.00 to 4.00 mm apart (usually 2.00); the largest departure is between 3.dcm and 5.dcm"
    assert expected in refused(capsys, folder, tmp_path / "gap")
    assert load(convert(folder, tmp_path / "gap", allow_gaps=True)).shape[2] == 8
    for name in ("4.dcm", "copy.dcm"):
        shutil.copy(tmp_path / "4.dcm", folder / name)
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL)
    (folder / "copy.dcm").unlink()
    write_series(folder, lambda k: f"+{k}.dcm", AcquisitionNumber=2, RescaleIntercept=5, RescaleSlope=1)
    assert "is 4D (12 x 10 x 9 x 2)" in refused(capsys, folder, tmp_path / "4d")
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "4d", channel=1)), AXIAL + 5)
    both = load(convert(folder, tmp_path / "all", channel="all"))
    np.testing.assert_array_equal(both, np.stack([AXIAL, AXIAL + 5], axis=3))


def test_series_that_cannot_be_used_are_told_and_a_damaged_slice_is_left_out(tmp_path, capsys):
    write_series(tmp_path / "in/nowhere", SeriesInstanceUID="1.1", ImagePositionPatient=None)
    write_series(tmp_path / "in/mixed", SeriesInstanceUID="1.2", PixelSpacing=lambda k: [0.5 + k // 4, 1])
    first = write_series(tmp_path / "in/damaged", SeriesInstanceUID="1.3") / "000.dcm"
    first.write_bytes(first.read_bytes().replace(b"0\\0.0\\0.0\\0.0", b"0\\0.0\\0.0\\?.0"))
    said = refused(capsys, tmp_path / "in", tmp_path / "out")
    for message in ("has no ImagePositionPatient", "several pixel spacings", "000.dcm: has a damaged DICOM header"):
        assert message in said
    np.testing.assert_array_equal(load(tmp_path / "out"), AXIAL[:, :, 1:])


def test_a_multi_frame_file_is_a_series_in_itself(tmp_path):
    def group(**fields: Any) -> Dataset:
        item = Dataset()
        for name, value in fields.items():
            setattr(item, name, value)
        return item

    order = [3, 0, 8, 1, 7, 2, 6, 4, 5]
    data = dicom_slice(AXIAL.transpose(2, 0, 1)[order], NumberOfFrames=9)
    data.SharedFunctionalGroupsSequence = [
        group(
            PixelMeasuresSequence=[group(PixelSpacing=[0.75, 0.5], SliceThickness=2)],
            PlaneOrientationSequence=[group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelValueTransformationSequence=[group(RescaleSlope=1, RescaleIntercept=-10)],
        )
    ]
    data.PerFrameFunctionalGroupsSequence = [
        group(PlanePositionSequence=[group(ImagePositionPatient=[0, 0, 2.0 * k])]) for k in order
    ]
    data.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(load(convert(tmp_path / "enhanced.dcm", tmp_path / "out")), AXIAL - 10)


def compress(file: Path, scratch: Path) -> None:
    """As lossless JPEG, process 14, which pydicom cannot decode."""
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.SetFileName(str(scratch))
    data = pydicom.dcmread(file)
    writer.Execute(sitk.GetImageFromArray(data.pixel_array[None]))
    compressed = pydicom.dcmread(scratch)
    data.PixelData, data["PixelData"].VR = compressed.PixelData, "OB"
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
    assert "JPEG Lossless" in data.file_meta.TransferSyntaxUID.name
    data.save_as(file)


@pytest.mark.parametrize("polarity", ["MONOCHROME1", "MONOCHROME2"])
def test_whoever_decodes_rescales_once_and_inverts_radiographs_once(polarity, tmp_path):
    folder = write_series(
        tmp_path / "scan", Modality="MR", RescaleSlope=2, RescaleIntercept=1, PhotometricInterpretation=polarity
    )
    pixels = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 20
    (tmp_path / "films").mkdir()
    for name in ("plain", "compressed"):
        film = dicom_slice(pixels, Modality="DX", PhotometricInterpretation=polarity)
        film.save_as(tmp_path / f"films/{name}.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "plain")), AXIAL * 2 + 1)
    for file in [*folder.iterdir(), tmp_path / "films/compressed.dcm"]:
        compress(file, tmp_path / "scratch.dcm")
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL * 2 + 1)
    dest = convert(tmp_path / "films", tmp_path / "tree/films")
    expected = pixels if polarity == "MONOCHROME2" else pixels.max() - pixels  # dark where it is shown dark
    for name in ("plain", "compressed"):
        np.testing.assert_array_equal(np.asarray(Image.open(dest / f"{name}.png")), expected)
    assert {s.kind for s in scan(tmp_path / "tree")[0]} == {"image"}


def test_a_real_series_lies_where_simpleitk_puts_it(tmp_path):
    folder = SHIPPED / "dicomdirtests/98892001/CT5N"
    dest = convert(folder, tmp_path / "out")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = sitk.DICOMOrient(reader.Execute(), "LPS")
    np.testing.assert_array_equal(load(dest), sitk.GetArrayFromImage(image).transpose(1, 2, 0))
    corner = nibabel.affines.apply_affine(affine_of(dest), [3, 2, 1])
    np.testing.assert_allclose(corner * [-1, -1, 1], image.TransformIndexToPhysicalPoint((2, 3, 1)), rtol=1e-5)
