"""Which files are a case: channels, label maps, dataset.json, presets and patterns."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import AXIAL, LESION, PATIENT, convert, load, refused, settings, stored, write_nifti

from conversion.table import read_table
from utils.errors import UserError


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
    assert "a.nii.gz: label map stored as RPS, image as LAS: each turned" in out
    written = settings(dest)
    assert [written[key] for key in ("structures", "modality", "source")] == [{"lesion": [1]}, "MR", "Example; CC-BY"]
    assert [case.patient for case in read_table(dest).values()] == ["p1", "p2", ""]


def test_channels_that_dataset_json_names_are_kept_and_others_are_an_error(decathlon, tmp_path, capsys):
    dest = convert(decathlon, tmp_path / "out")
    np.testing.assert_array_equal(load(dest, "a.npy"), np.stack([AXIAL, AXIAL + 7], axis=3))
    assert load(dest, "labels/a.npy").shape == AXIAL.shape
    assert settings(dest)["channels"] == ["FLAIR", "MRI"]
    (decathlon / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}}))
    assert "--channel 0 to 1, or --channel all" in refused(capsys, decathlon, tmp_path / "series")
    assert settings(convert(decathlon, tmp_path / "all", channel="all"))["channels"] == ["0", "1"]


def test_the_channels_of_nnunet_are_volumes_of_their_own_or_one_case(tmp_path):
    source = tmp_path / "in"
    for channel, shift in (("0000", 0), ("0001", 7)):
        write_nifti(source / f"imagesTr/a_{channel}.nii.gz", *stored("LAS", PATIENT + shift))
    write_nifti(source / "labelsTr/a.nii.gz", *stored("LAS", LESION))
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    (source / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}, "labels": labels}))
    table = read_table(convert(source, tmp_path / "out"))
    assert {case.id: case.modality for case in table.values()} == {"a_0000": "CT", "a_0001": "PT"}
    assert all(case.label for case in table.values())
    dest = convert(source, tmp_path / "all", channel="all", spacing_mm=[0, 0, 1.0])
    assert load(dest, "a.npy").shape == (12, 10, 18, 2)
    np.testing.assert_allclose(load(dest, "a.npy")[..., 1], load(dest, "a.npy")[..., 0] + 7.0, atol=1)
    assert load(dest, "labels/a.npy").shape == (12, 10, 18)
    assert settings(dest)["channels"] == ["CT", "PET"]
    assert settings(dest)["structures"] == {"whole": [1, 2], "core": [2]}


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
    write_nifti(source / "P1/P1_t2.nii.gz", PATIENT[:-1])
    (source / "P2/P2_t1.nii.gz").unlink()
    said = refused(capsys, source, tmp_path / "bad", preset="brats2018")
    assert "P1_t2.nii.gz: 9 x 12 x 9 voxels or their spacing or orientation do not match P1_flair.nii.gz" in said
    assert "P2_flair.nii.gz: its case has 3 of 4 channels; add the others" in said


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
    assert "2 images have no label map" in out
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


@pytest.mark.parametrize("name", ["a_seg", "segmentation-0", "segmentations/label_12"])
def test_label_maps_taken_for_images_are_noticed(name, tmp_path, capsys):
    write_nifti(tmp_path / "in/without_label/a_t1.nii.gz", *stored("RAS"))
    write_nifti(tmp_path / f"in/{name}.nii.gz", *stored("RAS"))
    convert(tmp_path / "in", tmp_path / "out")
    assert "1 files look like label maps" in capsys.readouterr().out
