"""prepare_data.py: every format gives the same volume, turned as radiologists view it; nothing is lost silently."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import yaml
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import prepare_data
from conversion import workers
from conversion.layouts import Source
from conversion.table import assign_ids, read_table
from conversion.volume import PLANES, Volume, arrange
from datasets.index import scan
from datasets.store import prepare
from prepare_data import Config
from utils.config import main as run_script
from utils.errors import UserError

SIDES = ("RL", "AP", "IS")
# The patient: x grows to the left, y to the back, z to the head, as in DICOM. Every voxel differs, no symmetry.
PATIENT = np.random.default_rng(0).permutation(10 * 12 * 9).reshape(10, 12, 9).astype(np.int16)
SPACING = {"L": 0.5, "P": 0.75, "S": 2.0}  # mm along the three axes of PATIENT
AXIAL = PATIENT.transpose(1, 0, 2)  # rows to the back, columns to the left, slices to the head
OTHER = dict(zip("RLAPSI", "LRPAIS", strict=True))
SLANTS = [((1 - sine**2) ** 0.5, sine) for sine in (0.249999, 0.250001)]
LESION = (PATIENT > 900).astype(np.uint8)
SHIPPED = Path(nibabel.__file__).parent / "tests/data", Path(pydicom.__file__).parent / "data/test_files"


def convert(source: Path | list[Path], dest: Path, **settings: Any) -> Path:
    places = [str(place) for place in source] if isinstance(source, list) else str(source)
    prepare_data.main(Config(source=places, dest=str(dest), **{"workers": 1, **settings}))
    return dest


def load(dest: Path, name: str | None = None) -> np.ndarray:
    [file] = [dest / name] if name else list(dest.glob("*.npy"))
    return np.load(file, allow_pickle=False)


def settings(dest: Path) -> dict[str, Any]:
    return yaml.safe_load((dest / "dataset.yaml").read_text())


def affine_of(dest: Path) -> np.ndarray:
    """Read as the docstring of conversion/convert.py tells."""
    with open(dest / "cases.csv", newline="") as file:
        [case] = csv.DictReader(file)
    return np.vstack([np.array(case["affine"].split(), float).reshape(3, 4), [0, 0, 0, 1]])


def refused(capsys: pytest.CaptureFixture, source: Path | list[Path], dest: Path, **settings: Any) -> str:
    """What is said of a source of which nothing can be converted."""
    with pytest.raises(UserError) as error:
        convert(source, dest, **settings)
    return capsys.readouterr().err + str(error.value)


def place(array: np.ndarray, affine: np.ndarray, value: int) -> np.ndarray:
    """Where in the world, in nibabel's millimetres, the voxel of this value lies."""
    return nibabel.affines.apply_affine(affine, np.argwhere(np.asarray(array) == value)[0])


def stored(codes: str, volume: np.ndarray = PATIENT) -> tuple[np.ndarray, np.ndarray]:
    """The patient in an array whose axes grow towards `codes`, and the NIfTI affine (to right, front, head)."""
    axes = ["LPS".index(c) if c in "LPS" else "LPS".index(OTHER[c]) for c in codes]
    array = volume.transpose(axes)
    array = array[tuple(slice(None, None, 1 if c in "LPS" else -1) for c in codes)]
    affine = np.zeros((4, 4))
    for i, (code, axis) in enumerate(zip(codes, axes, strict=True)):
        affine[axis, i] = SPACING["LPS"[axis]] * (1 if code in "RAS" else -1)
    affine[:, 3] = 30, -20, 7.5, 1
    return array, affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-0.5, -0.75, 2, 1]) if affine is None else affine), path)
    return path


def dicom_slice(pixels: np.ndarray, **fields: Any) -> Dataset:
    """A data set with one image of a patient called Secret."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = "1.2.3"
    data.PatientName, data.PatientID, data.PatientBirthDate = "Secret^Patient", "ID-SECRET", "19700101"
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CT", "MONOCHROME2", 1
    data.Rows, data.Columns = pixels.shape[-2:]
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    return data


def write_series(folder: Path, names: Callable[[int], str] = lambda k: f"{(k * 5) % 9:03d}.dcm", **fields: Any) -> Path:
    """PATIENT as axial DICOM slices whose file names say nothing about their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(PATIENT.shape[2]):
        usual = {
            "ImagePositionPatient": [0, 0, 2.0 * k],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.75, 0.5],
            "SliceThickness": 1,
        }
        own = {name: value(k) if callable(value) else value for name, value in fields.items()}
        dicom_slice(AXIAL[:, :, k], **{**usual, **own}).save_as(folder / names(k), enforce_file_format=True)
    return folder


