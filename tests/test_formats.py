"""What people have beside plain NIfTI and DICOM: read as independent readers read it, or refused by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scans import AXIAL, LESION, PATIENT, SPACING, convert, load, refused, settings, stored, write_nifti

from conversion.table import read_table
from conversion.volume import luminance
from datasets.index import scan
from datasets.render import read_grey
from datasets.store import prepare
from downstream.pairs import LabelledVolumes
from downstream.splits import make_split
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

SHIPPED = Path(nibabel.__file__).parent / "tests/data"
GREY = np.random.default_rng(3).permutation(24 * 30).reshape(24, 30).astype(np.uint16)
EIGHT = (GREY % 251).astype(np.uint8)
RGB = np.random.default_rng(4).integers(0, 255, (24, 30, 3), dtype=np.uint8)
LUMINANCE = np.asarray(Image.fromarray(RGB).convert("L"))
MHD = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = {msb}\nCompressedData = {zlib}\n"
    "ElementSpacing = 0.5 0.75 2\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = {file}\n"
)
RAW = PATIENT.tobytes(order="F")


def mhd(path: Path, data: bytes | None = None, file: str = "a.zraw", msb: bool = False, size: str = "10 12 9") -> None:
    path.write_text(MHD.format(msb=msb, zlib=file.endswith(".zraw"), size=size, file=file))
    if data is not None:
        (path.parent / file).write_bytes(data)


def itk(array: np.ndarray = PATIENT) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(tuple(SPACING.values())[: array.ndim])
    return image


# --- volumes


@pytest.mark.parametrize(
    ("kind", "name"), [("MGHImage", "a.mgz"), ("MGHImage", "a.mgh"), ("Nifti1Pair", "a.hdr"), ("Nifti2Image", "a.nii")]
)
def test_what_nibabel_reads_comes_out_as_nifti_does(kind, name, tmp_path):
    array, affine = stored("PIR")
    (tmp_path / "in").mkdir()
    nibabel.save(getattr(nibabel, kind)(array, affine), tmp_path / "in" / name)
    dest = convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(load(dest), AXIAL)
    assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]


@pytest.mark.parametrize(("name", "channel"), [("small.mnc", None), ("phantom_EPI_asc_CLEAR_2_1.PAR", 1)])
def test_minc_and_par_rec_agree_with_nibabel(name, channel, tmp_path):
    for file in SHIPPED.glob(Path(name).stem + ".*"):
        shutil.copy(file, tmp_path)
    dest = convert(tmp_path / name, tmp_path / "out", channel=channel)
    image = nibabel.as_closest_canonical(nibabel.load(SHIPPED / name))  # to the right, front and head
    data = np.asarray(image.dataobj)
    wanted = (data if channel is None else data[..., channel])[::-1, ::-1].transpose(1, 0, 2)
    np.testing.assert_allclose(load(dest), wanted, rtol=1e-5)
    x, y, z = image.header.get_zooms()[:3]
    assert settings(dest)["spacing_mm"] == pytest.approx([y, x, z], rel=1e-3)


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e3), ("meter", 1e-3), ("mm", 1)])
def test_lengths_are_millimetres_whatever_unit_the_header_has(unit, factor, tmp_path):
    array, affine = stored("LPS")
    image = nibabel.Nifti1Image(array, np.diag([factor] * 3 + [1]) @ affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    scaled = itk()
    scaled.SetSpacing([factor * mm for mm in SPACING.values()])
    sitk.WriteImage(scaled, str(tmp_path / "b.nrrd"))
    head, _, body = (tmp_path / "b.nrrd").read_bytes().partition(b"\n\n")
    short = {"micron": "um", "meter": "m"}.get(unit, unit)
    (tmp_path / "b.nrrd").write_bytes(head + f'\nspace units: "{short}" "{short}" "{short}"\n\n'.encode() + body)
    for file in ("a.nii.gz", "b.nrrd"):
        dest = convert(tmp_path / file, tmp_path / f"out_{file}")
        assert settings(dest)["spacing_mm"] == [0.75, 0.5, 2.0]
        np.testing.assert_array_equal(load(dest), AXIAL)


def test_what_libraries_warn_of_is_noted_with_its_file(tmp_path, capfd):
    content = bytearray(write_nifti(tmp_path / "a.nii", PATIENT).read_bytes())
    content[80:92] = bytes(12)  # pixdim
    content[254:256] = bytes(2)  # sform_code
    (tmp_path / "a.nii").write_bytes(content)
    convert(tmp_path / "a.nii", tmp_path / "out")
    captured = capfd.readouterr()
    assert [line for line in captured.out.splitlines() if "/a.nii: " in line and "setting 0 dims to 1" in line]
    assert "pixdim" not in captured.err


def test_metaimages_are_read_in_every_layout_of_their_data(tmp_path):
    mhd(tmp_path / "a.mhd", zlib.compress(RAW))
    mhd(tmp_path / "b.mhd", zlib.compress(PATIENT.astype(">i2").tobytes(order="F")), "b.zraw", msb=True)
    mhd(tmp_path / "c.mhd", gzip.compress(RAW), "c.zraw")
    for k in range(9):
        (tmp_path / f"d{k:02}.raw").write_bytes(RAW[k * 240 : (k + 1) * 240])
    mhd(tmp_path / "d.mhd", file="LIST\n" + "\n".join(f"d{k:02}.raw" for k in range(9)))
    mhd(tmp_path / "e.mhd", file="d%02d.raw 0 8 1")
    dest = convert(tmp_path, tmp_path.parent / f"{tmp_path.name}_out")
    for name in "abcde":
        np.testing.assert_array_equal(load(dest, f"{name}.npy"), AXIAL)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz", "a.nrrd", "a.mha", "a.npz", "a.h5"])
@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_damaged_compressed_data_are_never_taken_for_voxels(name, damage, tmp_path, capsys):
    smooth = np.cumsum(PATIENT % 3, axis=0, dtype=np.int16)
    if name.endswith((".nii.gz", ".mgz")):
        nibabel.save((nibabel.Nifti1Image if ".nii" in name else nibabel.MGHImage)(smooth, np.eye(4)), tmp_path / name)
    elif name.endswith(".npz"):
        np.savez_compressed(tmp_path / name, image=smooth)
    elif name.endswith(".h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("image", data=smooth, compression="gzip")
    else:
        sitk.WriteImage(itk(smooth), str(tmp_path / name), True)
    good = (tmp_path / name).read_bytes()
    at = len(good) // 2
    if name.endswith(".h5"):  # whose own tables take most of a small file
        with h5py.File(tmp_path / name) as file:
            chunk = file["image"].id.get_chunk_info(0)
            at = chunk.byte_offset + chunk.size // 2
    bad = good[: at + 9] if damage == "cut" else good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :]
    (tmp_path / name).write_bytes(bad)
    said = refused(capsys, tmp_path / name, tmp_path / "out", array_axis=2)
    assert said.count(f"/{name}: ") == 1
    assert "Traceback" not in said


# --- pictures


def as_file(name: str) -> Callable[[Path], None]:
    """Writes a picture as `name` says."""
    turned = Image.Exif()
    turned[0x0112] = 6
    array, image = (RGB if "rgb" in name else EIGHT), Image.fromarray(RGB if "rgb" in name else EIGHT)
    special = {
        "turned.jpg": lambda p: Image.fromarray(np.kron(EIGHT, np.ones((8, 8), np.uint8))).save(
            p, exif=turned, quality=98
        ),
        "turned.png": lambda p: image.save(p, exif=turned),
        "turned.tif": lambda p: image.save(p, tiffinfo={274: 6}, compression="tiff_lzw"),
        "deep.pgm": lambda p: Image.fromarray(GREY).save(p),
        "flat.nii.gz": lambda p: nibabel.save(nibabel.Nifti1Image(GREY.T.astype(np.int16), np.diag([-1, -1, 1, 1])), p),
        "flat.mha": lambda p: sitk.WriteImage(sitk.GetImageFromArray(GREY), str(p)),
    }
    plain = {
        ".npy": lambda p: np.save(p, array),
        ".npz": lambda p: np.savez(p, only=array),
        ".h5": lambda p: h5py.File(p, "w").create_dataset("only", data=array).file.close(),
        ".webp": lambda p: image.save(p, lossless=True),
    }
    return special.get(name) or plain.get(os.path.splitext(name)[1]) or image.save


@pytest.mark.parametrize(
    "name",
    [
        *("a.gif", "a.webp", "a.jp2", "a.pgm", "deep.pgm", "rgb.ppm", "rgb.bmp", "rgb.webp", "a.npy", "a.npz", "a.h5"),
        *("rgb.npy", "rgb.npz", "rgb.h5", "flat.nii.gz", "flat.mha", "turned.jpg", "turned.png", "turned.tif"),
    ],
)
def test_pictures_of_every_format_are_their_luminance_and_training_takes_them(name, tmp_path):
    as_file(name)(tmp_path / name)
    dest = convert(tmp_path / name, tmp_path / "tree/out")
    (sample,) = scan(tmp_path / "tree")[0]
    found = read_grey(sample.path)
    wanted = LUMINANCE if "rgb" in name else GREY if name.startswith(("deep", "flat")) else EIGHT
    wanted = np.rot90(wanted, -1) if "turned" in name else wanted
    if name == "turned.jpg":
        found = found[4::8, 4::8]
    np.testing.assert_allclose(found, wanted, atol=30 if name == "turned.jpg" else 0)
    assert sample.kind == "image"
    assert not list(dest.glob("*.npy"))
    prepare(tmp_path / "tree", 16, progress=False)


def test_luminance_is_pils():
    np.testing.assert_array_equal(luminance(RGB), LUMINANCE)


def test_colour_volumes_become_their_luminance(tmp_path):
    colours = np.random.default_rng(5).integers(0, 255, (10, 12, 9, 3), dtype=np.uint8)
    structured = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    write_nifti(tmp_path / "a.nii.gz", structured)
    for name in ("b.mha", "c.nrrd"):
        image = sitk.GetImageFromArray(np.ascontiguousarray(colours.transpose(2, 1, 0, 3)), True)
        sitk.WriteImage(image, str(tmp_path / name))
    dest = convert([tmp_path / name for name in ("a.nii.gz", "b.mha", "c.nrrd")], tmp_path / "out")
    for name in "abc":
        np.testing.assert_array_equal(load(dest, f"{name}.npy"), luminance(colours).transpose(1, 0, 2))


def test_tiff_stacks_are_volumes_and_imagej_says_which_pages_are_channels(tmp_path, capsys):
    pages = [Image.fromarray(PATIENT[:, :, k].astype(np.uint16)) for k in range(8)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(load(convert(tmp_path / "a.tif", tmp_path / "1")), PATIENT[:, :, :8])
    info = {270: "ImageJ=1.53t\nimages=8\nchannels=2\nslices=4\n"}
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:], tiffinfo=info)
    np.testing.assert_array_equal(load(convert(tmp_path / "b.tif", tmp_path / "2", channel=1)), PATIENT[:, :, 1:8:2])
    assert "2 channels; choose --channel" in refused(capsys, tmp_path / "b.tif", tmp_path / "3")


def test_arrays_of_many_cases_become_cases(tmp_path):
    rng = np.random.default_rng(6)
    arrays = {"train_images": rng.integers(0, 99, (3, 12, 14), np.uint8), "train_labels": np.zeros((3, 1), np.uint8)}
    arrays |= {"test_images": rng.integers(0, 99, (2, 12, 14), np.uint8), "test_labels": np.ones((2, 1), np.uint8)}
    np.savez_compressed(tmp_path / "mnist.npz", **arrays)
    dest = convert(tmp_path / "mnist.npz", tmp_path / "flat")
    assert len(read_table(dest)) == 5
    np.testing.assert_array_equal(read_grey(dest / "mnist_test_00001.png"), arrays["test_images"][1])
    volumes = np.random.default_rng(7).integers(0, 99, (10, 12, 9, 4)).astype(np.int16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = volumes
    dest = convert(tmp_path / "a.h5", tmp_path / "deep", case_axis=3)
    np.testing.assert_array_equal(load(dest, "a_x_00002.npy"), volumes[..., 2])


def test_cases_that_an_array_only_claims_to_hold_are_not_listed(tmp_path, capsys):
    (tmp_path / "a.npy").write_bytes(npy_claim())
    assert "the file holds 4" in refused(capsys, tmp_path / "a.npy", tmp_path / "out", case_axis=0)


@pytest.mark.parametrize("label", ["c.png", "c_mask.png", "c.nii.gz", "c.nii"])
def test_pictures_have_label_maps_as_pictures(label, tmp_path, capsys):
    mask = (EIGHT > 99).astype(np.uint8)
    (tmp_path / "in/labelsTr").mkdir(parents=True)
    (tmp_path / "in/imagesTr").mkdir()
    Image.fromarray(EIGHT).save(tmp_path / "in/imagesTr/c_0000.png")
    if label.endswith(".png"):
        Image.fromarray(mask).save(tmp_path / "in/labelsTr" / label)
    else:
        mask = mask if label.endswith(".gz") else mask[..., None]  # one slice
        write_nifti(tmp_path / "in/labelsTr" / label, mask.swapaxes(0, 1), np.diag([-1, -1, 1, 1]))
        mask = mask.reshape(EIGHT.shape)
    dest = convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(read_grey(dest / "labels/c_0000.png"), mask)
    Image.fromarray(EIGHT[1:]).save(tmp_path / "in/imagesTr/c_0000.png")
    assert "24 x 30 pixels do not match its image, 23 x 30 pixels" in refused(capsys, tmp_path / "in", tmp_path / "no")


def test_a_label_map_may_lie_beside_each_case_of_an_array_and_others_have_none(tmp_path):
    many, masks = np.stack([EIGHT, EIGHT[::-1]]), np.stack([EIGHT, EIGHT[::-1]]) // 128
    (tmp_path / "in/labels").mkdir(parents=True)
    np.save(tmp_path / "in/p.npy", many)
    np.save(tmp_path / "in/labels/p.npy", masks)
    np.savez(tmp_path / "q.npz", image=many, mask=masks)
    write_nifti(tmp_path / "whole.nii", PATIENT)
    keys = {"array_key": "image", "label_key": "mask"}
    beside = convert(tmp_path / "in", tmp_path / "1", case_axis=0)
    within = convert([tmp_path / "q.npz", tmp_path / "whole.nii"], tmp_path / "2", case_axis=0, **keys)
    for dest in (beside, within):
        for label, mask in zip(sorted((dest / "labels").iterdir()), masks, strict=True):
            np.testing.assert_array_equal(read_grey(label), mask)


NO_LABELS = {  # label maps, and what must be said of each
    "rgb.png": (lambda p: Image.fromarray(RGB).save(p), "has colours (mode RGB)"),
    "a.jpg": (lambda p: Image.fromarray(EIGHT // 128).save(p), "is JPEG"),
    "float.tif": (lambda p: Image.fromarray(EIGHT.astype(np.float32)).save(p), "mode F"),
    "p.gif": (lambda p: Image.fromarray(RGB).quantize(9).save(p), "mode P"),
    "rgb.nii": (
        lambda p: write_nifti(p, RGB.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]),
        "holds 3 channels or colours",
    ),
    "four.nii": (lambda p: write_nifti(p, np.stack([EIGHT[..., None]] * 2, 3)), "holds 2 channels or colours"),
}


@pytest.mark.parametrize("name", NO_LABELS)
def test_what_cannot_be_label_values_is_no_label_map(name, tmp_path, capsys):
    write, said = NO_LABELS[name]
    (tmp_path / "in/labels").mkdir(parents=True)
    Image.fromarray(EIGHT).save(tmp_path / f"in/{Path(name).stem}.png")
    write(tmp_path / "in/labels" / name)
    assert said in refused(capsys, tmp_path / "in", tmp_path / "out")


# --- refused by name


def npy_claim() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i2", "fortran_order": False, "shape": (9999, 9999, 999)})
    return buffer.getvalue() + b"1234"


def write_odd(root: Path) -> None:
    """Odd files below `root`, those of ODD and what lies beside them."""
    huge = nibabel.Nifti1Header()
    huge.set_data_dtype(np.int16)
    huge.set_data_shape((9999, 9999, 999))
    huge["vox_offset"] = 352
    (root / "claims.nii").write_bytes(huge.binaryblock + bytes(4))
    (root / "claims.nii.gz").write_bytes(gzip.compress(huge.binaryblock + bytes(400)))
    mhd(root / "claims.mhd", zlib.compress(bytes(99)), "claims.zraw", size="9999 9999 999")
    nrrd = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9999 9999 999\nendian: little\nencoding: gzip\n\n"
    (root / "claims.nrrd").write_bytes(nrrd + gzip.compress(bytes(99)))
    (root / "claims.npy").write_bytes(npy_claim())
    with zipfile.ZipFile(root / "claims.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy_claim())
    with h5py.File(root / "claims.h5", "w") as file:
        file.create_dataset("a", (9999, 9999, 999), np.int16, chunks=(99, 99, 9), compression="gzip")
    outside = root.parent / "outside.raw"
    outside.write_bytes(RAW)
    mhd(root / "outside.mhd", file="../outside.raw")
    mhd(root / "list.mhd", file="LIST\n" + "\n".join([str(outside)] * 9))
    (root / "outside.nhdr").write_text(
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: 10 12 9\nendian: little\nencoding: raw\ndata file: {outside}\n\n"
    )
    with h5py.File(root / "outside.h5", "w") as file:
        file.create_dataset("a", PATIENT.shape, PATIENT.dtype, external=[(str(outside), 0, PATIENT.nbytes)])
    layout = h5py.VirtualLayout(PATIENT.shape, PATIENT.dtype)
    layout[...] = h5py.VirtualSource(str(root / "claims.h5"), "a", PATIENT.shape)
    with h5py.File(root / "virtual.h5", "w") as file:
        file.create_virtual_dataset("a", layout)
    mhd(root / "missing.mhd", file="missing.raw")
    mhd(root / "short.mhd", RAW[:99], "short.raw")
    mhd(root / "zshort.mhd", zlib.compress(RAW[:999]), "zshort.zraw")
    mhd(root / "zero.mhd", RAW, "zero.raw")
    (root / "zero.mhd").write_text((root / "zero.mhd").read_text().replace("0.5 0.75 2", "0.5 0 2"))
    (root / "four.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 4\nspace: left-posterior-superior\nsizes: 10 12 9 1\n"
        b"space directions: (1,0,0) (0,1,0) (0,0,2) none\nkinds: domain domain domain domain\nendian: little\n"
        b"encoding: raw\nspace origin: (0,0,0)\n\n" + RAW
    )
    write_nifti(root / "zipped.nii.gz", PATIENT).rename(root / "zipped.nii")
    write_nifti(root / "plain.nii", PATIENT).rename(root / "plain.nii.gz")
    mask = nibabel.cifti2.BrainModelAxis.from_mask(np.ones((3, 3, 3)), affine=np.eye(4))
    axes = (nibabel.cifti2.SeriesAxis(0, 1, 4), mask)
    nibabel.save(nibabel.cifti2.Cifti2Image(np.ones((4, 27), np.float32), axes), root / "surface.dtseries.nii")
    with h5py.File(root / "first.h5", "w") as file:
        file["a"] = np.arange(10 * 64 * 60, dtype=np.int16).reshape(10, 64, 60)
    np.save(root / "colours.npy", RGB.astype(np.float32))
    Image.fromarray(EIGHT).save(root / "film.gif", save_all=True, append_images=[Image.fromarray(255 - EIGHT)])
    Image.fromarray(EIGHT).save(root / "side.tif", tiffinfo={274: 6})
    Image.fromarray(np.where(EIGHT > 9, np.float32(1), np.float32(np.inf))).save(root / "inf.tif")
    Image.new("RGB", (30, 24), (9, 200, 30)).save(root / "solid.png")
    Image.fromarray(np.dstack([EIGHT * 0 + 9] * 3 + [EIGHT])).save(root / "alpha.png")
    (root / "picture.xyz").write_text("x")
    (root / "lonely.img").write_bytes(b"x" * 999)
    os.mkfifo(root / "pipe.nii")
    os.mkfifo(root / "pipe")


ODD = {  # what must be said of each
    "claims.nii": "promises 199760041998 bytes of voxels, the file holds 352",
    "claims.nii.gz": "compressed bytes cannot hold as many",
    "claims.mhd": "compressed bytes cannot hold as many",
    "claims.nrrd": "compressed bytes cannot hold as many",
    "claims.npy": "the file holds 4",
    "claims.npz": "the file holds 4",
    "claims.h5": "0 compressed bytes cannot hold as many",
    "outside.mhd": "takes its voxels from '../outside.raw', outside its folder",
    "list.mhd": "outside its folder",
    "outside.nhdr": "outside its folder",
    "outside.h5": "a lies in other files",
    "virtual.h5": "a lies in other files",
    "missing.mhd": "its data file missing.raw is missing",
    "short.mhd": "promises 2160 bytes of voxels, the file holds 99",
    "zshort.mhd": "its compressed data end after 999 of 2160 bytes",
    "zero.mhd": "has no usable geometry",
    "four.nrrd": "(kinds: domain domain domain list)",
    "zipped.nii": "rename it to zipped.nii.gz",
    "plain.nii.gz": "rename it to plain.nii,",
    "surface.dtseries.nii": "is no volume (Cifti2Image",
    "first.h5": "say --array_axis 0",
    "colours.npy": "say --array_axis 2 for slices",
    "film.gif": "is a film of 2 frames",
    "side.tif": "stored on its side",
    "inf.tif": "voxels are NaN or Inf",
    "solid.png": "is constant",
    "alpha.png": "is constant",
    "picture.xyz": "is of no format that is read (.xyz)",
    "lonely.img": "holds voxels alone; copy its header (.hdr)",
    "pipe.nii": "is not a regular file",
    "pipe": "is not a regular file",
}


def test_odd_files_are_refused_by_name_once_with_the_true_reason_and_without_the_memory_they_claim(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    write_odd(tmp_path / "in")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refused(capfd, tmp_path / "in", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    lines = {
        line.split("/in/", 1)[1].split(": ")[0]: line for line in said.splitlines() if line.startswith("problem: ")
    }
    assert lines.keys() == ODD.keys()
    for name, message in ODD.items():
        assert message in lines[name], name
        assert lines[name].count(f"/in/{name}") == 1
    assert len(said.splitlines()) == len(ODD) + 1  # nothing that libraries print


def test_the_remedies_named_work(tmp_path):
    (tmp_path / "in").mkdir()
    write_odd(tmp_path / "in")
    assert load(convert(tmp_path / "in/first.h5", tmp_path / "1", array_axis=0)).shape == (64, 60, 10)
    assert load(convert(tmp_path / "in/colours.npy", tmp_path / "2", array_axis=2)).shape == (24, 30, 3)
    text = (
        (tmp_path / "in/four.nrrd").read_bytes().replace(b"domain domain domain domain", b"domain domain domain list")
    )
    (tmp_path / "in/four.nrrd").write_bytes(text)
    np.testing.assert_array_equal(load(convert(tmp_path / "in/four.nrrd", tmp_path / "3")), AXIAL)
    (tmp_path / "in/zipped.nii").rename(tmp_path / "in/zipped.nii.gz")
    np.testing.assert_array_equal(load(convert(tmp_path / "in/zipped.nii.gz", tmp_path / "4")), AXIAL)


def test_scouts_are_left_out_on_demand_and_said(tmp_path, capsys):
    write_nifti(tmp_path / "in/good.nii", PATIENT)
    write_nifti(tmp_path / "in/scout.nii", PATIENT[:, :, :3])
    dest = convert(tmp_path / "in", tmp_path / "out")
    assert len(read_table(dest)) == 2
    convert(tmp_path / "in", dest, min_slices=4)
    out, err = capsys.readouterr()
    assert "/scout.nii: has 3 slices, fewer than --min_slices 4" in err
    assert "left out: 1, problems: 0" in out
    assert [file.name for file in dest.glob("*.npy")] == ["good.npy"]
    assert len(read_table(dest)) == 1


def test_one_sagittal_slice_stays_one(tmp_path):
    affine = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    dest = convert(write_nifti(tmp_path / "a.nii", PATIENT[:, :, :1], affine), tmp_path / "out")
    assert settings(dest)["plane"] == "sagittal"
    assert load(dest).shape == (12, 10, 1)


# --- patients


def test_patients_reach_the_splits_of_downstream_tasks(tmp_path):
    people = {f"c{k}": f"p{k // 2}" for k in range(6)}
    for case in people:
        write_nifti(tmp_path / f"in/imagesTr/{case}.nii.gz", PATIENT + int(case[1]))
        write_nifti(tmp_path / f"in/labelsTr/{case}.nii.gz", LESION)
    pairs = [{"image": f"imagesTr/{c}.nii.gz", "label": f"labelsTr/{c}.nii.gz"} for c in people]
    for number, told in enumerate(
        (
            {"patient": people, "training": pairs},
            {"patients": {p: [c for c in people if people[c] == p] for p in people.values()}, "training": pairs},
            {"training": [pair | {"patient": people[pair["image"][9:11]]} for pair in pairs]},
            {"cases": [pair | {"patient": people[pair["image"][9:11]]} for pair in pairs]},
        )
    ):
        (tmp_path / "in/dataset.json").write_text(json.dumps({"labels": {"1": "lesion"}} | told))
        for source in (tmp_path / "in", *[tmp_path / "in/imagesTr"] * (number == 0)):
            cases = read_table(convert(source, tmp_path / f"{number}{source.name}")).values()
            assert {case.id: case.patient for case in cases} == people
        data = LabelledVolumes(tmp_path / f"{number}in")
        split = make_split([p.case for p in data.pairs], [p.patient for p in data.pairs], (0.34, 0.33, 0.33), seed=1)
        assert not {people[c] for c in split.train} & {people[c] for c in (*split.validation, *split.test)}


def test_patients_of_bids_and_those_filled_in_by_hand_stay(tmp_path, capsys):
    for k in range(2):
        write_nifti(tmp_path / f"in/sub-0{k}/anat/sub-0{k}_T1w.nii.gz", PATIENT + k)
    write_nifti(tmp_path / "in/other.nii.gz", PATIENT + 2)
    dest = convert(tmp_path / "in", tmp_path / "out")
    assert "1 of 3 cases have no patient, e.g. in/other.nii.gz" in capsys.readouterr().out
    table = (dest / "cases.csv").read_text()
    (dest / "cases.csv").write_text(
        table.replace("other,in/other.nii.gz,other.npy,,,", "other,in/other.nii.gz,other.npy,,me,")
    )
    for settings_ in ({}, {"slice_axis": "coronal"}):  # there already, and made again
        cases = read_table(convert(tmp_path / "in", dest, **settings_)).values()
        assert sorted(case.patient for case in cases) == ["me", "sub-00", "sub-01"]


# --- nothing outside the folder, no waiting for ever


@pytest.mark.parametrize(
    ("column", "value"), [("id", "../a"), ("file", "../../a.npy"), ("label", "labels/../../a.npy")]
)
def test_names_in_cases_csv_never_lead_elsewhere(column, value, tmp_path):
    write_nifti(tmp_path / "in/a.nii", PATIENT)
    dest = convert(tmp_path / "in", tmp_path / "out")
    case = next(iter(read_table(dest).values()))
    before = vars(case)[column]
    text = (dest / "cases.csv").read_text()
    row = text.splitlines()[1].split(",")
    row[text.splitlines()[0].split(",").index(column)] = value
    (dest / "cases.csv").write_text(text.splitlines()[0] + "\n" + ",".join(row) + "\n")
    with pytest.raises(UserError, match=r"cases\.csv, line 2: .* is no plain file name"):
        convert(tmp_path / "in", dest, slice_axis="coronal")
    assert before != value


@pytest.mark.parametrize("name", ["labels", "cases.csv", "dataset.yaml", ".prepare.lock", "montage.png"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_links_or_waited_for(name, kind, tmp_path):
    write_nifti(tmp_path / "in/a.nii", PATIENT)
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    if kind == "link":
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(UserError, match=r"is a link or no regular file|cannot be written"):
        convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "precious"


def test_links_to_label_maps_never_make_them_volumes(tmp_path):
    write_nifti(tmp_path / "in/a.nii.gz", PATIENT)
    write_nifti(tmp_path / "in/labels/a.nii.gz", LESION)
    write_nifti(tmp_path / "elsewhere/masks/b.nii.gz", LESION)
    write_nifti(tmp_path / "in/b.nii.gz", PATIENT + 1)
    (tmp_path / "in/0").symlink_to("labels")
    (tmp_path / "in/seg").symlink_to(tmp_path / "elsewhere/masks")
    dest = convert(tmp_path / "in", tmp_path / "tree/out")
    assert {case.id: bool(case.label) for case in read_table(dest).values()} == {"a": True, "b": True}
    (dest / "0").symlink_to("labels")
    (dest / "c.npy").symlink_to("labels/a.npy")
    (tmp_path / "tree/other").symlink_to("out/labels")
    assert [sample.name for sample in scan(tmp_path / "tree")[0]] == ["out/a.npy", "out/b.npy"]
