"""Segmentation: pairs, splits and encoders it builds upon, the network, training, and what users get wrong."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save as tiny_save
from tiny import save_weights, write_pairs
from torch import Tensor, nn

import prepare_data
from downstream import segment
from downstream.encoders import has_transformer, load_encoder, load_joint_encoder
from downstream.pairs import LabelledVolumes, number_classes, read_image, read_label
from downstream.segment import Config, Segmentation, SliceUNet, augment, run
from downstream.splits import Split, check_split, choose_labelled, draw_split, make_split, write_split
from models.encoder import JointEncoder
from models.resnet import GreyResNet
from utils.errors import UserError
from utils.files import write_csv

pytestmark = pytest.mark.usefixtures("one_thread")
MADE_BY = {"config": {"arch": "resnet18", "d_model": 16, "layers": 1}}


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cases of seven patients; tests must not change them."""
    return write_pairs(tmp_path_factory.mktemp("balls") / "balls")


def tiny(root: Path, out: Path, **changes) -> Config:
    chosen = {
        "data_path": str(root), "dump_path": str(out), "arch": "resnet18", "size": 32, "epochs": 2, "batch_size": 8,
        "device": "cpu", "labelled": 2, "d_model": 16, "inter_slices": 4, "precision": "fp32",
    }  # fmt: skip
    return Config(**chosen | changes)


def opened(cfg: Config) -> Segmentation:
    """The task with its split and its cases in memory."""
    found = Segmentation(cfg, torch.device("cpu"))
    found.split = draw_split(cfg.split, cfg.fractions, found.patients, cfg.split_seed)
    found.labelled = found.choose(found.split.train)
    found.load()
    return found


# Pairs


def test_what_prepare_data_writes_is_read_in_slice_order(tmp_path):
    """Four channels and nested regions, as in BraTS."""
    label = np.array([0, 1, 2, 4], np.uint8)[np.random.default_rng(0).integers(0, 4, (12, 10, 9))]
    folder = tmp_path / "source/HGG/Brats18_1"
    folder.mkdir(parents=True)
    for number, kind in enumerate(("seg", "flair", "t1", "t1ce", "t2")):
        nifti = nibabel.Nifti1Image(label + 10 * number, np.diag([1.5, 1.0, 2.0, 1.0]))
        nibabel.save(nifti, folder / f"Brats18_1_{kind}.nii.gz")
    with pytest.raises(UserError, match=r"NIfTI files; .* prepare_data.py --source \S+source --dest Training_Data"):
        LabelledVolumes(tmp_path / "source")
    made = {"source": str(tmp_path / "source"), "dest": str(tmp_path / "data"), "preset": "brats2018", "workers": 1}
    prepare_data.main(prepare_data.Config(**made))
    data = LabelledVolumes(tmp_path / "data")
    [pair] = data.pairs
    assert data.structures == {"whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": [4]}
    assert data.classes == {0: 0, 1: 1, 2: 2, 4: 3}  # disjoint, as a softmax needs them
    assert number_classes({"atrium": [420, 421], "ventricle": [500]}) == {0: 0, 420: 1, 421: 1, 500: 2}
    assert (pair.shape, pair.image.channels, pair.spacing_mm) == ((9, 10, 12), 4, (2.0, 1.0, 1.5))
    values = np.array([0, 1, 2, 4])[read_label(pair, data.classes)]
    for number, image in enumerate(read_image(pair), start=1):
        np.testing.assert_array_equal(image, values + 10 * number)
    assert np.bincount(values.ravel()).tolist() == np.bincount(label.ravel()).tolist()


