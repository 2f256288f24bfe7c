"""A patient, in which every voxel differs, as files of several formats, and the conversion of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import prepare_data
from prepare_data import Config
from utils.errors import UserError

# x grows to the left, y to the back, z to the head, as in DICOM.
PATIENT = np.random.default_rng(0).permutation(10 * 12 * 9).reshape(10, 12, 9).astype(np.int16)
SPACING = {"L": 0.5, "P": 0.75, "S": 2.0}  # mm along the three axes of PATIENT
AXIAL = PATIENT.transpose(1, 0, 2)  # rows to the back, columns to the left, slices to the head
OTHER = dict(zip("RLAPSI", "LRPAIS", strict=True))
LESION = (PATIENT > 900).astype(np.uint8)


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
    """Read as docs/DATA.md tells."""
    with open(dest / "cases.csv", newline="") as file:
        [case] = csv.DictReader(file)
    return np.vstack([np.array(case["affine"].split(), float).reshape(3, 4), [0, 0, 0, 1]])


def refused(capsys: pytest.CaptureFixture, source: Path | list[Path], dest: Path, **settings: Any) -> str:
    """What is said of a source of which nothing can be converted."""
    with pytest.raises(UserError) as error:
        convert(source, dest, **settings)
    return capsys.readouterr().err + str(error.value)


def located(array: np.ndarray, affine: np.ndarray, value: int) -> np.ndarray:
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


def item(**fields: Any) -> Dataset:
    """An item of a sequence."""
    made = Dataset()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def enhanced(pixels: np.ndarray, frames: Sequence[dict[str, Any]], shared: dict[str, Any], **fields: Any) -> Dataset:
    """A multi-frame data set; frames, shared: {sequence: {name: value}} of each frame, of all of them."""
    usual = {
        "PixelMeasuresSequence": {"PixelSpacing": [0.75, 0.5], "SliceThickness": 2},
        "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    }

    def group(content: dict[str, Any]) -> Dataset:
        return item(**{name: [item(**values)] for name, values in content.items()})

    return dicom_slice(
        pixels,
        NumberOfFrames=len(frames),
        SharedFunctionalGroupsSequence=[group({**usual, **shared})],
        PerFrameFunctionalGroupsSequence=[group(frame) for frame in frames],
        **fields,
    )


def at(*position: float) -> dict[str, Any]:
    return {"PlanePositionSequence": {"ImagePositionPatient": list(position)}}
