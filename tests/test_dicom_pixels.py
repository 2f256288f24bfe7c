"""Pixels of DICOM: the same numbers whatever decodes them; colours, padding, tables; claims that are not believed."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from scans import AXIAL, at, convert, dicom_slice, enhanced, item, load, refused, write_series

from conversion.dicom_pixels import intensities
from conversion.volume import BadFile

SHIPPED = Path(pydicom.__file__).parent / "data/test_files"
NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
STORED = np.random.default_rng(1).integers(0, 4000, (3, 20, 24))


def write(path: Path, data: pydicom.Dataset, syntax: Any) -> Path:
    """In a transfer syntax; "JPEG" (lossless, process 14) and "JPEG2000" (lossless) as GDCM writes them."""
    pixels = np.frombuffer(data.PixelData, "<u2").reshape(-1, data.Rows, data.Columns)
    if syntax in NATIVE:
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = pixels.byteswap().tobytes() if syntax == ExplicitVRBigEndian else data.PixelData
        data["PixelData"].VR = "OW"
    elif syntax == RLELossless:
        data.compress(RLELossless, generate_instance_uid=False)
    else:
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(syntax)
        writer.SetFileName(str(path))
        writer.Execute(sitk.GetImageFromArray(pixels))
        coded = pydicom.dcmread(path)
        frames = list(generate_frames(coded.PixelData, number_of_frames=len(pixels)))
        data.file_meta.TransferSyntaxUID = coded.file_meta.TransferSyntaxUID
        # in pieces, and without the table of where frames begin
        data.PixelData = encapsulate(frames, fragments_per_frame=2 if syntax == "JPEG" else 1, has_bot=False)
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    path.unlink(missing_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless, "JPEG", "JPEG2000"], ids=str)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("polarity", ["MONOCHROME1", "MONOCHROME2"])
def test_every_transfer_syntax_gives_the_same_numbers(syntax, signed, polarity, tmp_path):
    stored = (STORED - 2000).astype("<i2") if signed else STORED.astype("<u2")
    fields = {"PhotometricInterpretation": polarity, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}
    scale = {"PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": -1024}}
    own = [{"PixelValueTransformationSequence": {"RescaleSlope": 1, "RescaleIntercept": k}} for k in range(3)]
    places = [at(0, 0, 2.0 * k) for k in range(3)]
    scales = [np.full(3, 2), np.full(3, -1024)], [np.ones(3), np.arange(3)]
    for frames, shared, (slope, intercept) in zip(
        (places, [a | b for a, b in zip(places, own, strict=True)]), (scale, {}), scales, strict=True
    ):
        path = write(tmp_path / "many.dcm", enhanced(stored, frames, shared, **fields), syntax)
        expected = stored * slope[:, None, None] + intercept[:, None, None]
        np.testing.assert_array_equal(intensities([path])[0][path], expected)
        np.testing.assert_array_equal(load(convert(path, tmp_path / f"out{slope[0]}")), expected.transpose(1, 2, 0))
    one = dicom_slice(stored[1], RescaleSlope=3, RescaleIntercept=-7, Modality="DX", **fields)
    path = write(tmp_path / "one.dcm", one, syntax)
    expected = stored[1] * 3 - 7
    np.testing.assert_array_equal(intensities([path])[0][path][0], expected)
    shown = expected.max() + expected.min() - expected if polarity == "MONOCHROME1" else expected
    np.testing.assert_array_equal(intensities([path], picture=True)[0][path][0], shown)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("MR_small_jpeg_ls_lossless", "MR_small"),
        ("MR_small_jp2klossless", "MR_small"),
        ("MR_small_bigendian", "MR_small"),
        ("MR_small_padded", "MR_small"),
        ("JPGExtended", None),  # 12 bits
        ("JPEG-lossy", None),
        ("J2K_pixelrep_mismatch", None),
        ("JPEGLSNearLossless_16", None),
    ],
)
def test_shipped_files_are_read_as_simpleitk_or_their_uncompressed_twins_say(name, like):
    path = SHIPPED / f"{name}.dcm"
    [found] = intensities([path])[0][path]
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(SHIPPED / f"{like or name}.dcm"), imageIO="GDCMImageIO"))
    np.testing.assert_array_equal(found, expected[0])


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_jpeg_gdcm",
        "SC_rgb_jls_lossy_line",
        "SC_rgb_rle_16bit",
        "SC_ybr_full_422_uncompressed",
        "SC_rgb_dcmtk_+eb+cr",
        "examples_ybr_color",
    ],
)
def test_colours_become_luminance_as_those_of_png_do(name, tmp_path):
    dest = convert(SHIPPED / f"{name}.dcm", tmp_path / "out")
    first = next(file for file in sorted(dest.glob("*.png")) if file.name != "montage.png")
    if "gdcm" in name or "jls" in name:
        colours = sitk.GetArrayFromImage(sitk.ReadImage(str(SHIPPED / f"{name}.dcm"))).squeeze()
    else:
        colours = pydicom.pixels.pixel_array(SHIPPED / f"{name}.dcm", index=0)
    if colours.dtype == np.uint8:
        expected = np.asarray(Image.fromarray(colours).convert("L"))
    else:
        expected = np.rint(colours @ [0.299, 0.587, 0.114])
    found = np.asarray(Image.open(first))
    np.testing.assert_allclose(found, expected, atol=int(colours.dtype != np.uint8))
    if name == "examples_ybr_color":
        assert len(list(dest.glob("*.png"))) == 30 + 1  # a film is its frames, beside the montage


def test_a_palette_becomes_luminance_and_colour_slices_are_refused(tmp_path, capsys):
    indices = np.arange(400, dtype=np.uint8).reshape(20, 20) % 4
    tables = {"Red": [0, 255, 0, 9], "Green": [0, 0, 200, 9], "Blue": [255, 0, 0, 9]}
    fields: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR", "Modality": "US"}
    for name, table in tables.items():
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        fields[f"{name}PaletteColorLookupTableData"] = bytes(table)
    dicom_slice(indices, **fields).save_as(tmp_path / "one.dcm", enforce_file_format=True)
    dest = convert(tmp_path / "one.dcm", tmp_path / "out")
    expected = np.rint(np.array(list(tables.values())).T @ [0.299, 0.587, 0.114])[indices]
    np.testing.assert_array_equal(np.asarray(Image.open(dest / "one.png")), expected)
    write_series(
        tmp_path / "scan",
        Modality="MR",
        PixelData=lambda k: bytes(range(240)),
        BitsAllocated=8,
        **{name: value for name, value in fields.items() if name != "Modality"},
    )
    assert "is in colour" in refused(capsys, tmp_path / "scan", tmp_path / "no")


@pytest.mark.parametrize(
    ("pad", "limit", "filled"),
    [(-2000, None, True), (5000, None, True), (-2000, -1990, True), (500, None, False), (-1, None, False)],
)
def test_padding_apart_from_all_values_becomes_the_darkest_and_among_them_stays(pad, limit, filled, tmp_path):
    corner = AXIAL.copy()
    corner[:2, :2, :7] = pad
    folder = write_series(
        tmp_path / "scan",
        PixelData=lambda k: np.ascontiguousarray(corner[:, :, k]).tobytes(),
        PixelPaddingValue=pad,
        RescaleSlope=1,
        RescaleIntercept=-10,
        **({} if limit is None else {"PixelPaddingRangeLimit": limit}),
    )
    for file in folder.iterdir() if pad == -2000 else ():  # as scanners do that write it without its sign
        data = pydicom.dcmread(file)
        data["PixelPaddingValue"].VR, data["PixelPaddingValue"].value = "US", pad + 65536
        data.save_as(file)
    expected = corner.copy()
    if filled:
        expected[:2, :2, :7] = corner[corner != pad].min()
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), expected - 10)


def test_a_table_of_modality_values_is_applied_and_padding_of_negatives_is_dark(tmp_path):
    table = item(LUTDescriptor=[1080, 0, 16], ModalityLUTType="HU", LUTData=(np.arange(1080) * 3).tolist())
    table["LUTData"].VR, table["LUTDescriptor"].VR = "US", "US"
    folder = write_series(tmp_path / "scan", ModalityLUTSequence=[table])
    np.testing.assert_array_equal(load(convert(folder, tmp_path / "out")), AXIAL * 3)
    pixels = np.arange(400, dtype=np.uint16).reshape(20, 20) + 100
    pixels[0] = 65535
    film = dicom_slice(pixels, Modality="DX", PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=65535)
    film.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    shown = np.asarray(Image.open(convert(tmp_path / "film.dcm", tmp_path / "film") / "film.png"))
    assert shown[0].max() == shown.min() == shown[-1, -1] == 120
    assert shown.max() == shown[1, 0] == 499
    film.PixelData = b"\xff" * 800
    film.save_as(tmp_path / "nothing.dcm", enforce_file_format=True)
    assert intensities([tmp_path / "nothing.dcm"], picture=True)[0][tmp_path / "nothing.dcm"][0].min() == 65535


def test_float_pixels_are_read_and_empty_ones_named(tmp_path, capsys):
    values = np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20)
    data = dicom_slice(values, Modality="OT", BitsAllocated=32)
    del data.PixelData, data.BitsStored, data.HighBit, data.PixelRepresentation
    data.FloatPixelData = values.tobytes()
    data.save_as(tmp_path / "map.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(intensities([tmp_path / "map.dcm"], picture=True)[0][tmp_path / "map.dcm"][0], values)
    data = dicom_slice(AXIAL[:, :, 0], Modality="DX", PixelData=b"")
    data.save_as(tmp_path / "empty.dcm", enforce_file_format=True)
    said = refused(capsys, tmp_path / "empty.dcm", tmp_path / "no")
    assert said.count("empty.dcm") == 1
    assert "holds no pixels" in said


def test_what_a_header_claims_is_not_allocated(tmp_path):
    small = dicom_slice(AXIAL[:, :, 0], Modality="DX")
    small.compress(RLELossless, generate_instance_uid=False)
    claims = {
        "wide": {"Rows": 65535, "Columns": 65535},
        "dense": {"Rows": 8000, "Columns": 8000},
        "long": {"NumberOfFrames": 10**6},
    }
    for name, fields in claims.items():
        for key, value in fields.items():
            setattr(small, key, value)
        small.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
    tracemalloc.start()
    for name in claims:
        with pytest.raises(BadFile, match=r"claims|cannot be read"):
            intensities([tmp_path / f"{name}.dcm"], picture=True)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    (tmp_path / "bomb.dcm.gz").write_bytes(gzip.compress(b"\0" * 128 + b"DICM" + bytes(2**27)))
    with pytest.raises(BadFile, match="compressed more than"):
        intensities([tmp_path / "bomb.dcm.gz"])