def test_arrays_of_several_channels_and_any_slice_axis(tmp_path):
    (tmp_path / "labels").mkdir()
    image = np.random.default_rng(0).random((9, 10, 11, 4))
    for case in "abc":
        np.save(tmp_path / f"{case}.npy", image)
        np.save(tmp_path / f"labels/{case}.npy", np.ones((9, 10, 11), np.uint8))
    (tmp_path / "labels/c.npy").unlink()
    (tmp_path / "dataset.yaml").write_text(
        "spacing_mm: [1, 2, 3]\nslice_axis: 0\nchannels: [t1, t2, t1ce, flair]\nstructures: {all: [1]}\n"
    )
    rows = [{"id": "b", "label": "labels/b.npy", "spacing_mm": "5 x 2 x 3"}, {"id": "c", "label": "", "spacing_mm": ""}]
    write_csv(rows, tmp_path / "cases.csv")
    data = LabelledVolumes(tmp_path)
    assert [pair.spacing_mm for pair in data.pairs] == [(1, 2, 3), (5, 2, 3)]
    assert "1 volumes without labels, which are left out" in data.notes
    np.testing.assert_array_equal(read_image(data.pairs[0]), image.transpose(3, 0, 1, 2))
    turned = LabelledVolumes(tmp_path, {"one": [1]}, slice_axis=1, window=[0.2, 0.8]).pairs[0]
    assert (turned.shape, turned.spacing_mm, turned.image.window) == ((10, 9, 11), (2, 1, 3), (0.2, 0.8))


# Splits


def test_a_patient_is_in_one_part_order_does_not_matter_and_every_part_gets_one():
    cases = [f"c{i}" for i in range(40)]
    patients = [f"p{i % 17}" for i in range(40)]
    split = make_split(cases, patients, [0.5, 0.2, 0.3], seed=3)
    check_split(split, dict(zip(cases, patients, strict=True)))
    assert sorted(split.train + split.validation + split.test) == sorted(cases)
    assert make_split(cases[::-1], patients[::-1], [0.5, 0.2, 0.3], seed=3) == split
    assert make_split(cases, patients, [0.5, 0.2, 0.3], seed=4) != split
    few = make_split(list("abc"), list("xyz"), [0.98, 0.01, 0.01], seed=0)
    assert [len(part) for part in (few.train, few.validation, few.test)] == [1, 1, 1]
    with pytest.raises(UserError, match="2 patient"):
        make_split(list("abc"), list("xyy"), [0.98, 0.01, 0.01], seed=0)
    chosen = [choose_labelled(cases[::step], count, seed=1) for count, step in ((5, 1), (10, -1), (0, 1))]
    assert chosen[0] == chosen[1][:5] == chosen[2][:5]  # smaller choices are within larger ones
    assert sorted(chosen[2]) == sorted(cases)
    whole = choose_labelled(list("abcdef"), 4, 0, dict(zip("abcdef", "xyzzxy", strict=True)))
    assert set(whole) in (set("aebf"), set("aecd"), set("bfcd"))  # two patients with all of theirs


def test_a_split_may_leave_out_folders_and_suffixes_or_have_those_of_another_task(tmp_path):
    def named(split: Split, patients: dict[str, str]) -> Split:
        write_split(split, tmp_path / "split.json")
        return draw_split(str(tmp_path / "split.json"), (), patients, 0)

    cases = {name: name for name in ("imagesTr/a_1.npy", "imagesTr/a_2.npy", "imagesTr/b.npy", "other/b.npy")}
    whole = Split(["imagesTr/a_1.npy"], ["imagesTr/a_2.npy"], ["other/b.npy"])
    assert named(Split(["a_1"], ["imagesTr/a_2"], ["other/b"]), cases) == named(whole, cases) == whole
    assert named(Split(["x/a.nii.gz"], ["b"], ["c.nii.gz"]), {c: c for c in "abc"}) == Split(["a"], ["b"], ["c"])
    with pytest.raises(UserError, match=r"'b' may be imagesTr/b\.npy or other/b\.npy"):
        named(Split(["b"], [], []), cases)
    with pytest.raises(UserError, match="train names 'x', which is not among the 2 cases"):
        named(Split(["x"], ["a"], ["b"]), {"a": "p", "b": "q"})
    with pytest.raises(UserError, match="patient p is in two parts: in train and, with d, in test"):
        named(Split(["b"], ["c"], ["d"]), {"b": "p", "c": "c", "d": "p"})


