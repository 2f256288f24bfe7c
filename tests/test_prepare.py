"""prepare_data.py: every format gives the same volume, turned as radiologists view it; nothing is lost silently."""

from __future__ import annotations

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

import prepare_data
from conversion.convert import PLANES
from conversion.layouts import Source, assign_ids
from datasets.index import scan
from datasets.store import prepare
from prepare_data import Config, read_table
from utils.config import main as run_script
from utils.config import parse
from utils.errors import UserError

SIDES = ("RL", "AP", "IS")
# The patient: x grows to the left, y to the back, z to the head, as in DICOM. Every voxel differs, no symmetry.
PATIENT = np.random.default_rng(0).permutation(10 * 12 * 9).reshape(10, 12, 9).astype(np.int16)
SPACING = {"L": 0.5, "P": 0.75, "S": 2.0}  # mm along the three axes of PATIENT
AXIAL = PATIENT.transpose(1, 0, 2)  # rows to the back, columns to the left, slices to the head
OTHER = dict(zip("RLAPSI", "LRPAIS", strict=True))


def convert(source: Path | list[Path], dest: Path, **settings: Any) -> Path:
    places = [str(place) for place in source] if isinstance(source, list) else str(source)
    prepare_data.main(Config(source=places, dest=str(dest), **{"workers": 1, **settings}))
    return dest


def load(dest: Path, name: str | None = None) -> np.ndarray:
    files = [dest / name] if name else list(dest.glob("*.npy"))
    assert len(files) == 1
    return np.load(files[0], allow_pickle=False)


def settings(dest: Path) -> dict[str, Any]:
    return yaml.safe_load((dest / "dataset.yaml").read_text())


def stored(codes: str, volume: np.ndarray = PATIENT) -> tuple[np.ndarray, np.ndarray]:
    """The patient in an array whose axes grow towards `codes`, and the NIfTI affine (to right, front, head)."""
    axes = ["LPS".index(c) if c in "LPS" else "LPS".index(OTHER[c]) for c in codes]
    array = volume.transpose(axes)
    array = array[tuple(slice(None, None, 1 if c in "LPS" else -1) for c in codes)]
    affine = np.zeros((4, 4))
    for i, (code, axis) in enumerate(zip(codes, axes, strict=True)):
        affine[axis, i] = SPACING["LPS"[axis]] * (1 if code in "RAS" else -1)
    affine[3, 3] = 1
    return array, affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-0.5, -0.75, 2, 1]) if affine is None else affine), path)
    return path