# --- geometry


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL", "AIL"])
def test_however_a_nifti_is_stored_it_comes_out_alike_and_its_affine_tells_where_it_lay(codes, tmp_path):
    array, affine = stored(codes)
    dest = convert(write_nifti(tmp_path / "a.nii.gz", array, affine), tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert settings(dest)["orientation"] == "PLS"
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
    assert read_table(dest)[f"{tmp_path.name}/a.nii.gz"].original_orientation == codes
    image = nibabel.load(tmp_path / "a.nii.gz")
    for value in (0, 77, 1079):
        np.testing.assert_allclose(place(AXIAL, affine_of(dest), value), place(image.dataobj, image.affine, value))


def test_all_48_orientations_are_turned_alike_to_all_planes():
    for axes in itertools.permutations(SIDES):
        for codes in map("".join, itertools.product(*axes)):
            array, affine = stored(codes)
            affine = nibabel.affines.from_matvec(np.linalg.qr(np.eye(3) + 0.1)[0] * [-1, -1, -1]) @ affine  # oblique
            for plane, wanted in PLANES.items():
                view = arrange(Volume(array, affine, codes=codes), plane)
                np.testing.assert_array_equal(view.array, stored(wanted)[0])
                assert view.spacing_mm == pytest.approx([SPACING.get(c) or SPACING[OTHER[c]] for c in wanted])
                np.testing.assert_allclose(place(view.array, view.affine, 5), place(array, affine, 5))


def test_planes_are_what_radiologists_see(tmp_path):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    coronal = load(convert(file, tmp_path / "c", slice_axis="coronal"))
    np.testing.assert_array_equal(coronal[0, :, 3], PATIENT[:, 3, -1])  # head on top, the right side on the left
    sagittal = load(convert(file, tmp_path / "s", slice_axis="sagittal"))
    np.testing.assert_array_equal(sagittal[0, :, 3], PATIENT[3, :, -1])  # head on top, the front on the left


@pytest.mark.parametrize(("thick", "plane"), [("L", "sagittal"), ("P", "coronal"), ("S", "axial"), ("", "axial")])
def test_slices_lie_across_the_axis_of_thickest_spacing(thick, plane, tmp_path):
    affine = np.diag([-3.0 if c == thick else -1.0 for c in "LPS"] + [1.0])
    affine[2, 2] *= -1
    dest = convert(write_nifti(tmp_path / "a.nii", PATIENT, affine), tmp_path / "out")
    assert settings(dest)["plane"] == plane
    assert settings(dest)["spacing_mm"][2] == (3 if thick else 1)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd"])
def test_nrrd_and_metaimage_give_what_nifti_gives(name, tmp_path, capsys):
    array, affine = stored("PIR")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((np.diag([-1, -1, 1]) @ affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    sitk.WriteImage(image, str(tmp_path / name))
    dest = convert(tmp_path / name, tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    np.testing.assert_allclose(place(AXIAL, affine_of(dest), 77), place(array, affine, 77))
    assert "not converted" not in capsys.readouterr().out  # nor is the .raw of an .mhd a file of its own


def test_arrays_keep_their_order_and_their_slices_may_lie_along_any_axis(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.asfortranarray(PATIENT.astype(">i2")))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npy", tmp_path / "1")), PATIENT)
    moved = convert(tmp_path / "a.npy", tmp_path / "2", array_axis=0)
    np.testing.assert_array_equal(load(moved), PATIENT.transpose(1, 2, 0))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npy", tmp_path / "3", orientation="lps")), AXIAL)
    assert "needs --orientation" in refused(capsys, tmp_path / "a.npy", tmp_path / "4", slice_axis="axial")
    assert not (tmp_path / "4").exists()


def test_npz_and_hdf5_name_the_array_and_hdf5_may_hold_the_label_map_too(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", image=PATIENT, noise=np.zeros(3))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npz", tmp_path / "1")), PATIENT)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["group/image"], file["label"] = PATIENT, LESION.astype(np.int64)
    assert "group/image (10 x 12 x 9)" in refused(capsys, tmp_path / "b.h5", tmp_path / "2")
    dest = convert(tmp_path / "b.h5", tmp_path / "2", array_key="group/image", label_key="label")
    np.testing.assert_array_equal(load(dest), PATIENT)
    np.testing.assert_array_equal(load(dest / "labels"), LESION)
    assert load(dest / "labels").dtype == np.uint8


# --- intensities


@pytest.mark.parametrize(
    ("array", "slope", "intercept", "dtype"),
    [
        (PATIENT.astype(np.uint16), 1, -1024, np.int16),
        (PATIENT, 1, 0, np.int16),
        (PATIENT.astype(np.uint16) * 60, 1, 0, np.uint16),
        (PATIENT, 0.5, 3, np.float32),
        (PATIENT.astype(np.float64), 1, 0, np.float32),
        (PATIENT, 1000, 0, np.int32),
    ],
)
def test_whole_numbers_stay_whole_and_nothing_becomes_float64(array, slope, intercept, dtype, tmp_path):
    header = nibabel.Nifti1Image(array, np.diag([-0.5, -0.75, 2, 1])).header
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, intercept, 352  # as scanners' exports do
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + array.tobytes(order="F"))
    out = load(convert(tmp_path / "a.nii", tmp_path / "out"))
    assert out.dtype == dtype
    np.testing.assert_allclose(out, AXIAL * (array[0, 0, 0] / PATIENT[0, 0, 0]) * slope + intercept)


def test_resampling_keeps_a_linear_ramp_and_the_extent(tmp_path):
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None, None], (16, 12, 10))
    write_nifti(tmp_path / "a.nii", ramp, np.diag([-1, -1, 1, 1]))
    dest = convert(tmp_path / "a.nii", tmp_path / "out", spacing_mm=[1, 2, 0])
    out, affine = load(dest), affine_of(dest)  # rows to the back, columns to the left: the ramp runs along the columns
    assert out.shape == (12, 8, 10)
    np.testing.assert_allclose(out[5, 1:-1, 5], np.arange(2.5, 14, 2)[:6], atol=1e-5)
    assert settings(dest)["spacing_mm"] == [1, 2, 1]
    for corner, world in (([-0.5, -0.5, -0.5], [0.5, 0.5, -0.5]), ([11.5, 7.5, 9.5], [-15.5, -11.5, 9.5])):
        np.testing.assert_allclose(nibabel.affines.apply_affine(affine, corner), world)
    turned = write_nifti(tmp_path / "b.nii", ramp.transpose(1, 2, 0), np.diag([-1, -1, 1, 1]))
    out = load(convert(turned, tmp_path / "slices", spacing_mm=[0, 0, 2]))
    assert out.shape == (10, 12, 8)
    np.testing.assert_allclose(out[5, 5, 1:-1], np.arange(2.5, 14, 2)[:6], atol=1e-5)