# Encoders


def test_weights_are_found_by_name_and_file(tmp_path):
    one, same, other = (load_encoder("random", "resnet18", seed) for seed in (1, 1, 2))
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    joint, file = JointEncoder("resnet18", 16, 1), tmp_path / "swav3D.pth"
    save_weights(joint, file, MADE_BY)
    alone = str(tmp_path / "swav3D_encoder.pth")
    for name in (str(file), alone):  # the arch comes from the .json
        torch.testing.assert_close(load_encoder(name).state_dict(), joint.resnet.state_dict())
    torch.testing.assert_close(load_joint_encoder(str(file)).state_dict(), joint.state_dict())
    assert (has_transformer(str(file)), has_transformer(alone)) == (True, False)


def test_wrong_weights_are_refused(tmp_path, monkeypatch):
    save_weights(GreyResNet("resnet18"), tmp_path / "a.pth", MADE_BY)
    with pytest.raises(UserError, match=r"resnet50 was asked for, but .* made with resnet18"):
        load_encoder(str(tmp_path / "a.pth"), "resnet50")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="nothing is downloaded"):
        load_encoder("imagenet", "resnet18")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "a.pth").rename(tmp_path / "checkpoints/resnet18-f37072fd.pth")
    load_encoder("imagenet", "resnet18")


# The network


@pytest.mark.parametrize("channels", [1, 4])
def test_features_in_the_u_net_are_those_of_our_encoder(channels):
    encoder = load_encoder("random", "resnet18", 0).eval()
    images = torch.rand(2, 1, 64, 64)
    ours, seen = encoder(images), []
    model = SliceUNet(encoder, channels, 3).eval()
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    logits = model(images.repeat(1, channels, 1, 1), [2])
    assert logits.shape == (2, 3, 64, 64)
    for stage, own in zip(seen[1:], ours, strict=True):
        torch.testing.assert_close(stage, own, rtol=1e-4, atol=1e-4)