def write_itk(path: Path, codes: str = "LPS") -> Path:
    array, affine = stored(codes)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((np.diag([-1, -1, 1]) @ affine[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


def dicom_slice(pixels: np.ndarray, **fields: Any) -> Any:
    """A data set with one image of a patient called Secret."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

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
    data.PixelData = pixels.tobytes()
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
        data = dicom_slice(np.ascontiguousarray(AXIAL[:, :, k]), **{**usual, **own})
        data.save_as(folder / names(k), enforce_file_format=True)
    return folder


# --- geometry


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL", "AIL"])
def test_however_a_nifti_is_stored_the_front_comes_out_on_top_and_the_right_side_on_the_left(codes, tmp_path):
    dest = convert(write_nifti(tmp_path / "a.nii.gz", *stored(codes)), tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert settings(dest)["orientation"] == "PLS"
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
    assert read_table(dest)[f"{tmp_path.name}/a.nii.gz"].original_orientation == codes


def test_all_48_orientations_are_turned_alike():
    from conversion.convert import arrange
    from conversion.readers import Volume

    for axes in itertools.permutations(SIDES):
        for codes in map("".join, itertools.product(*axes)):
            array, affine = stored(codes)
            spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
            for plane, wanted in PLANES.items():
                view, _, mm, _ = arrange(Volume(array, codes, spacing), plane)
                np.testing.assert_array_equal(view, stored(wanted)[0])
                assert mm == tuple(SPACING[c if c in SPACING else OTHER[c]] for c in wanted)


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
    dest = convert(write_itk(tmp_path / name, "PIR"), tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
    assert load(dest).dtype == np.int16
    assert "not converted" not in capsys.readouterr().out  # nor is the .raw of an .mhd a file of its own


def test_arrays_keep_their_order_and_their_slices_may_lie_along_any_axis(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(PATIENT.astype(">i2")))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npy", tmp_path / "1")), PATIENT)
    np.testing.assert_array_equal(
        load(convert(tmp_path / "a.npy", tmp_path / "2", array_axis=0)), PATIENT.transpose(1, 2, 0)
    )
    lps = convert(tmp_path / "a.npy", tmp_path / "3", orientation="lps")
    np.testing.assert_array_equal(load(lps), AXIAL)
    with pytest.raises(UserError, match="nothing was converted"):
        convert(tmp_path / "a.npy", tmp_path / "4", slice_axis="axial")
    assert not (tmp_path / "4").exists()


def test_npz_and_hdf5_name_the_array_and_hdf5_may_hold_the_label_map_too(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", image=PATIENT, noise=np.zeros(3))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npz", tmp_path / "1")), PATIENT)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["group/image"], file["label"] = PATIENT, (PATIENT > 500).astype(np.int64)
    with pytest.raises(UserError):
        convert(tmp_path / "b.h5", tmp_path / "2")
    assert "group/image (10 x 12 x 9)" in capsys.readouterr().err
    dest = convert(tmp_path / "b.h5", tmp_path / "2", array_key="group/image", label_key="label")
    np.testing.assert_array_equal(load(dest), PATIENT)
    label = load(dest / "labels")
    np.testing.assert_array_equal(label, PATIENT > 500)
    assert label.dtype == np.uint8


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
    image = nibabel.Nifti1Image(array, np.diag([-0.5, -0.75, 2, 1]))
    image.header.set_slope_inter(slope, intercept)
    # nibabel.save would rescale the data once more: write header and stored values as scanners' exports do
    image.header["scl_slope"], image.header["scl_inter"] = slope, intercept
    image.header["vox_offset"] = 352
    raw = image.header.binaryblock + bytes(4) + array.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(raw)
    out = load(convert(tmp_path / "a.nii", tmp_path / "out"))
    assert out.dtype == dtype
    np.testing.assert_allclose(out, AXIAL * (array[0, 0, 0] / PATIENT[0, 0, 0]) * slope + intercept)


@pytest.mark.parametrize(
    ("values", "kept"),
    [(1e9 + 1e-3 * PATIENT, False), (1e-300 * PATIENT, False), (1e300 * PATIENT, False), (1e-9 * PATIENT, True)],
)
def test_float64_that_float32_cannot_tell_apart_is_reported(values, kept, tmp_path, capsys):
    np.save(tmp_path / "a.npy", values)
    if kept:
        np.testing.assert_allclose(load(convert(tmp_path / "a.npy", tmp_path / "out")), values, rtol=1e-6)
        return
    with pytest.raises(UserError, match="nothing was converted"):
        convert(tmp_path / "a.npy", tmp_path / "out")
    assert "a.npy: its intensities" in capsys.readouterr().err


def test_nan_is_an_error_until_it_is_said_what_it_means(tmp_path, capsys):
    array = PATIENT.astype(np.float32)
    array[1, 2, 3] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError):
        convert(tmp_path / "a.npy", tmp_path / "out")
    assert "1 of 1080 voxels are NaN or Inf" in capsys.readouterr().err
    out = load(convert(tmp_path / "a.npy", tmp_path / "out", nan_value=-7.0))
    assert out[1, 2, 3] == -7
    assert np.count_nonzero(out != PATIENT) == 1


def test_resampling_keeps_a_linear_ramp_and_the_extent(tmp_path):
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None, None], (16, 12, 10))
    dest = convert(
        write_nifti(tmp_path / "a.nii", ramp, np.diag([-1, -1, 1, 1])), tmp_path / "out", spacing_mm=[1, 2, 0]
    )
    out = load(dest)  # rows to the back, columns to the left: the ramp runs along the columns
    assert out.shape == (12, 8, 10)
    np.testing.assert_allclose(out[5, 1:-1, 5], np.arange(2.5, 14, 2)[:6], atol=1e-5)
    assert settings(dest)["spacing_mm"] == [1, 2, 1]
    turned = write_nifti(tmp_path / "b.nii", ramp.transpose(1, 2, 0), np.diag([-1, -1, 1, 1]))
    out = load(convert(turned, tmp_path / "slices", spacing_mm=[0, 0, 2]))
    assert out.shape == (10, 12, 8)
    np.testing.assert_allclose(out[5, 5, 1:-1], np.arange(2.5, 14, 2)[:6], atol=1e-5)


def test_a_spacing_that_leaves_no_picture_is_refused(tmp_path, capsys):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    with pytest.raises(UserError, match="nothing was converted"):
        convert(file, tmp_path / "out", spacing_mm=[50.0, 50.0, 0.0])
    assert "a.nii: would have slices of 1 x 1 pixels" in capsys.readouterr().err


def test_resampled_label_maps_hold_no_new_values_and_stay_on_their_image(tmp_path):
    blob = np.zeros((24, 20, 16), np.uint8)
    blob[4:14, 6:12, 5:11] = 4
    image = blob * 25.0 + 1
    write_nifti(tmp_path / "in/imagesTr/a.nii.gz", image, np.diag([-1, -1, 1, 1]))
    write_nifti(tmp_path / "in/labelsTr/a.nii.gz", blob, np.diag([-1, -1, 1, 1]))
    dest = convert(tmp_path / "in", tmp_path / "out", spacing_mm=[0.7, 1.5, 0.5])
    label = load(dest / "labels")
    assert set(np.unique(label)) == {0, 4}
    assert load(dest).shape == label.shape
    agree = 2 * ((load(dest) > 51) & (label > 0)).sum() / ((load(dest) > 51).sum() + (label > 0).sum())
    assert agree > 0.97


# --- DICOM


def test_a_series_is_ordered_by_position_and_rescaled_and_names_nobody(tmp_path):
    folder = write_series(tmp_path / "scan", RescaleSlope=1, RescaleIntercept=-1000)
    dest = convert(folder, tmp_path / "out")
    np.testing.assert_array_equal(load(dest, "scan.npy"), AXIAL.astype(int) - 1000)
    assert load(dest).dtype == np.int16
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
    assert settings(dest)["modality"] == "CT"
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
            np.ascontiguousarray(array[:, :, k]),
            ImagePositionPatient=(steps[2] * k).tolist(),
            ImageOrientationPatient=[*steps[1] / mm[1], *steps[0] / mm[0]],
            PixelSpacing=mm[:2].tolist(),
        )
        data.save_as(tmp_path / f"scan/{k}", enforce_file_format=True)
    dest = convert(tmp_path / "scan", tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]


def test_two_series_in_one_folder_are_told_apart(tmp_path):
    write_series(tmp_path / "both", lambda k: f"{k}")
    write_series(tmp_path / "both", lambda k: f"1{k}", SeriesInstanceUID="9.9", RescaleIntercept=5, RescaleSlope=1)
    dest = convert(tmp_path / "both", tmp_path / "out")
    volumes = sorted((np.load(file) for file in dest.glob("both_*.npy")), key=np.min)
    np.testing.assert_array_equal(volumes[0], AXIAL)
    np.testing.assert_array_equal(volumes[1], AXIAL + 5)


def test_rounded_directions_do_not_split_a_series(tmp_path):
    def oblique(k: int) -> list[float]:
        sine = 0.25 + (-1) ** k * 1e-6  # on both sides of where rounding to one digit changes
        return [1, 0, 0, 0, (1 - sine**2) ** 0.5, sine]

    write_series(tmp_path / "in", ImageOrientationPatient=oblique)
    np.testing.assert_array_equal(load(convert(tmp_path / "in", tmp_path / "out")), AXIAL)


def test_slices_of_several_pixel_spacings_are_refused(tmp_path, capsys):
    write_series(tmp_path / "in", PixelSpacing=lambda k: [0.75, 0.5] if k < 4 else [1.5, 1])
    with pytest.raises(UserError, match="nothing was converted"):
        convert(tmp_path / "in", tmp_path / "out")
    assert "several pixel spacings, 0.75 x 0.5 to 1.5 x 1 mm" in capsys.readouterr().err


def test_a_missing_slice_is_noticed_and_may_be_accepted(tmp_path, capsys):
    folder = write_series(tmp_path / "scan", lambda k: f"{k}.dcm")
    (folder / "4.dcm").unlink()
    with pytest.raises(UserError):
        convert(folder, tmp_path / "out")
    assert "2.00 to 4.00 mm apart (usually 2.00); the largest departure is between 3.dcm and 5.dcm" in (
        capsys.readouterr().err
    )
    assert load(convert(folder, tmp_path / "out", allow_gaps=True)).shape[2] == 8


def test_copies_of_a_slice_count_once_and_several_slices_at_a_position_are_channels(tmp_path, capsys):
    folder = write_series(tmp_path / "scan", lambda k: f"{k}.dcm")
    shutil.copy(folder / "4.dcm", folder / "copy.dcm")
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL)
    (folder / "copy.dcm").unlink()
    write_series(folder, lambda k: f"+{k}.dcm", AcquisitionNumber=2, RescaleIntercept=5, RescaleSlope=1)
    with pytest.raises(UserError):
        convert(folder, tmp_path / "4d")
    assert "is 4D (12 x 10 x 9 x 2)" in capsys.readouterr().err
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "4d", channel=1)), AXIAL + 5)
    (folder / "+3.dcm").unlink()
    with pytest.raises(UserError):
        convert(folder, tmp_path / "odd", channel=1)
    assert "1 of 9 slice positions hold another number of slices" in capsys.readouterr().err


def test_every_slice_may_have_its_own_scale_as_in_pet(tmp_path):
    folder = write_series(tmp_path / "pet", Modality="PT", RescaleSlope=lambda k: k + 0.5, RescaleIntercept=0)
    out = load(convert(folder, tmp_path / "out"))
    np.testing.assert_allclose(out, AXIAL * (np.arange(9) + 0.5))
    assert out.dtype == np.float32


def test_a_multi_frame_file_is_a_series_in_itself(tmp_path):
    from pydicom.dataset import Dataset

    def group(**fields: Any) -> Any:
        item = Dataset()
        for name, value in fields.items():
            setattr(item, name, value)
        return item

    order = [3, 0, 8, 1, 7, 2, 6, 4, 5]
    data = dicom_slice(np.ascontiguousarray(AXIAL.transpose(2, 0, 1)[order]), NumberOfFrames=9)
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
    (tmp_path / "in").mkdir()
    data.save_as(tmp_path / "in/enhanced.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(load(convert(tmp_path / "in", tmp_path / "out")), AXIAL - 10)


def test_compressed_slices_are_decoded_by_gdcm_where_pydicom_cannot(tmp_path):
    folder = write_series(tmp_path / "scan", Modality="MR", RescaleSlope=2, RescaleIntercept=1)
    for file in folder.iterdir():
        raw = sitk.ReadImage(str(file), imageIO="GDCMImageIO")
        data = pydicom.dcmread(file)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")  # lossless process 14
        pixels = sitk.GetImageFromArray(data.pixel_array[None])
        assert raw.GetSize() == pixels.GetSize()
        writer.SetFileName(str(tmp_path / "compressed.dcm"))
        writer.Execute(pixels)
        compressed = pydicom.dcmread(tmp_path / "compressed.dcm")
        data.PixelData, data["PixelData"].VR = compressed.PixelData, "OB"
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
        assert "JPEG Lossless" in data.file_meta.TransferSyntaxUID.name
        data.save_as(file)
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL * 2 + 1)


def test_radiographs_become_grey_images_dark_where_they_are_shown_dark(tmp_path):
    pixels = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 20
    for name, interpretation in (("plain", "MONOCHROME2"), ("inverted", "MONOCHROME1")):
        data = dicom_slice(pixels, Modality="DX", PhotometricInterpretation=interpretation)
        (tmp_path / "in").mkdir(exist_ok=True)
        data.save_as(tmp_path / f"in/{name}.dicom", enforce_file_format=True)
    dest = convert(tmp_path / "in", tmp_path / "tree/xray")
    np.testing.assert_array_equal(np.asarray(Image.open(dest / "plain.png")), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(dest / "inverted.png")), pixels.max() - pixels)
    assert {s.kind for s in scan(tmp_path / "tree")} == {"image"}


# --- windows and modalities


def test_a_named_window_is_for_ct_and_training_applies_it(tmp_path):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS", PATIENT - 500))
    with pytest.raises(UserError, match="only CT has, but there are 1 of modality unknown"):
        convert(file, tmp_path / "tree/ct", window="lung")
    with pytest.raises(UserError, match="only CT has"):
        convert(file, tmp_path / "tree/ct", window="lung", modality="MRI")
    dest = convert(file, tmp_path / "tree/ct", window="brain", modality="CT")
    assert scan(tmp_path / "tree")[0].window == (0, 80)
    convert(file, dest, modality="CT")
    assert settings(dest)["window"] == [0, 80]
    convert(file, dest, modality="CT", window=[-200.0, 300.0])
    assert settings(dest)["window"] == [-200, 300]
    samples, store = prepare(tmp_path / "tree", size=12, progress=False)
    shown = store.read(0, 0, samples[0].slices)[:, :, 1:11]
    np.testing.assert_allclose(shown, ((AXIAL - 500 + 200) / 500).clip(0, 1).transpose(2, 0, 1), atol=1e-3)
    convert(file, dest, modality="CT", window="none")
    assert "window" not in settings(dest)


def test_one_window_for_two_modalities_is_refused(tmp_path):
    write_series(tmp_path / "in/ct")
    write_series(tmp_path / "in/mr", Modality="MR", SeriesInstanceUID="4.5")
    for window in ("lung", [0.0, 100.0]):
        with pytest.raises(UserError, match="a data set of its own"):
            convert(tmp_path / "in", tmp_path / "out", window=window)
    assert settings(convert(tmp_path / "in", tmp_path / "out"))["modality"] == "CT, MR"


def test_a_volume_outside_the_window_is_reported(tmp_path, capsys):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    with pytest.raises(UserError):
        convert(file, tmp_path / "out", window=[-100.0, -50.0])
    assert "0 to 1079, lie outside the window" in capsys.readouterr().err


# --- label maps, the Decathlon, channels


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Two labelled images of two channels and a test image."""
    root = tmp_path / "Task99"
    for name, folder in (("a", "Tr"), ("b", "Tr"), ("c", "Ts")):
        array, affine = stored("LAS")
        write_nifti(root / f"images{folder}/{name}.nii.gz", np.stack([array, array + 7], axis=3), affine)
        if folder == "Tr":
            write_nifti(root / f"labels{folder}/{name}.nii.gz", *stored("RPS", (PATIENT > 900).astype(np.uint8)))
            (root / f"images{folder}/._{name}.nii.gz").write_bytes(b"left behind by macOS")
    description = {
        "name": "Example",
        "licence": "CC-BY",
        "modality": {"0": "FLAIR", "1": "MRI"},
        "labels": {"0": "background", "1": "lesion"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"],
        "test": ["./imagesTs/c.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_the_decathlon_layout_is_understood(decathlon, tmp_path, capsys):
    with pytest.raises(UserError):
        convert(decathlon, tmp_path / "out")
    assert "is 4D (10 x 12 x 9 x 2): 2 channels" in capsys.readouterr().err
    dest = convert(decathlon, tmp_path / "out", channel=1)
    assert sorted(f.name for f in dest.glob("*.npy")) == ["a.npy", "b.npy", "c.npy"]
    np.testing.assert_array_equal(load(dest, "a.npy"), AXIAL + 7)
    np.testing.assert_array_equal(load(dest, "labels/a.npy"), AXIAL > 900)
    assert not (dest / "labels/c.npy").exists()
    assert "no label map" not in capsys.readouterr().out
    written = settings(dest)
    assert written["structures"] == {0: "background", 1: "lesion"}
    assert written["modality"] == "MR"
    assert written["source"] == "Example; CC-BY"


def test_every_file_of_nnunet_has_the_modality_of_its_channel(tmp_path):
    for channel in ("0000", "0001"):
        write_nifti(tmp_path / f"in/imagesTr/a_{channel}.nii.gz", *stored("LAS"))
    (tmp_path / "in/dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}}))
    table = read_table(convert(tmp_path / "in", tmp_path / "out", channel=0))
    assert {case.id: case.modality for case in table.values()} == {"a_0000": "CT", "a_0001": "PT"}
    with pytest.raises(UserError, match=r"^window: .* only CT has"):
        convert(tmp_path / "in", tmp_path / "out", window="lung")


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


def test_channels_of_every_format_are_chosen_alike(tmp_path):
    both = np.stack([PATIENT, PATIENT + 7], axis=3)
    write_nifti(tmp_path / "in/a.nii.gz", both)
    write_nifti(tmp_path / "in/b.nii", both[:, :, :, None])
    sitk.WriteImage(
        sitk.GetImageFromArray(np.ascontiguousarray(both.transpose(2, 1, 0, 3)), True), tmp_path / "in/c.nrrd"
    )
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(both.T), False), tmp_path / "in/d.mha")
    write_nifti(tmp_path / "in/e.nii", PATIENT[..., None] + 7)
    dest = convert(tmp_path / "in", tmp_path / "out", channel=1)
    for name in "abcde":
        np.testing.assert_array_equal(load(dest, f"{name}.npy"), AXIAL + 7)
    np.save(tmp_path / "f.npy", both.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(
        load(convert(tmp_path / "f.npy", tmp_path / "f", channel=1, channel_axis=0)), PATIENT + 7
    )


@pytest.mark.parametrize("what", ["shape", "spacing", "fractions"])
def test_a_label_map_that_does_not_fit_its_image_stops_the_pair(what, decathlon, tmp_path, capsys):
    label, affine = stored("LAS", (PATIENT > 900).astype(np.float32))
    if what == "shape":
        label = label[:-1]
    if what == "spacing":
        affine = affine @ np.diag([2, 1, 1, 1])
    if what == "fractions":
        label = label / 2
    write_nifti(decathlon / "labelsTr/a.nii.gz", label, affine)
    convert(decathlon, tmp_path / "out", channel=0, on_error="skip")
    expected = "are not whole" if what == "fractions" else "do not match its image, 12 x 10 x 9 of 0.75 x 0.5 x 2 mm"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out/a.npy").exists()
    assert (tmp_path / "out/b.npy").exists()


def test_label_maps_whose_header_lies_otherwise_are_noted(decathlon, tmp_path, capsys):
    write_nifti(decathlon / "labelsTr/a.nii.gz", *stored("RAS", (PATIENT > 900).astype(np.uint8)))
    dest = convert(decathlon, tmp_path / "out", channel=0)
    assert "a.nii.gz: label map stored as RAS, image as LAS: each turned" in capsys.readouterr().out
    np.testing.assert_array_equal(load(dest, "labels/a.npy"), AXIAL > 900)


def test_brats_style_names_choose_one_modality_and_its_label_map(tmp_path):
    for patient in ("P1", "P2"):
        for kind in ("flair", "t1", "seg"):
            array, affine = stored("RAS", PATIENT if kind != "seg" else (PATIENT > 3).astype(np.uint8))
            write_nifti(tmp_path / f"in/{patient}/{patient}_{kind}.nii.gz", array, affine)
    dest = convert(tmp_path / "in", tmp_path / "out", images="*_flair.nii.gz", labels="*_seg.nii.gz")
    assert sorted(f.name for f in dest.glob("*.npy")) == ["P1_flair.npy", "P2_flair.npy"]
    np.testing.assert_array_equal(load(dest, "labels/P2_flair.npy"), AXIAL > 3)


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
    dest = convert(tmp_path / "in", tmp_path / "out")
    (dest / "dataset.yaml").write_text((dest / "dataset.yaml").read_text() + "remark: keep me\n")
    before = {f.name: f.stat().st_mtime_ns for f in dest.glob("*.npy")}
    capsys.readouterr()
    convert(tmp_path / "in", dest)
    assert "0 cases converted, 3 there already" in capsys.readouterr().out
    write_nifti(tmp_path / "in/b.nii.gz", *stored("RAS", PATIENT + 1))
    os.truncate(dest / "c.npy", 200)
    convert(tmp_path / "in", dest)
    assert "2 cases converted, 1 there already" in capsys.readouterr().out
    np.testing.assert_array_equal(load(dest, "b.npy"), AXIAL + 1)
    np.testing.assert_array_equal(load(dest, "c.npy"), AXIAL)
    assert (dest / "a.npy").stat().st_mtime_ns == before["a.npy"]
    assert settings(dest)["remark"] == "keep me"
    convert(tmp_path / "in", dest, slice_axis="coronal")
    assert "3 cases converted" in capsys.readouterr().out


def test_a_killed_run_leaves_whole_files_only_and_the_next_one_finishes(tmp_path):
    volume = np.random.default_rng(1).integers(0, 999, (128, 128, 64), dtype=np.int16)
    for k in range(24):
        write_nifti(tmp_path / f"in/{k:02d}.nii", volume)
    dest = tmp_path / "out"
    command = [sys.executable, "prepare_data.py", "--source", str(tmp_path / "in"), "--dest", str(dest), "--workers=1"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(dest.glob("*.npy")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(dest.glob("*.npy"))
    assert 0 < len(done) < 24
    for file in done:
        np.testing.assert_array_equal(np.load(file), volume.transpose(1, 0, 2))
    (dest / ".left.tmp").write_bytes(b"half a file")
    convert(tmp_path / "in", dest)
    assert len(list(dest.glob("*.npy"))) == 24
    assert not list(dest.glob(".*"))


def test_a_stopped_run_keeps_what_it_did_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    for name in "abc":
        write_nifti(tmp_path / f"in/{name}.nii", *stored("RAS"))
    attempt = prepare_data.attempt

    def stopped_at_b(source: Source, *args: Any) -> Any:
        if source.stem == "b":
            os.kill(os.getpid(), signal.SIGTERM)
        return attempt(source, *args)

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


def test_no_worker_outlives_a_killed_run(tmp_path):
    volume = np.random.default_rng(1).integers(0, 999, (128, 128, 64), dtype=np.int16)
    for k in range(40):
        write_nifti(tmp_path / f"in/{k:02d}.nii", volume)
    run = (
        "import prepare_data as p; p.POOL_AFTER_SECONDS = -1.0; "
        f"p.main(p.Config(source={str(tmp_path / 'in')!r}, dest={str(tmp_path / 'out')!r}, workers=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.npy"))) < 3 and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # returns when nobody is left who holds its end of the pipe
    assert 0 < len(list((tmp_path / "out").glob("*.npy"))) < 40


def test_processes_write_what_one_process_writes(tmp_path, monkeypatch):
    for k in range(4):
        write_nifti(tmp_path / f"in/{k}.nii.gz", *stored("RAS", PATIENT + k))
    (tmp_path / "in/bad.nii.gz").write_bytes(b"nothing")
    one = convert(tmp_path / "in", tmp_path / "one", on_error="skip")
    monkeypatch.setattr(prepare_data, "POOL_AFTER_SECONDS", -1.0)
    two = convert(tmp_path / "in", tmp_path / "two", on_error="skip", workers=2)
    assert (one / "cases.csv").read_bytes() == (two / "cases.csv").read_bytes()
    assert [f.read_bytes() for f in sorted(one.glob("*.npy"))] == [f.read_bytes() for f in sorted(two.glob("*.npy"))]


def test_a_full_disk_is_told_and_what_was_done_is_kept(tmp_path, monkeypatch):
    for name in "ab":
        write_nifti(tmp_path / f"in/{name}.nii", *stored("RAS"))
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "b.npy":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"b.npy: cannot be written \(No space left"):
        convert(tmp_path / "in", tmp_path / "out")
    assert [case.id for case in read_table(tmp_path / "out").values()] == ["a"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.npy", "cases.csv"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"id,source\n1,2\n"])
def test_a_table_of_cases_that_is_damaged_is_named(content, tmp_path):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    dest = convert(file, tmp_path / "out")
    (dest / "cases.csv").write_bytes(content * 2)
    with pytest.raises(UserError, match=r"cases.csv: was not written by this version"):
        convert(file, dest)


def test_a_label_map_that_is_gone_from_the_source_goes(tmp_path):
    write_nifti(tmp_path / "in/a.nii", *stored("RAS"))
    write_nifti(tmp_path / "in/labels/a.nii", *stored("RAS"))
    dest = convert(tmp_path / "in", tmp_path / "out")
    assert (dest / "labels/a.npy").exists()
    (tmp_path / "in/labels/a.nii").unlink()
    convert(tmp_path / "in", dest)
    assert not (dest / "labels/a.npy").exists()


def test_two_runs_do_not_write_to_one_folder_at_the_same_time(tmp_path):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    (tmp_path / "out").mkdir()
    with prepare_data._OnlyRun(tmp_path / "out"), pytest.raises(UserError, match="is writing to"):
        convert(file, tmp_path / "out")
    convert(file, tmp_path / "out")


def test_no_source_is_replaced_by_its_own_conversion(tmp_path):
    (tmp_path / "out/raw").mkdir(parents=True)
    for place in (tmp_path / "out/a.npy", tmp_path / "out/raw"):
        np.save(tmp_path / "out" / "a.npy", PATIENT)
        with pytest.raises(UserError, match=r"^source: .* lies inside dest"):
            convert(place, tmp_path / "out", array_axis=0)
    np.testing.assert_array_equal(np.load(tmp_path / "out/a.npy"), PATIENT)


def test_a_picture_called_montage_is_not_overwritten_by_the_montage(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    Image.fromarray(AXIAL[:, :, 0].astype(np.uint8)).save(tmp_path / "in/sub/montage.png")
    dest = convert(tmp_path / "in", tmp_path / "out")
    assert (dest / "in__sub__montage.png").read_bytes() == (tmp_path / "in/sub/montage.png").read_bytes()


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

    names = ["in/a/T1.nii", "in/b/t1.nii", "in/a/T1.npy", "in/Übung 2.nii", "in/c.nii"]
    ids = assign_ids([source(n) for n in names], {})
    assert ids["in/b/t1.nii"] == "in__b__t1"
    assert len({i.lower() for i in ids.values()}) == 5
    assert ids["in/c.nii"] == "c"
    assert ids["in/Übung 2.nii"] == "_bung_2"
    later = assign_ids([source(n) for n in [*names, "in/d/c.nii"]], ids)
    assert later["in/d/c.nii"] == "in__d__c"
    assert {n: later[n] for n in names} == ids


def test_images_are_copied_byte_for_byte_and_bad_ones_are_told(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    grey = np.arange(30 * 20, dtype=np.uint16).reshape(30, 20) * 100
    Image.fromarray(grey).save(tmp_path / "in/a.png")
    Image.fromarray((grey // 256).astype(np.uint8)).save(tmp_path / "in/B.JPG", format="JPEG")
    Image.fromarray(grey).save(tmp_path / "in/c.tiff")
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(tmp_path / "in/black.png")
    (tmp_path / "in/readme.txt").write_text("text")
    with pytest.raises(UserError, match="problems: 1,"):
        convert(tmp_path / "in", tmp_path / "tree/out")
    out, err = capsys.readouterr()
    assert "black.png: is constant" in err
    assert "not converted: 1 .txt" in out
    assert (tmp_path / "tree/out/a.png").read_bytes() == (tmp_path / "in/a.png").read_bytes()
    assert [s.name for s in scan(tmp_path / "tree")] == ["out/B.jpg", "out/a.png", "out/c.tiff"]


def test_wrong_options_are_named(tmp_path, capsys):
    np.save(tmp_path / "a.npy", PATIENT)
    for option, value in (("window", "bones"), ("spacing_mm", [1.0, 1.0]), ("orientation", "LRS"), ("labels", "seg")):
        with pytest.raises(UserError, match=f"^{option}: "):
            convert(tmp_path / "a.npy", tmp_path / "out", **{option: value})
    for dest in (tmp_path / "labels", tmp_path / ".hidden", tmp_path / "in/out", tmp_path / "a.npy/below/a/file"):
        (tmp_path / "in").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"^dest: "):
            convert(tmp_path / "a.npy" if "below" in dest.parts else tmp_path / "in", dest)
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run_script(prepare_data.main, Config, None, ["--source", str(tmp_path / "in"), "--dest", str(tmp_path / "o")])
    assert stop.value.code == 2
    assert "holds nothing to convert" in capsys.readouterr().err
    assert parse(Config, None, ["--source=[a, b]"]).source == ["a", "b"]


# --- real files

BAD_FILES = {
    "truncated.npy": "is truncated: 31301 bytes",
    "object_dtype.npy": "holds Python objects",
    "nan_inf.npy": "70 of 62475 voxels are NaN or Inf",
    "all_nan.npy": "6912 of 6912 voxels are NaN",
    "constant.npy": "is constant",
    "slice_2d.npy": "is 2D",
    "volume_4d.npy": "choose one with --channel",
    "empty.npy": "is empty",
    "zero_axis.npy": "axis of length 0",
    "tiny.npy": "slices of 5 x 4 pixels",
    "text_renamed.npy": "is not an NPY file",
    "npz_renamed.npy": "is a zip archive",
    "complex.npy": "is complex",
    "truncated.nii.gz": "compressed data end early",
    "not_gzip.nii.gz": "is not compressed",
    "no_pixel_data.dcm": "DICOM without an image (Basic Text SR Storage)",
    "text_renamed.dcm": "is not a DICOM file",
    "truncated.png": "broken image data",
    "label_without_image/labelsTr/hippocampus_010.nii.gz": "is a label map without an image",
    "pair_shape_mismatch/imagesTr/hippocampus_281.nii.gz": "do not match its image",
}


def test_every_bad_file_is_told_and_the_good_ones_are_kept(shared, tmp_path, capsys):
    with pytest.raises(UserError, match="problems: 20,"):
        convert(shared / "bad_input", tmp_path / "tree/out")
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("problem: ")]
    assert len(lines) == len(BAD_FILES) == 20
    for name, message in BAD_FILES.items():
        assert [line for line in lines if f"/{name}: " in line and message in line], name
    assert sorted(s.name for s in scan(tmp_path / "tree")) == ["out/fortran_big_endian.npy", "out/hippocampus_118.npy"]
    assert "images have no label map" in out


def test_real_series_in_one_folder_give_what_they_give_apart(shared, tmp_path):
    files = sorted(f for f in (shared / "dicom").rglob("*") if f.is_file())
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for k, file in enumerate(np.random.default_rng(0).permutation(files)):
        shutil.copy(file, mixed / f"{k:03d}")
    one, apart = convert(mixed, tmp_path / "one"), convert(shared / "dicom", tmp_path / "apart")
    sums = [sorted(case.sha256 for case in read_table(dest).values()) for dest in (one, apart)]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 3
    for series in ("pgbm_003_t1post", "pgbm_006_dT1", "vs_seg_001_t1c"):
        reader = sitk.ImageSeriesReader()  # a second opinion about order and, where GDCM rescales, intensities
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(shared / "dicom" / series)))
        image = sitk.DICOMOrient(reader.Execute(), "LPS")
        expected = sitk.GetArrayFromImage(image).transpose(1, 2, 0)
        got = load(apart, f"{series}.npy")
        assert np.corrcoef(got.ravel()[::7], expected.ravel()[::7])[0, 1] > 0.999999
    assert abs(load(apart, "pgbm_006_dT1.npy")).max() == pytest.approx(31577 * 1.35262501239776)


def test_real_nifti_can_be_trained_on_and_its_label_maps_lie_on_it(shared, tmp_path):
    tree = tmp_path / "tree"
    source = tmp_path / "hippocampus"
    for folder in ("imagesTr", "labelsTr"):
        (source / folder).mkdir(parents=True)
        for name in ("hippocampus_001.nii.gz", "hippocampus_003.nii.gz"):
            shutil.copy(shared / "hippocampus" / folder / name, source / folder)
    convert(source, tree / "Hippocampus")
    convert(shared / "misc_nifti/MNI152_T1_2mm.nii.gz", tree / "MNI")
    brain = load(tree / "MNI")
    assert brain.shape == (109, 91, 91)
    image = sitk.DICOMOrient(sitk.ReadImage(str(shared / "misc_nifti/MNI152_T1_2mm.nii.gz")), "LPS")
    np.testing.assert_array_equal(brain, sitk.GetArrayFromImage(image).transpose(1, 2, 0))
    image = nibabel.load(source / "labelsTr/hippocampus_001.nii.gz")
    centre = np.argwhere(np.asarray(image.dataobj) > 0).mean(0)  # of RAS axes
    label = load(tree / "Hippocampus", "labels/hippocampus_001.npy")
    rows, columns, slices = np.argwhere(label > 0).mean(0)
    expected = (image.shape[1] - 1 - centre[1], image.shape[0] - 1 - centre[0], centre[2])
    np.testing.assert_allclose((rows, columns, slices), expected)
    samples, store = prepare(tree, size=32, progress=False)
    assert [s.dataset for s in samples] == ["Hippocampus", "Hippocampus", "MNI"]
    assert all(store.read(i, 0, s.slices).std() > 0.1 for i, s in enumerate(samples))


def test_a_cut_gzip_stream_is_called_truncated(tmp_path, capsys):
    file = write_nifti(tmp_path / "a.nii.gz", *stored("RAS"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError):
        convert(file, tmp_path / "out")
    assert "is truncated or damaged" in capsys.readouterr().err
    file.write_bytes(gzip.compress(b"not an image at all" * 100))
    with pytest.raises(UserError):
        convert(file, tmp_path / "out")
    assert "cannot be read" in capsys.readouterr().err


def test_a_ct_series_without_positions_is_refused(tmp_path, capsys):
    folder = write_series(tmp_path / "scan")
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        del data.ImagePositionPatient
        data.save_as(file)
    with pytest.raises(UserError):
        convert(folder, tmp_path / "out")
    assert "has no ImagePositionPatient, so its slices cannot be placed" in capsys.readouterr().err


def test_a_damaged_dicom_header_stops_its_own_file_only(tmp_path, capsys):
    folder = write_series(tmp_path / "scan")
    bad = folder / "000.dcm"
    shutil.copytree(folder, tmp_path / "good")
    bad.write_bytes(bad.read_bytes().replace(b"1.0\\0.0\\0.0\\0.0", b"1.0\\0.0\\0.0\\?.0"))
    with pytest.raises(UserError):
        convert([folder, tmp_path / "good"], tmp_path / "out")
    assert "scan/000.dcm: has a damaged DICOM header" in capsys.readouterr().err
    np.testing.assert_array_equal(load(tmp_path / "out"), AXIAL)


def test_two_places_of_one_name_are_refused_and_overlapping_ones_are_not(tmp_path):
    for root in ("a", "b"):
        write_nifti(tmp_path / root / "images/x.nii", *stored("RAS"))
    with pytest.raises(UserError, match="two of the places hold"):
        convert([tmp_path / "a/images", tmp_path / "b/images"], tmp_path / "out")
    assert len(list(convert([tmp_path / "a", tmp_path / "a/images"], tmp_path / "out").glob("*.npy"))) == 1


def test_test_images_do_not_get_the_label_maps_of_training_images(tmp_path):
    for folder in ("imagesTr", "imagesTs", "labelsTr"):
        write_nifti(tmp_path / f"in/{folder}/case_1{'_0000' * ('images' in folder)}.nii.gz", *stored("RAS"))
    cases = read_table(convert(tmp_path / "in", tmp_path / "out"))
    assert {name: bool(case.label) for name, case in cases.items()} == {
        "in/imagesTr/case_1_0000.nii.gz": True,
        "in/imagesTs/case_1_0000.nii.gz": False,
    }