def test_resampled_label_maps_hold_no_new_values_and_stay_on_their_image(tmp_path):
    blob = np.zeros((24, 20, 16), np.uint8)
    blob[4:14, 6:12, 5:11] = 4
    for folder, array in (("imagesTr", blob * 25.0 + 1), ("labelsTr", blob)):
        write_nifti(tmp_path / f"in/{folder}/a.nii.gz", array, np.diag([-1, -1, 1, 1]))
    dest = convert(tmp_path / "in", tmp_path / "out", spacing_mm=[0.7, 1.5, 0.5])
    image, label = load(dest), load(dest / "labels")
    assert set(np.unique(label)) == {0, 4}
    assert image.shape == label.shape
    assert 2 * ((image > 51) & (label > 0)).sum() / ((image > 51).sum() + (label > 0).sum()) > 0.97


# --- DICOM


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


@pytest.mark.parametrize("codes", ["IPL", "IPR", "ILP", "SAL", "PLI"])
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
    np.testing.assert_allclose(place(AXIAL, affine_of(dest), 77), place(array, affine, 77))


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
    (folder / "+3.dcm").unlink()
    assert "1 of 9 slice positions hold another number" in refused(capsys, folder, tmp_path / "odd", channel=1)


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


def test_compressed_slices_are_decoded_by_gdcm_where_pydicom_cannot(tmp_path):
    folder = write_series(tmp_path / "scan", Modality="MR", RescaleSlope=2, RescaleIntercept=1)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")  # lossless process 14
    writer.SetFileName(str(tmp_path / "compressed.dcm"))
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        writer.Execute(sitk.GetImageFromArray(data.pixel_array[None]))
        compressed = pydicom.dcmread(tmp_path / "compressed.dcm")
        data.PixelData, data["PixelData"].VR = compressed.PixelData, "OB"
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
        assert "JPEG Lossless" in data.file_meta.TransferSyntaxUID.name
        data.save_as(file)
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL * 2 + 1)


def test_radiographs_become_grey_images_dark_where_they_are_shown_dark(tmp_path):
    pixels = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 20
    (tmp_path / "in").mkdir()
    for name, interpretation in (("plain", "MONOCHROME2"), ("inverted", "MONOCHROME1")):
        data = dicom_slice(pixels, Modality="DX", PhotometricInterpretation=interpretation)
        data.save_as(tmp_path / f"in/{name}.dicom", enforce_file_format=True)
    dest = convert(tmp_path / "in", tmp_path / "tree/xray")
    np.testing.assert_array_equal(np.asarray(Image.open(dest / "plain.png")), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(dest / "inverted.png")), pixels.max() - pixels)
    assert {s.kind for s in scan(tmp_path / "tree")[0]} == {"image"}


# --- windows and modalities


def test_a_named_window_is_for_ct_and_training_applies_it(tmp_path, capsys):
    file, dest = write_nifti(tmp_path / "a.nii", *stored("RAS", PATIENT - 500)), tmp_path / "tree/ct"
    assert "only CT has, but there are 1 of modality unknown" in refused(capsys, file, dest, window="lung")
    assert "only CT has" in refused(capsys, file, dest, window="lung", modality="MRI")
    assert "-500 to 579, lie outside the window" in refused(capsys, file, dest, window=[-900.0, -600.0])
    convert(file, dest, window="brain", modality="CT")
    assert scan(tmp_path / "tree")[0][0].window == (0, 80)
    convert(file, dest, modality="CT")
    assert settings(dest)["window"] == [0, 80]
    convert(file, dest, modality="CT", window=[-200.0, 300.0])
    store = prepare(tmp_path / "tree", size=12, progress=False)
    shown = store.read(0, 0, store.samples[0].slices)[:, :, 1:11]
    np.testing.assert_allclose(shown, ((AXIAL - 500 + 200) / 500).clip(0, 1).transpose(2, 0, 1), atol=1e-3)
    convert(file, dest, modality="CT", window="none")
    assert "window" not in settings(dest)
    write_series(tmp_path / "in/ct")
    write_series(tmp_path / "in/mr", Modality="MR", SeriesInstanceUID="4.5")
    for window in ("lung", [0.0, 100.0]):
        assert "a data set of its own" in refused(capsys, tmp_path / "in", tmp_path / "out", window=window)