def test_with_f_inter_slices_see_each_other_within_their_stretch_only():
    encoder = JointEncoder("resnet18", 16, 1)
    model, plain = SliceUNet(encoder, 1, 2).eval(), SliceUNet(encoder.resnet, 1, 2).eval()
    plain.decoder.load_state_dict(model.decoder.state_dict(), strict=False)
    images = torch.rand(8, 1, 64, 64)
    torch.testing.assert_close(model(images, [5, 3]), plain(images, [8]))  # training starts from the plain U-Net
    nn.init.normal_(model.decoder.from_inter.weight)
    together = model(images, [5, 3])
    torch.testing.assert_close(together[:5], model(images[:5], [5]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[5:], model(images[5:], [3]), rtol=1e-3, atol=1e-4)
    changed = images.clone()
    changed[4] = 0
    assert (model(changed, [5, 3]) - together)[:5].abs().amax(dim=(1, 2, 3)).min() > 1e-4


class Threshold(nn.Module):
    """Classes by grey value: a segmentation that is right wherever the image is."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor([0.0, 0.5, 1.0]))

    def forward(self, images: Tensor, lengths: list[int]) -> Tensor:
        return -100 * (images - self.levels.view(1, 3, 1, 1)).abs()


@torch.no_grad()
def test_predictions_return_to_the_grid_of_the_file(tmp_path):
    root = write_pairs(tmp_path / "data", 5, (37, 28, 9))
    for label in (root / "labels").iterdir():
        np.save(root / label.name, np.load(label).astype(np.float32))
    found = opened(tiny(root, tmp_path, f_inter=True, labelled=1))
    case = found.case("c0")
    assert case.images.shape == (9, 1, 32, 32)
    reference = torch.from_numpy(read_label(case.pair, found.data.classes))
    prediction = found.predict(Threshold(), case, native=True)
    assert prediction.shape == reference.shape == case.pair.shape
    scores = segment.metrics.score(prediction, reference, found.data.members, case.pair.spacing_mm)
    assert scores["bright"]["dice"] > 0.85  # its border is that of the dim half, where grey values mix
    prediction = found.predict(Threshold(), case, native=False)
    assert (prediction != case.classes)[prediction != 1].float().mean() < 0.02


# Training


def test_a_pass_visits_every_slice_once_and_depends_on_seed_and_epoch_only(balls, tmp_path):
    found = opened(tiny(balls, tmp_path, augment=False, batch_size=6))
    assert found.steps == 3
    batches = [found.batch(0, step) for step in range(3)]
    assert all(lengths == [1] * 6 for _, _, lengths in batches)
    visited = torch.cat([images for images, _, _ in batches]).flatten(1)
    assert len(visited) == 18 == len(visited.unique(dim=0))
    found.cfg = replace(found.cfg, augment=True)
    later, first = found.batch(1, 0)[0], found.batch(0, 2)[0]
    assert torch.equal(opened(found.cfg).batch(0, 2)[0], first)
    assert not torch.equal(first, later)
    found.cfg = replace(found.cfg, f_inter=True, inter_slices=3)
    assert [found.batch(0, step)[2] for step in range(3)] == [[3, 3]] * 3


def test_labels_move_with_the_image():
    classes = torch.zeros(6, 48, 48, dtype=torch.uint8)
    classes[:, 10:30, 14:26] = 1
    images, moved = augment(classes[:, None].float(), classes, [2, 4], np.random.default_rng(0))
    assert torch.equal(moved[0], moved[1])  # one draw per stretch
    assert not torch.equal(moved[1], moved[2])
    assert not torch.equal(moved[0], classes[0])
    for image, label in zip(images[:, 0], moved, strict=True):
        assert ((image > image.max() / 2) == (label == 1)).float().mean() > 0.98


def test_freezing_leaves_the_encoder_as_loaded(balls, tmp_path):
    cfg = tiny(balls, tmp_path / "run", freeze=True, f_inter=True, epochs=1, steps_per_epoch=2)
    before = opened(cfg).build().state_dict()
    run(cfg)
    after = torch.load(tmp_path / "run/best.pth", weights_only=True)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in changed if key.startswith("encoder.")]
    assert {"decoder.head.weight", "decoder.from_inter.weight"} <= changed


def test_encoder_lr_is_the_share_of_the_encoder_alone_and_decoders_start_equal_whatever_the_encoder(balls, tmp_path):
    found = opened(tiny(balls, tmp_path, encoder_lr=0.25, head_start=0.5, epochs=2, steps_per_epoch=4))
    model = found.build()
    save_weights(load_encoder("random", "resnet18", 9), tmp_path / "a.pth", MADE_BY)
    other = opened(tiny(balls, tmp_path, weights=str(tmp_path / "a.pth"))).build()
    torch.testing.assert_close(other.decoder.state_dict(), model.decoder.state_dict(), rtol=0, atol=0)
    groups = found.groups(model)
    share = {id(p): (group["share"], group["start"]) for group in groups for p in group["params"]}
    assert len(share) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert share[id(p)] == ((0.25, 4) if name.startswith("encoder.") else (1.0, 0)), name


@pytest.mark.slow
def test_a_run_learns_and_writes_what_it_returns(balls, tmp_path):
    result = run(tiny(balls, tmp_path / "a", labelled=4, epochs=6, base_lr=0.003, overlays=1))
    assert result["history"][-1]["loss"] < 0.7 * result["history"][0]["loss"]
    assert result["metrics"]["mean"]["dice"] > 0.5
    rows = pd.read_csv(tmp_path / "a/cases.csv")
    assert rows[rows.structure == "bright"].dice.mean() == pytest.approx(result["metrics"]["bright"]["dice"], rel=1e-5)
    assert len(list((tmp_path / "a").glob("*.png"))) == 1


@pytest.mark.parametrize("layout", ["masks", "nnU-Net"])
def test_images_with_masks_are_segmented_as_they_lie(tmp_path, layout):
    root, rng = tmp_path / "Cells", np.random.default_rng(0)
    for i in range(5):
        y, x = np.mgrid[:40, :36]
        mask = (((y - rng.uniform(15, 25)) / 9) ** 2 + ((x - 18) / 7) ** 2 < 1).astype(np.uint8)
        image = (40 + 120 * mask + rng.normal(0, 8, mask.shape)).astype(np.uint8)
        if layout == "masks":
            tiny_save(root / f"c{i}.jpg", image), tiny_save(root / f"masks/c{i}.png", 255 * mask)
        else:
            tiny_save(root / f"imagesTr/c{i}_0000.png", image), tiny_save(root / f"labelsTr/c{i}.png", mask)
    value = 255 if layout == "masks" else 1
    with pytest.raises(
        UserError, match=rf"c0.png holds {value}\); write .* --structures, {{left atrium: \[{value}\]}}"
    ):
        LabelledVolumes(root)
    chosen = {"structures": {"cell": [value]}, "labelled": 3, "epochs": 4, "base_lr": 0.01, "steps_per_epoch": 6}
    result = run(tiny(root, tmp_path / "run", **chosen))
    assert result["metrics"]["cell"]["dice"] > 0.8
    assert result["cases"] == 1
    tiny_save(next(root.rglob("c2.png")), np.zeros((40, 36, 3), np.uint8))
    with pytest.raises(UserError, match=r"c2\.png: is a picture of mode RGB where each pixel must be a label value"):
        LabelledVolumes(root, {"cell": [1]})


def test_a_file_that_is_cut_during_a_run_is_named(tmp_path):
    root = write_pairs(tmp_path / "data")
    [first, second, *_] = LabelledVolumes(root).pairs
    for path in (first.image.path, second.label):
        os.truncate(path, 500)
    for read, pair in ((read_image, first), (lambda pair: read_label(pair, {}), second)):
        with pytest.raises(UserError, match=r"npy: is not the array that it was when this run began"):
            read(pair)


# What users get wrong: one error each, before training


LABEL = np.zeros((24, 20, 9), np.float32)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels/c3.npy", None, "c3.npy: has no label .*labels/c3.npy; add it"),
        ("labels/c3.npy", LABEL[0], "labels/c3.npy: is not a whole array of 24 x 20 x 9 voxels"),
        ("labels/c4.npy", LABEL + 7, "c4.npy: holds label values 7.0 outside the declared 0, 1, 2"),
        ("c0.npy", np.where(np.arange(9) == 3, np.nan, LABEL), "c0.npy: its intensities, nan to nan, must be finite"),
        ("dataset.yaml", None, "no structures say what label values mean"),
        ("cases.csv", "id,label,patient\nc0,labels/c0.npy,p0\n", "does not name the patient of c1, c2"),
        ("", {"structures": {"heart": [0, 1]}}, "heart: .* must be a list of label values other than 0"),
        ("", {"window": [1000.0, 2000.0]}, r"\.npy: its intensities, .* lie within the window"),
    ],
)
def test_wrong_data_and_options_are_refused(balls, tmp_path, file, content, message):
    """Another content of a file, or none; or options."""
    write_split(Split(["c0", "c1"], ["c2"], ["c3", "c4"]), tmp_path / "split.json")
    root = shutil.copytree(balls, tmp_path / "data")
    if file:
        (root / file).unlink()
    if isinstance(content, str):
        (root / file).write_text(content)
    elif isinstance(content, np.ndarray):
        np.save(root / file, content)
    options = content if isinstance(content, dict) else {}
    with pytest.raises(UserError, match=message):
        segment.check(tiny(root, tmp_path / "run", split=str(tmp_path / "split.json"), **options))
