"""prepare_data.py: every format gives the same volume, turned as radiologists view it; nothing is lost silently."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scans import AXIAL, LESION, PATIENT, affine_of, convert, load, located, refused, settings, stored, write_nifti

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
        np.testing.assert_allclose(located(AXIAL, affine_of(dest), value), located(image.dataobj, image.affine, value))


def test_all_48_orientations_are_turned_alike_to_all_planes():
    for axes in itertools.permutations(("RL", "AP", "IS")):
        for codes in map("".join, itertools.product(*axes)):
            array, affine = stored(codes)
            affine = nibabel.affines.from_matvec(np.linalg.qr(np.eye(3) + 0.1)[0] * [-1, -1, -1]) @ affine  # oblique
            for plane, wanted in PLANES.items():
                view = arrange(Volume(array, affine, codes=codes), plane)
                expected, upright = stored(wanted)
                np.testing.assert_array_equal(view.array, expected)
                assert view.spacing_mm == pytest.approx(nibabel.affines.voxel_sizes(upright))
                np.testing.assert_allclose(located(view.array, view.affine, 5), located(array, affine, 5))


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
    np.testing.assert_allclose(located(AXIAL, affine_of(dest), 77), located(array, affine, 77))
    assert "not converted" not in capsys.readouterr().out  # nor is the .raw of an .mhd a file of its own


def test_arrays_keep_their_order_and_their_slices_may_lie_along_any_axis(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.asfortranarray(PATIENT.astype(">i2")))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npy", tmp_path / "1")), PATIENT)
    moved = convert(tmp_path / "a.npy", tmp_path / "2", array_axis=0)
    np.testing.assert_array_equal(load(moved), PATIENT.transpose(1, 2, 0))
    np.testing.assert_array_equal(load(convert(tmp_path / "a.npy", tmp_path / "3", orientation="lps")), AXIAL)
    assert "need --orientation" in refused(capsys, tmp_path / "a.npy", tmp_path / "4", slice_axis="axial")
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


@pytest.mark.parametrize(
    ("array", "slope", "intercept", "dtype"),
    [
        (PATIENT.astype(np.uint16), 1, -1024, np.int16),
        (PATIENT, 1, 0, np.int16),
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
    np.testing.assert_allclose(nibabel.affines.apply_affine(affine, [11.5, 7.5, 9.5]), [-15.5, -11.5, 9.5])


def test_resampled_label_maps_hold_no_new_values_and_stay_on_their_image(tmp_path):
    blob = np.zeros((24, 20, 16), np.uint8)
    blob[4:14, 6:12, 5:11] = 4
    for folder, array in (("imagesTr", blob * 25.0 + 1), ("labelsTr", blob)):
        write_nifti(tmp_path / f"in/{folder}/a.nii.gz", array, np.diag([-1, -1, 1, 1]))
    dest = convert(tmp_path / "in", tmp_path / "out", spacing_mm=[0.7, 1.5, 0.5])
    image, label = load(dest) > 51, load(dest / "labels")
    assert set(np.unique(label)) == {0, 4}
    assert 2 * (image & (label > 0)).sum() / (image.sum() + (label > 0).sum()) > 0.97


def test_a_named_window_is_for_ct_and_training_applies_it(tmp_path, capsys):
    file, dest = write_nifti(tmp_path / "a.nii", *stored("RAS", PATIENT - 500)), tmp_path / "tree/ct"
    assert "named one for CT only, but there are 1 of modality unknown" in refused(capsys, file, dest, window="lung")
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
    (source / "bad.nii").write_bytes(b"nothing")
    monkeypatch.setattr(workers, "POOL_AFTER_SECONDS", -1.0)
    convert(source, dest, workers=2, on_error="skip")
    assert len(files := list(dest.glob("*.npy"))) == 24
    assert all(np.array_equal(np.load(file), volume.transpose(1, 0, 2)) for file in files)
    assert not list(dest.glob(".*"))
    alone = convert(source, tmp_path / "alone", on_error="skip")
    assert (alone / "cases.csv").read_bytes() == (dest / "cases.csv").read_bytes()


def test_what_lies_in_the_way_is_named_before_anything_is_converted(tmp_path, capsys):
    file = write_nifti(tmp_path / "a.nii", *stored("RAS"))
    dest = convert(file, tmp_path / "out")
    with prepare_data._only_run(dest), pytest.raises(UserError, match="is writing to"):
        convert(file, dest)
    for place in (dest / "a.npy", tmp_path):
        with pytest.raises(UserError, match=r"^dest: source .* lies inside .* or the other way round"):
            convert(place, dest)
    for root in ("1", "2"):
        write_nifti(tmp_path / root / "images/x.nii", *stored("RAS"))
    places = [tmp_path / "1/images", tmp_path / "2/images"]
    assert "two of the places hold" in refused(capsys, places, tmp_path / "new")


def test_ids_are_unique_on_any_file_system_and_stay():
    def source(name: str) -> Source:
        return Source(name, Path(name).name.split(".")[0], "nifti", (Path(name),))

    names = ["in/a/T1.nii", "in/b/t1.nii", "in/a/T1.npy", "in/Übung 2.nii", "in/c.nii", "in/montage.nii"]
    ids = {s.name: s.id for s in assign_ids([source(n) for n in names], {})}
    assert [ids[n] for n in names[1:2] + names[3:]] == ["in__b__t1", "_bung_2", "c", "in__montage"]
    assert len({i.lower() for i in ids.values()}) == len(names)
    later = {s.name: s.id for s in assign_ids([source(n) for n in [*names, "in/d/c.nii"]], ids)}
    assert later == ids | {"in/d/c.nii": "in__d__c"}


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
    with pytest.raises(UserError, match=r"^dest: "):  # training would not look there
        convert(tmp_path / "in", tmp_path / "labels")
    with pytest.raises(SystemExit) as stop:
        run_script(prepare_data.main, Config, None, [f"--source=[{tmp_path / 'in'}]", f"--dest={tmp_path / 'o'}"])
    assert stop.value.code == 2
    assert "holds nothing to convert" in capsys.readouterr().err


def spoil(root: Path) -> dict[str, str]:
    """A good file and broken ones below `root`, and what must be said of these."""
    root.mkdir()
    good = PATIENT.astype(np.float64)
    np.save(root / "good.npy", good)
    arrays = {
        "nan.npy": (np.where(good == 1, np.nan, good), "1 of 1080 voxels are NaN or Inf"),
        "constant.npy": (good * 0 + 42, "is constant (all values are 42)"),
        "huge.npy": (1e300 * good, "or beyond float32"),
        "4d.npy": (np.stack([good, good]), "choose --channel 0 to 8"),
        "tiny.npy": (good[:5, :4], "slices of 5 x 4 pixels"),
        "object.npy": (np.array([{}], dtype=object), "Python objects"),
    }
    for name, (array, _) in arrays.items():
        np.save(root / name, array)
    grey = Image.fromarray(PATIENT[0].astype(np.uint8))
    grey.save(root / "stack.tif", save_all=True, append_images=[grey.reduce(2)])
    contents = {
        "empty.nii": (b"", "is empty (0 bytes)"),
        "cut.nii.gz": (write_nifti(root / "cut.nii.gz", good).read_bytes()[:-200], "compressed data end early"),
        "cut.npy": ((root / "nan.npy").read_bytes()[:-8], "is truncated"),
        "a.mha": (b"text", "cannot be read"),
        "a.png": (b"\x89PNG text", "is not a readable PNG"),
    }
    for name, (content, _) in contents.items():
        (root / name).write_bytes(content)
    return {name: message for name, (_, message) in (arrays | contents).items()} | {
        "stack.tif": "pages of several sizes"
    }


def test_every_bad_file_is_told_and_the_good_ones_are_kept(tmp_path, capsys):
    expected = spoil(tmp_path / "in")
    said = refused(capsys, tmp_path / "in", tmp_path / "tree/out")
    assert f"problems: {len(expected)}," in said
    for name, message in expected.items():
        assert [line for line in said.splitlines() if f"/in/{name}: " in line and message in line], name
    assert [s.name for s in scan(tmp_path / "tree")[0]] == ["out/good.npy"]


def test_real_nifti_is_turned_as_simpleitk_turns_it(tmp_path):
    file = Path(nibabel.__file__).parent / "tests/data/anatomical.nii"
    dest = convert(file, tmp_path / "out")
    image = sitk.DICOMOrient(sitk.ReadImage(str(file)), "LPS")
    np.testing.assert_array_equal(load(dest), sitk.GetArrayFromImage(image).transpose(1, 2, 0))
