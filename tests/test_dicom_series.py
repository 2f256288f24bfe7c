"""DICOM series that are not one slice after the other: mosaics, channels, damaged UIDs, gamma cameras, films."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel.nicom.dicomwrappers import wrapper_from_data
from PIL import Image
from scans import AXIAL, affine_of, at, convert, dicom_slice, enhanced, item, load, refused, write_series

from conversion.dicom import read_dicom_image
from conversion.table import read_table
from conversion.volume import BadFile
from utils.errors import UserError

SIEMENS = Path(nibabel.__file__).parent / "nicom/tests/data"
SHIPPED = Path(pydicom.__file__).parent / "data/test_files"
DEEP = AXIAL.transpose(2, 0, 1)  # slices, rows, columns


def volumes(dest: Path) -> dict[str, np.ndarray]:
    return {file.stem: np.load(file) for file in dest.glob("*.npy")}


def test_siemens_mosaics_lie_where_nibabel_puts_them_and_b_values_are_channels(tmp_path, capsys):
    both = []
    for b in (1000, 0):
        with gzip.open(SIEMENS / f"siemens_dwi_{b}.dcm.gz") as file:
            data = pydicom.dcmread(file)
        data.SeriesInstanceUID = "1.2"
        data.PixelData = np.random.default_rng(b).permutation(896 * 896 // 4).repeat(4).astype("<u2").tobytes()
        with gzip.open(tmp_path / f"{b}.dcm.gz", "wb") as file:
            data.save_as(file)
        both.append(wrapper_from_data(data))
    dest = convert(list(tmp_path.glob("*.gz")), tmp_path / "out", channel="all", workers=1)
    found, (weighted, plain) = load(dest), both
    assert found.shape == (128, 128, 48, 2)
    corner, there = np.linalg.inv(affine_of(dest)), np.diag([-1, -1, 1, 1])
    for k, wrapper in enumerate((plain, weighted)):
        expected = wrapper.get_data()
        for voxel in ((3, 5, 7), (100, 20, 40)):
            index = corner @ there @ wrapper.affine @ [*voxel, 1]
            np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
            assert found[(*np.rint(index[:3]).astype(int), k)] == expected[voxel]
    data = pydicom.dcmread(SIEMENS / "0.dcm")
    data.save_as(tmp_path / "cut.dcm")
    assert "is a Siemens mosaic whose header" in refused(capsys, tmp_path / "cut.dcm", tmp_path / "no")


def two(folder: Path, first: dict[str, Any], second: dict[str, Any], **both: Any) -> Path:
    """AXIAL and, of odd numbers, AXIAL + 2000, in one folder; numbers in the order of slices, then of volumes."""
    for k, fields in enumerate((first, second)):
        write_series(
            folder,
            lambda z, k=k: f"{k}{(z * 5) % 9}.dcm",
            **{
                "PixelData": lambda z, k=k: np.ascontiguousarray(AXIAL[:, :, z] + 2000 * k).tobytes(),
                "InstanceNumber": lambda z, k=k: 9 * k + z + 1,
                "Modality": "MR",
                **both,
                **fields,
            },
        )
    return folder


JITTER = {"ImagePositionPatient": lambda z: [0, 0, 2.0 * z + 0.006]}  # across where rounding to 0.01 changes
B = ({"DiffusionBValue": 0.0}, {"DiffusionBValue": 1000.0})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (*[{}] * 2,),
        ({}, JITTER),
        (JITTER, {}),
        # numbers of acquisitions that vary within a volume, as of interleaved ones
        ({"AcquisitionNumber": lambda z: 1 + z % 2, **B[0]}, {"AcquisitionNumber": lambda z: 2 - z % 2, **B[1]}),
        ({"AcquisitionNumber": lambda z: 1 + 2 * (z > 6)}, {"AcquisitionNumber": 2}),
        ({"InstanceNumber": lambda z: 2 * z, "EchoTime": 10}, {"InstanceNumber": lambda z: 2 * z + 1, "EchoTime": 20}),
        ({"InstanceNumber": None, "AcquisitionTime": "10"}, {"InstanceNumber": None, "AcquisitionTime": "11"}),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}),
    ],
)
def test_channels_are_made_of_what_is_one_for_each(first, second, tmp_path):
    folder = two(tmp_path / "scan", first, second)
    both = load(convert(folder, tmp_path / "out", channel="all"))
    np.testing.assert_array_equal(both, np.stack([AXIAL, AXIAL + 2000], axis=3))
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "one", channel=1)), AXIAL + 2000)


def test_time_points_at_other_positions_are_channels_or_told(tmp_path, capsys):
    for mm, axis in ((0.5, 2), (0.2, 0), (0.5, 0), (7, 2)):
        by = np.eye(3)[axis] * mm
        moved = {"ImagePositionPatient": lambda z, by=by: [by[0], by[1], by[2] + 2.0 * z]}
        for tell in ({}, {"TemporalPositionIdentifier": 2}):
            name = f"{mm}{axis}{len(tell)}"
            folder = two(tmp_path / name, {"TemporalPositionIdentifier": 1} if tell else {}, moved | tell)
            np.testing.assert_array_equal(load(convert(folder, tmp_path / "1" / name, channel=1)), AXIAL + 2000)
            assert affine_of(tmp_path / "1" / name)[axis, 3] == pytest.approx(mm * (-1 if axis < 2 else 1))
            if mm < 1 and not (mm == 0.5 and axis == 0):
                assert load(convert(folder, tmp_path / "all" / name, channel="all")).shape[3] == 2
            else:
                said = refused(capsys, folder, tmp_path / "no", channel="all")
                assert "shifted against each other" in said
                assert "--channel 0 to 1" in said


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            {"EchoTime": lambda z: 10 + 10 * (z > 4)},
            {"EchoTime": 20},
            "EchoTime differs within one volume (10.0 and 20.0",
        ),
        (
            {"DiffusionBValue": lambda z: 500.0 * (z % 2)},
            {"DiffusionBValue": 500.0},
            "b-value differs within one volume",
        ),
        ({"ImageType": lambda z: ["A", "B", "MP"[z % 2]]}, {"ImageType": ["A", "B", "M"]}, "ImageType differs"),
        ({"InstanceNumber": None}, {"InstanceNumber": None}, "no header tells the slices at one position apart"),
    ],
)
def test_mixed_channels_are_refused(first, second, said, tmp_path, capsys):
    assert said in refused(capsys, two(tmp_path / "scan", first, second), tmp_path / "out", channel=0)


def test_surplus_slices_are_named_unless_they_are_copies(tmp_path, capsys):
    folder = write_series(tmp_path / "scan", lambda k: f"{k}.dcm", InstanceNumber=lambda k: k + 1)
    data = pydicom.dcmread(folder / "4.dcm")
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.5"
    data.save_as(folder / "again.dcm")
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL)
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(folder / "again.dcm")
    assert "the first of them 2 (4.dcm, again.dcm)" in refused(capsys, folder, tmp_path / "no")


SAME = {"SeriesInstanceUID": "1.2", "SOPInstanceUID": "1.2.3", "StudyInstanceUID": "1.4", "PatientID": "same"}
NUMBERED = {"InstanceNumber": lambda z: z + 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"SeriesInstanceUID": None}, {"SeriesInstanceUID": None}),
        ({"PatientID": "A"}, {"PatientID": "B"}),
        ({"StudyInstanceUID": "1.4"}, {"StudyInstanceUID": "1.5"}),
        ({"SOPInstanceUID": "1"}, {"SOPInstanceUID": "1"}),
        (NUMBERED, NUMBERED),
        (SAME, SAME),
        (SAME | NUMBERED, SAME | NUMBERED),
        *[({"SeriesInstanceUID": lambda z, n=n: f"9.{n}{z}"} | NUMBERED,) * 2 for n in (1, 2)],
    ],
)
def test_two_patients_in_two_folders_stay_two_whatever_an_anonymiser_did(first, second, tmp_path):
    pixels = {"PixelData": lambda z: np.ascontiguousarray(AXIAL[:, :, z] + 7).tobytes()}
    write_series(tmp_path / "in/a/scan", **first)
    write_series(tmp_path / "in/b/scan", **pixels | second)
    found = sorted(volumes(convert(tmp_path / "in", tmp_path / "out")).values(), key=np.min)
    assert len(found) == 2
    for array, expected in zip(found, (AXIAL, AXIAL + 7), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_series_may_be_spread_over_folders_and_copied(tmp_path):
    folder = write_series(tmp_path / "in/a", lambda k: f"{k}.dcm", **NUMBERED)
    (tmp_path / "in/b").mkdir()
    for k in range(5):
        (folder / f"{k}.dcm").rename(tmp_path / f"in/b/{k}.dcm")
    shutil.copytree(tmp_path / "in/b", tmp_path / "in/copy")
    np.testing.assert_array_equal(load(convert(tmp_path / "in", tmp_path / "out")), AXIAL)


def test_scouts_of_a_series_each_stay_apart(tmp_path):
    write_series(tmp_path / "in", SeriesInstanceUID=lambda k: f"1.{k}", SeriesNumber=lambda k: k)
    assert len(volumes(convert(tmp_path / "in", tmp_path / "out"))) == 9


CAMERA = {"Modality": "NM", "ImageType": ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"], "PixelSpacing": [0.75, 0.5]}
PLACE = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}


def test_gamma_cameras_place_their_first_slice_and_number_the_others(tmp_path, capsys):
    order = [3, 0, 8, 1, 7, 2, 6, 4, 5]
    fields = CAMERA | {"SpacingBetweenSlices": 2.0, "DetectorInformationSequence": [item(**PLACE)]}
    path = tmp_path / "spect.dcm"
    vector = {"NumberOfFrames": 9, "SliceVector": [k + 1 for k in order]}
    dicom_slice(DEEP[order], **fields | vector).save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(load(convert(path, tmp_path / "out")), AXIAL)
    dicom_slice(DEEP[::-1], **fields | {"SpacingBetweenSlices": -2.0, "NumberOfFrames": 9}).save_as(path)
    dest = convert(path, tmp_path / "down")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert affine_of(dest)[2, 3] == -16
    gated = np.stack([DEEP, DEEP + 2000])
    slots = {"NumberOfFrames": 18, "SliceVector": [*range(1, 10)] * 2, "TimeSlotVector": [1] * 9 + [2] * 9}
    fields["ImageType"] = ["ORIGINAL", "PRIMARY", "RECON GATED TOMO", "EMISSION"]
    dicom_slice(gated.reshape(18, *DEEP.shape[1:]), **fields | slots).save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(load(convert(path, tmp_path / "gated", channel=1)), AXIAL + 2000)
    for kind, said in (("TOMO", "holds projections"), ("STATIC", None)):
        fields["ImageType"] = ["ORIGINAL", "PRIMARY", kind, "EMISSION"]
        dicom_slice(np.tile(DEEP, (1, 2, 2)), **fields | {"NumberOfFrames": 9}).save_as(path)
        if said:
            assert said in refused(capsys, path, tmp_path / "no")
        else:
            assert len(list(convert(path, tmp_path / "planar").glob("spect_00*.png"))) == 9


def test_a_tilted_gantry_is_told_and_kept_in_the_affine(tmp_path):
    folder = write_series(tmp_path / "scan", ImagePositionPatient=lambda k: [0, 0.5 * k, 2.0 * k])
    dest = convert(folder, tmp_path / "out")
    [case] = read_table(dest).values()
    assert "gantry tilt 14.0 degrees" in case.notes
    np.testing.assert_allclose(affine_of(dest) @ [1, 2, 8, 1], [-1, -0.75 - 4, 16, 1])


def test_a_multi_frame_file_lies_where_simpleitk_puts_it(tmp_path):
    frames = [at(3, 4, 5 + 2.0 * k) for k in range(9)]
    scale = {"PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": -9, "RescaleType": "HU"}}
    data = enhanced(DEEP, frames, scale, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "ct.dcm", tmp_path / "out")
    image = sitk.ReadImage(str(tmp_path / "ct.dcm"), imageIO="GDCMImageIO")
    np.testing.assert_array_equal(load(dest), sitk.GetArrayFromImage(image).transpose(1, 2, 0))
    place = affine_of(dest) @ [3, 2, 1, 1] * [-1, -1, 1, 1]
    np.testing.assert_allclose(place[:3], image.TransformIndexToPhysicalPoint((2, 3, 1)), rtol=1e-5)


def test_a_file_of_several_orientations_offers_a_choice(tmp_path, capsys):
    facings = [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]]
    frames = [
        at(0, 0, 2.0 * k) | {"PlaneOrientationSequence": {"ImageOrientationPatient": facings[0]}} for k in range(9)
    ] + [at(float(k), 0, 0) | {"PlaneOrientationSequence": {"ImageOrientationPatient": facings[1]}} for k in range(3)]
    path = tmp_path / "scout.dcm"
    enhanced(np.concatenate([DEEP, DEEP[:3]]), frames, {}).save_as(path, enforce_file_format=True)
    assert "9 axial, 3 sagittal" in refused(capsys, path, tmp_path / "no")
    np.testing.assert_array_equal(load(convert(path, tmp_path / "out", slice_axis="axial")), AXIAL)
    assert load(convert(path, tmp_path / "side", slice_axis="sagittal")).shape == (12, 10, 3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "is a screenshot or a report"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6", "Modality": "SM"}, "is a whole-slide image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "has no ImagePositionPatient"),
        (PLACE | {"PixelSpacing": [1, 1], "ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not two perpendicular"),
        (
            PLACE | {"PixelSpacing": [1, 1], "ImagePositionPatient": [0, 0, float("nan")]},
            "damaged ImagePositionPatient",
        ),
        ({"Modality": "US", "NumberOfFrames": -4}, "claims -4 frames"),
        ({"Modality": "US", "NumberOfFrames": 10**9}, "claims 1000000000 frames, more than it can hold"),
        ({"Modality": "NM", **PLACE, "NumberOfFrames": 10**9}, "claims 1000000000 frames, more than it can hold"),
        ({"Modality": "CT", "NumberOfFrames": 9, "PerFrameFunctionalGroupsSequence": [item()]}, "but describes 1"),
    ],
)
def test_what_is_no_slice_is_named_once(fields, said, tmp_path, capsys):
    dicom_slice(np.tile(AXIAL[:, :, 0], (2, 2)), **fields).save_as(tmp_path / "odd.dcm", enforce_file_format=True)
    message = refused(capsys, tmp_path / "odd.dcm", tmp_path / "out")
    assert said in message
    assert message.count("odd.dcm") == 1


def test_files_need_neither_preamble_nor_name_nor_metadata(tmp_path):
    for k in range(9):
        fields = PLACE | {"ImagePositionPatient": [0, 0, 2.0 * k], "PixelSpacing": [0.75, 0.5]}
        data = dicom_slice(AXIAL[:, :, k], **fields)
        (tmp_path / "in").mkdir(exist_ok=True)
        if k % 2:
            del data.file_meta
            pydicom.dcmwrite(tmp_path / f"in/1.2.{k}", data, implicit_vr=k % 4 == 1, little_endian=True)
        else:
            data.save_as(tmp_path / f"in/IM{k}", enforce_file_format=True)
    (tmp_path / "in/notes").write_bytes(b"\x08\0\0\0 no DICOM, though it begins as one" * 9)
    with pytest.raises(UserError, match="problems: 1"):
        convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(load(tmp_path / "out"), AXIAL)


def test_real_ultrasound_and_radiographs_are_pictures(tmp_path):
    for k, name in enumerate(("examples_rgb_color.dcm", "examples_palette.dcm", "examples_jpeg2k.dcm")):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(SHIPPED / name, tmp_path / f"in/{k}.dcm")
    sideways = enhanced(np.tile(DEEP, (1, 2, 2)), [{} for _ in range(9)], {}, Modality="XA")  # projections of a gantry
    sideways.save_as(tmp_path / "in/run.dcm", enforce_file_format=True)
    film = np.random.default_rng(0).integers(0, 255, (4, 20, 20), dtype=np.uint8)
    dicom_slice(film, Modality="XA", NumberOfFrames=4).save_as(tmp_path / "in/film.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "in", tmp_path / "out")
    names = {file.stem for file in dest.glob("*.png")} - {"montage"}
    assert names == {"0", "1", "2", *(f"film_00{k}" for k in range(4)), *(f"run_00{k}" for k in range(9))}
    with pytest.raises(BadFile, match="is a film of 4 frames"):
        read_dicom_image(tmp_path / "in/film.dcm")
    np.testing.assert_array_equal(np.asarray(Image.open(dest / "film_002.png")), film[2])