# --- label maps, channels, public data sets


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Two labelled images of two channels and a test image."""
    root = tmp_path / "Task99"
    for name, folder in (("a", "Tr"), ("b", "Tr"), ("c", "Ts")):
        array, affine = stored("LAS")
        write_nifti(root / f"images{folder}/{name}.nii.gz", np.stack([array, array + 7], axis=3), affine)
        if folder == "Tr":
            write_nifti(root / f"labels{folder}/{name}.nii.gz", *stored("RPS", LESION))
            (root / f"images{folder}/._{name}.nii.gz").write_bytes(b"left behind by macOS")
    description = {
        "name": "Example",
        "licence": "CC-BY",
        "modality": {"0": "FLAIR", "1": "MRI"},
        "labels": {"0": "background", "1": "lesion"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"],
        "test": ["./imagesTs/c.nii.gz"],
        "patient": {"a": "p1", "b": "p2"},
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_the_decathlon_layout_is_understood(decathlon, tmp_path, capsys):
    dest = convert(decathlon, tmp_path / "out", channel=1)
    assert sorted(f.name for f in dest.glob("*.npy")) == ["a.npy", "b.npy", "c.npy"]
    np.testing.assert_array_equal(load(dest, "a.npy"), AXIAL + 7)
    np.testing.assert_array_equal(load(dest, "labels/a.npy"), AXIAL > 900)
    assert not (dest / "labels/c.npy").exists()
    out = capsys.readouterr().out
    assert "no label map" not in out
    assert "a.nii.gz: label map stored as RPS, image as LAS: each turned" in out
    assert "does not name the patients of 1 cases, e.g. c" in out
    written = settings(dest)
    assert [written[key] for key in ("structures", "modality", "source")] == [{"lesion": [1]}, "MR", "Example; CC-BY"]
    assert [case.patient for case in read_table(dest).values()] == ["p1", "p2", ""]


def test_channels_that_dataset_json_names_are_kept_and_others_are_an_error(decathlon, tmp_path, capsys):
    dest = convert(decathlon, tmp_path / "out")
    np.testing.assert_array_equal(load(dest, "a.npy"), np.stack([AXIAL, AXIAL + 7], axis=3))
    assert load(dest, "labels/a.npy").shape == AXIAL.shape
    assert settings(dest)["channels"] == ["FLAIR", "MRI"]
    (decathlon / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}}))
    said = refused(capsys, decathlon, tmp_path / "series")
    assert "is 4D (10 x 12 x 9 x 2): 2 channels" in said
    assert "--channel 0 to --channel 1, or keep them together with --channel all" in said
    assert settings(convert(decathlon, tmp_path / "all", channel="all"))["channels"] == ["0", "1"]


def test_the_channels_of_nnunet_are_volumes_of_their_own_or_one_case(tmp_path, capsys):
    source = tmp_path / "in"
    for channel, shift in (("0000", 0), ("0001", 7)):
        write_nifti(source / f"imagesTr/a_{channel}.nii.gz", *stored("LAS", PATIENT + shift))
    write_nifti(source / "labelsTr/a.nii.gz", *stored("LAS", LESION))
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    (source / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}, "labels": labels}))
    table = read_table(convert(source, tmp_path / "out"))
    assert {case.id: case.modality for case in table.values()} == {"a_0000": "CT", "a_0001": "PT"}
    assert all(case.label for case in table.values())
    assert "--channel all keeps them together" in capsys.readouterr().out
    dest = convert(source, tmp_path / "all", channel="all", spacing_mm=[0, 0, 1.0])
    assert load(dest, "a.npy").shape == (12, 10, 18, 2)
    np.testing.assert_allclose(load(dest, "a.npy")[..., 1], load(dest, "a.npy")[..., 0] + 7.0, atol=1)
    assert load(dest, "labels/a.npy").shape == (12, 10, 18)
    assert settings(dest)["channels"] == ["CT", "PET"]
    assert settings(dest)["structures"] == {"whole": [1, 2], "core": [2]}
    write_nifti(source / "imagesTr/b_0000.nii.gz", *stored("LAS"))
    convert(source, dest, channel="all", on_error="skip")
    assert "b_0000.nii.gz: its case has 1 of 2 channels; add the others" in capsys.readouterr().err


def test_brats_by_preset_by_patterns_and_one_modality_of_it(tmp_path, capsys):
    source, kinds = tmp_path / "in", ("flair", "t1", "t1ce", "t2")
    for patient, (k, kind) in itertools.product(("P1", "P2"), enumerate((*kinds, "seg"))):
        volume = LESION * 4 if kind == "seg" else PATIENT + k
        write_nifti(source / f"{patient}/{patient}_{kind}.nii.gz", *stored("RAS", volume))
    dest = convert(source, tmp_path / "preset", preset="brats2018")
    np.testing.assert_array_equal(load(dest, "P2.npy"), np.stack([AXIAL + k for k in range(4)], axis=3))
    np.testing.assert_array_equal(load(dest, "labels/P2.npy"), 4 * (AXIAL > 900))
    written = settings(dest)
    assert (written["modality"], written["channels"]) == ("MR", list(kinds))
    assert written["structures"]["whole tumour"] == [1, 2, 4]
    assert [case.patient for case in read_table(dest).values()] == ["P1", "P2"]
    t1ce = convert(source, tmp_path / "t1ce", preset="brats2018", channel=2)
    np.testing.assert_array_equal(load(t1ce, "P1_t1ce.npy"), AXIAL + 2)
    images = [f"*_{kind}.nii.gz" for kind in kinds]
    same = convert(source, tmp_path / "patterns", images=images, labels="*_seg.nii.gz")
    np.testing.assert_array_equal(load(same, "P1.npy"), load(dest, "P1.npy"))
    one = convert(source, tmp_path / "one", images="*_flair.nii.gz", labels="*_seg.nii.gz")
    assert sorted(f.name for f in one.glob("*.npy")) == ["P1_flair.npy", "P2_flair.npy"]
    np.testing.assert_array_equal(load(one, "labels/P2_flair.npy"), 4 * (AXIAL > 900))
    write_nifti(source / "P1/P1_t2.nii.gz", PATIENT[:-1])
    (source / "P2/P2_t1.nii.gz").unlink()
    said = refused(capsys, source, tmp_path / "bad", preset="brats2018")
    assert "P1_t2.nii.gz: 9 x 12 x 9 voxels of 0.5 x 0.75 x 2 mm, LPS, do not match 10 x 12 x 9" in said
    assert "P2_flair.nii.gz: its case has 3 of 4 channels; add the others" in said
    assert "choose 0 to 3, or all" in refused(capsys, source, tmp_path / "bad", preset="brats2018", channel=4)


def test_channels_of_every_format_are_chosen_alike(tmp_path):
    both = np.stack([PATIENT, PATIENT + 7], axis=3)
    write_nifti(tmp_path / "in/a.nii.gz", both)
    write_nifti(tmp_path / "in/b.nii", both[:, :, :, None])
    vectors = sitk.GetImageFromArray(np.ascontiguousarray(both.transpose(2, 1, 0, 3)), True)
    for image, name in ((vectors, "c.nrrd"), (sitk.GetImageFromArray(np.ascontiguousarray(both.T), False), "d.mha")):
        sitk.WriteImage(image, str(tmp_path / "in" / name))
    write_nifti(tmp_path / "in/e.nii", PATIENT[..., None] + 7)
    one, every = (convert(tmp_path / "in", tmp_path / f"{c}", channel=c) for c in (1, "all"))
    for name in "abcd":
        np.testing.assert_array_equal(load(one, f"{name}.npy"), AXIAL + 7)
        np.testing.assert_array_equal(load(every, f"{name}.npy"), both.transpose(1, 0, 2, 3))
    np.testing.assert_array_equal(load(one, "e.npy"), AXIAL + 7)
    assert "channels" not in settings(every)  # as they differ
    np.save(tmp_path / "f.npy", both.transpose(3, 0, 1, 2))
    for channel, expected in ((1, PATIENT + 7), ("all", both)):
        dest = convert(tmp_path / "f.npy", tmp_path / f"f{channel}", channel=channel, channel_axis=0)
        np.testing.assert_array_equal(load(dest), expected)


def test_missing_halves_of_pairs_are_told(decathlon, tmp_path, capsys):
    (decathlon / "labelsTr/b.nii.gz").unlink()
    (decathlon / "imagesTr/a.nii.gz").unlink()
    with pytest.raises(UserError, match="problems: 3,"):
        convert(decathlon, tmp_path / "out", channel=0)
    out, err = capsys.readouterr()
    assert "labelsTr/a.nii.gz: is a label map without an image" in err
    assert "labelsTr/b.nii.gz: is listed in dataset.json but does not exist" in err
    assert "1 images have no label map" in out
    np.testing.assert_array_equal(load(tmp_path / "out", "b.npy"), AXIAL)


@pytest.mark.parametrize("what", ["shape", "spacing", "fractions"])
def test_a_label_map_that_does_not_fit_its_image_stops_the_pair(what, decathlon, tmp_path, capsys):
    label, affine = stored("LAS", LESION.astype(np.float32))
    label = {"shape": label[:-1], "fractions": label / 2}.get(what, label)
    affine = affine @ np.diag([2, 1, 1, 1]) if what == "spacing" else affine
    write_nifti(decathlon / "labelsTr/a.nii.gz", label, affine)
    convert(decathlon, tmp_path / "out", channel=0, on_error="skip")
    expected = "are not whole" if what == "fractions" else "do not match its image, 12 x 10 x 9 of 0.75 x 0.5 x 2 mm"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out/a.npy").exists()
    assert (tmp_path / "out/b.npy").exists()


def test_test_images_do_not_get_the_label_maps_of_training_images(tmp_path):
    for folder in ("imagesTr", "imagesTs", "labelsTr"):
        write_nifti(tmp_path / f"in/{folder}/case_1{'_0000' * ('images' in folder)}.nii.gz", *stored("RAS"))
    cases = read_table(convert(tmp_path / "in", tmp_path / "out"))
    labelled = {name: bool(case.label) for name, case in cases.items()}
    assert labelled == {"in/imagesTr/case_1_0000.nii.gz": True, "in/imagesTs/case_1_0000.nii.gz": False}


@pytest.mark.parametrize("name", ["a_seg", "segmentation-0", "mask/a", "segmentations/label_12"])
def test_label_maps_taken_for_images_are_noticed(name, tmp_path, capsys):
    write_nifti(tmp_path / "in/without_label/a_t1.nii.gz", *stored("RAS"))
    write_nifti(tmp_path / f"in/{name}.nii.gz", *stored("RAS"))
    convert(tmp_path / "in", tmp_path / "out")
    assert "1 files look like label maps" in capsys.readouterr().out


# --- what is written, again and again


def test_a_second_run_converts_only_what_is_missing_or_changed(tmp_path, capsys):
    for name in "abc":
        write_nifti(tmp_path / f"in/{name}.nii.gz", *stored("RAS"))
    write_nifti(tmp_path / "in/labels/a.nii.gz", *stored("RAS"))
    dest = convert(tmp_path / "in", tmp_path / "out")
    assert (dest / "labels/a.npy").exists()
    (dest / "dataset.yaml").write_text((dest / "dataset.yaml").read_text() + "remark: keep me\n")
    before = (dest / "b.npy").stat().st_mtime_ns
    convert(tmp_path / "in", dest)
    assert "0 cases converted, 3 there already" in capsys.readouterr().out
    (tmp_path / "in/labels/a.nii.gz").unlink()
    os.truncate(dest / "c.npy", 200)
    convert(tmp_path / "in", dest)
    assert "2 cases converted, 1 there already" in capsys.readouterr().out
    np.testing.assert_array_equal(load(dest, "c.npy"), AXIAL)
    assert not (dest / "labels/a.npy").exists()
    assert (dest / "b.npy").stat().st_mtime_ns == before
    assert settings(dest)["remark"] == "keep me"
    convert(tmp_path / "in", dest, slice_axis="coronal")
    assert "3 cases converted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker_and_whole_files_only_and_the_next_one_finishes(tmp_path, monkeypatch):
    source, dest = tmp_path / "in", tmp_path / "out"
    volume = np.random.default_rng(1).integers(0, 999, (128, 128, 64), dtype=np.int16)
    for k in range(24):
        write_nifti(source / f"{k:02d}.nii", volume)
    run = (
        "import prepare_data as p; from conversion import workers; workers.POOL_AFTER_SECONDS = -1.0; "
        f"p.main(p.Config(source={str(source)!r}, dest={str(dest)!r}, workers=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    while len(list(dest.glob("*.npy"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)  # returns when nobody is left who holds its end of the pipe
    assert 3 <= len(list(dest.glob("*.npy"))) < 24
    (dest / ".left.tmp").write_bytes(b"half a file")
    (source / "bad.nii").write_bytes(b"nothing")
    monkeypatch.setattr(workers, "POOL_AFTER_SECONDS", -1.0)
    convert(source, dest, workers=2, on_error="skip")
    assert len(files := list(dest.glob("*.npy"))) == 24
    assert all(np.array_equal(np.load(file), volume.transpose(1, 0, 2)) for file in files)
    assert not list(dest.glob(".*"))
    alone = convert(source, tmp_path / "alone", on_error="skip")
    assert (alone / "cases.csv").read_bytes() == (dest / "cases.csv").read_bytes()


def test_a_stopped_run_keeps_what_it_did_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    for name in "abc":
        write_nifti(tmp_path / f"in/{name}.nii", *stored("RAS"))
    attempt = prepare_data.attempt

    def stopped_at_b(source: Source, **settings: Any) -> Any:
        if source.stem == "b":
            os.kill(os.getpid(), signal.SIGTERM)
        return attempt(source, **settings)

    monkeypatch.setattr(prepare_data, "attempt", stopped_at_b)
    arguments = [f"--source={tmp_path / 'in'}", f"--dest={tmp_path / 'out'}", "--workers=1"]
    with pytest.raises(SystemExit) as stop:
        run_script(prepare_data.main, Config, None, arguments)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert [case.id for case in read_table(tmp_path / "out").values()] == ["a"]
    monkeypatch.undo()
    convert(tmp_path / "in", tmp_path / "out")
    assert "2 cases converted, 1 there already" in capsys.readouterr().out


def test_what_lies_in_the_way_is_named_before_anything_is_converted(tmp_path, capsys):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    dest = convert(file, tmp_path / "out")
    with prepare_data._only_run(dest), pytest.raises(UserError, match="is writing to"):
        convert(file, dest)
    for content in (b"\xff\xfe", b"id,source\n1,2\n"):
        (dest / "cases.csv").write_bytes(content * 2)
        with pytest.raises(UserError, match=r"cases.csv: was not written by this version"):
            convert(file, dest)
    (tmp_path / "mine/raw").mkdir(parents=True)
    np.save(tmp_path / "mine/a.npy", PATIENT)
    for place in (tmp_path / "mine/a.npy", tmp_path / "mine/raw"):
        with pytest.raises(UserError, match=r"^source: .* lies inside dest"):
            convert(place, tmp_path / "mine", array_axis=0)
    for root in ("1", "2"):
        write_nifti(tmp_path / root / "images/x.nii", *stored("RAS"))
    places = [tmp_path / "1/images", tmp_path / "2/images"]
    assert "two of the places hold" in refused(capsys, places, tmp_path / "new")
    assert len(list(convert([tmp_path / "1", tmp_path / "1/images"], tmp_path / "new").glob("*.npy"))) == 1


def test_names_that_no_table_can_hold_are_told(tmp_path, capsys):
    write_nifti(tmp_path / "in/a.nii", *stored("RAS"))
    try:
        shutil.copy(tmp_path / "in/a.nii", os.fsencode(tmp_path) + b"/in/M\xfcller.nii")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    dest = convert(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert "name that is not UTF-8" in capsys.readouterr().err
    assert [case.id for case in read_table(dest).values()] == ["a"]


def test_ids_are_unique_on_any_file_system_and_stay():
    def source(name: str) -> Source:
        return Source(name, Path(name).name.split(".")[0], "nifti", (Path(name),))

    names = ["in/a/T1.nii", "in/b/t1.nii", "in/a/T1.npy", "in/Übung 2.nii", "in/c.nii", "in/montage.nii"]
    ids = {s.name: s.id for s in assign_ids([source(n) for n in names], {})}
    assert ids["in/b/t1.nii"] == "in__b__t1"
    assert len({i.lower() for i in ids.values()}) == len(names)
    assert ids["in/c.nii"] == "c"
    assert ids["in/Übung 2.nii"] == "_bung_2"
    assert ids["in/montage.nii"] == "in__montage"
    later = {s.name: s.id for s in assign_ids([source(n) for n in [*names, "in/d/c.nii"]], ids)}
    assert later["in/d/c.nii"] == "in__d__c"
    assert {n: later[n] for n in names} == ids


def test_images_are_copied_byte_for_byte(tmp_path, capsys):
    (tmp_path / "in/labels").mkdir(parents=True)
    grey = np.arange(30 * 20, dtype=np.uint16).reshape(30, 20) * 100
    Image.fromarray(grey).save(tmp_path / "in/a.png")
    Image.fromarray((grey > 500).astype(np.uint8)).save(tmp_path / "in/labels/a.png")
    Image.fromarray((grey // 256).astype(np.uint8)).save(tmp_path / "in/B.JPG", format="JPEG")
    Image.fromarray(grey).save(tmp_path / "in/c.tiff")
    (tmp_path / "in/readme.txt").write_text("text")
    convert(tmp_path / "in", tmp_path / "tree/out")
    assert "not converted: 1 .txt" in capsys.readouterr().out
    for name in ("a.png", "labels/a.png"):
        assert (tmp_path / "tree/out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert [s.name for s in scan(tmp_path / "tree")[0]] == ["out/B.jpg", "out/a.png", "out/c.tiff"]


def test_wrong_options_are_named(tmp_path, capsys):
    np.save(tmp_path / "a.npy", PATIENT)
    wrong = {"window": "bones", "spacing_mm": [1.0, 1.0], "orientation": "LRS", "labels": "seg", "images": ["*", "b"]}
    for option, value in wrong.items():
        with pytest.raises(UserError, match=f"^{option}: "):
            convert(tmp_path / "a.npy", tmp_path / "out", **{option: value})
    (tmp_path / "in").mkdir()
    for dest in ("labels", ".hidden", "in/out", "a.npy/below/a/file"):
        with pytest.raises(UserError, match=r"^dest: "):
            convert(tmp_path / ("a.npy" if "below" in dest else "in"), tmp_path / dest)
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "1 x 1 pixels" in refused(
        capsys, write_nifti(tmp_path / "a.nii", PATIENT), tmp_path / "o", spacing_mm=[9] * 3
    )
    with pytest.raises(SystemExit) as stop:
        run_script(prepare_data.main, Config, None, [f"--source=[{tmp_path / 'in'}]", f"--dest={tmp_path / 'o'}"])
    assert stop.value.code == 2
    assert "holds nothing to convert" in capsys.readouterr().err


# --- broken files, and real ones that packages ship


def spoil(root: Path) -> dict[str, str]:
    """Broken files below `root`, and what must be said of each."""
    root.mkdir()
    good = PATIENT.astype(np.float64)
    arrays = {
        "nan.npy": (np.where(good == 1, np.nan, good), "1 of 1080 voxels are NaN or Inf"),
        "constant.npy": (good * 0 + 42, "is constant (all voxels are 42)"),
        "offset.npy": (1e9 + 1e-3 * good, "are too large or differ too little for float32"),
        "huge.npy": (1e300 * good, "are too large or differ too little for float32"),
        "2d.npy": (good[0], "is 2D"),
        "4d.npy": (np.stack([good, good]), "choose one with --channel"),
        "5d.npy": (np.zeros((9, 9, 9, 2, 2)), "is 5D"),
        "tiny.npy": (good[:5, :4], "slices of 5 x 4 pixels"),
        "axis.npy": (good[:0], "axis of length 0"),
        "complex.npy": (good * 1j, "is complex"),
        "text.npy": (np.array([[["a"]]]), "not intensities"),
        "object.npy": (np.array([{}], dtype=object), "holds Python objects"),
    }
    for name, (array, _) in arrays.items():
        np.save(root / name, array)
    np.savez(root / "several.npz", a=good, b=good)
    write_nifti(root / "flat.nii", good[:, :, 0])
    grey = Image.fromarray(PATIENT[0].astype(np.uint8))
    grey.save(root / "stack.tif", save_all=True, append_images=[grey])
    Image.new("L", (30, 20)).save(root / "black.png")
    Image.merge("LAB", [grey] * 3).save(root / "lab.tif")
    write_series(root / "nowhere", SeriesInstanceUID="1.1", ImagePositionPatient=None)
    write_series(root / "spacings", SeriesInstanceUID="1.2", PixelSpacing=lambda k: [0.75, 0.5] if k < 4 else [1.5, 1])
    first = write_series(root / "damaged", SeriesInstanceUID="1.3") / "000.dcm"
    volume = write_nifti(root / "cut.nii.gz", good)
    contents = {
        "empty.nii": (b"", "is empty (0 bytes)"),
        "cut.nii.gz": (volume.read_bytes()[:-200], "compressed data end early"),
        "packed.nii.gz": (gzip.compress(b"not an image at all" * 100), "cannot be read"),
        "plain.nii.gz": (b"nothing", "is called .gz but is not compressed"),
        "cut.npy": ((root / "nan.npy").read_bytes()[:-8], "is truncated"),
        "a.dcm": (b"text", "is not a DICOM file"),
        "a.h5": (b"text", "is not an HDF5 file"),
        "a.npz": (b"text", "cannot be read"),
        "a.mha": (b"text", "cannot be read"),
        "a.png": (b"\x89PNG text", "broken image data"),
        "damaged/000.dcm": (
            first.read_bytes().replace(b"0\\0.0\\0.0\\0.0", b"0\\0.0\\0.0\\?.0"),
            "damaged DICOM header",
        ),
    }
    for name, (content, _) in contents.items():
        (root / name).write_bytes(content)
    return {name: message for name, (_, message) in (arrays | contents).items()} | {
        "several.npz": "holds several volumes: a (10 x 12 x 9), b (10 x 12 x 9); name one with --array_key",
        "flat.nii": "is 2D",
        "stack.tif": "is a stack of 2 pages",
        "black.png": "is constant",
        "lab.tif": "is in CIELAB colours",
        "nowhere": "000.dcm: has no ImagePositionPatient, so its slices cannot be placed",
        "spacings": "several pixel spacings, 0.75 x 0.5 to 1.5 x 1 mm",
    }


def test_every_bad_file_is_told_and_the_good_ones_are_kept(tmp_path, capsys):
    expected = spoil(tmp_path / "in")
    said = refused(capsys, tmp_path / "in", tmp_path / "tree/out")
    assert f"problems: {len(expected)}," in said
    for name, message in expected.items():
        assert [line for line in said.splitlines() if f"/in/{name}: " in line and message in line], name
    assert [s.name for s in scan(tmp_path / "tree")[0]] == ["out/damaged.npy"]
    np.testing.assert_array_equal(load(tmp_path / "tree/out"), AXIAL[:, :, 1:])


def test_a_real_series_lies_where_simpleitk_puts_it(tmp_path):
    folder = SHIPPED[1] / "dicomdirtests/98892001/CT5N"
    dest = convert(folder, tmp_path / "out")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = sitk.DICOMOrient(reader.Execute(), "LPS")
    np.testing.assert_array_equal(load(dest), sitk.GetArrayFromImage(image).transpose(1, 2, 0))
    corner = nibabel.affines.apply_affine(affine_of(dest), [3, 2, 1])
    np.testing.assert_allclose(corner * [-1, -1, 1], image.TransformIndexToPhysicalPoint((2, 3, 1)), rtol=1e-5)


def test_real_nifti_is_turned_as_simpleitk_turns_it_and_can_be_trained_on(tmp_path):
    file = SHIPPED[0] / "anatomical.nii"
    dest = convert(file, tmp_path / "tree/Brain")
    image = sitk.DICOMOrient(sitk.ReadImage(str(file)), "LPS")
    np.testing.assert_array_equal(load(dest), sitk.GetArrayFromImage(image).transpose(1, 2, 0))
    store = prepare(tmp_path / "tree", size=32, progress=False)
    assert store.read(0, 0, store.samples[0].slices).std() > 0.1
