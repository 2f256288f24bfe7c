"""Segmentation: pairs, splits and encoders it builds upon, the network, training, and what users get wrong."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from conversion.convert import arrange
from conversion.readers import Volume
from downstream import segment
from downstream.encoders import describe_weights, has_transformer, load_encoder, load_joint_encoder
from downstream.pairs import PRESETS, find_task, number_classes, read_image, read_label
from downstream.segment import Config, SliceUNet, augment, batches, build_model, load_case, predict, run
from downstream.splits import (
    Split,
    _full_names as full_names,
    check_split,
    choose_labelled,
    draw_split,
    make_split,
    read_split,
    write_split,
)
from models.encoder import JointEncoder
from models.resnet import GreyResNet
from training.weights import save_joint, save_resnet
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
MADE_BY = {"config": {"arch": "resnet18", "d_model": 16, "layers": 1}}
SPACING = (1.5, 1.0, 2.0)  # of the files' axes


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1]) if affine is None else affine), path)


def ball(seed: int, shape: tuple[int, ...] = (24, 20, 9)) -> tuple[np.ndarray, np.ndarray]:
    """Image and label: a bright ball (1) with a brighter half (2), somewhere near the middle."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    centre = np.array(shape) / 2 + random.uniform(-2, 2, 3)
    label = ((((grid - centre) / [6, 6, 4]) ** 2).sum(-1) < 1).astype(np.uint8)
    label[(label == 1) & (grid[..., 0] > centre[0])] = 2
    return (label * 40 + random.normal(30, 4, shape)).astype(np.float32), label


@pytest.fixture(scope="module")
def decathlon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cases of seven patients in the Decathlon's layout; tests must not change it."""
    root = tmp_path_factory.mktemp("balls")
    for seed in range(8):
        image, label = ball(seed)
        save_nifti(root / "imagesTr" / f"c{seed}.nii.gz", image)
        save_nifti(root / "labelsTr" / f"c{seed}.nii.gz", label)
    about = {
        "labels": {"0": "background", "1": "dim", "2": "bright"},
        "training": [{"image": f"./imagesTr/c{i}.nii.gz", "label": f"./labelsTr/c{i}.nii.gz"} for i in range(8)],
        "patient": {f"c{i}": f"p{min(i, 6)}" for i in range(8)},
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def tiny(root: Path, out: Path, **changes) -> Config:
    chosen = {
        "data_path": str(root), "dump_path": str(out), "arch": "resnet18", "size": 32, "epochs": 2, "batch_size": 8,
        "device": "cpu", "labelled": 2, "d_model": 16, "inter_slices": 4,
    }  # fmt: skip
    return Config(**chosen | changes)


def copy_pairs(decathlon: Path, to: Path) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (to / folder).mkdir(parents=True)
        for file in (decathlon / folder).iterdir():
            (to / folder / file.name).write_bytes(file.read_bytes())
    (to / "dataset.json").write_text((decathlon / "dataset.json").read_text())
    return to


# Pairs


def test_nested_regions_become_disjoint_classes():
    assert number_classes(PRESETS["brats2018"].structures) == {0: 0, 1: 1, 2: 2, 4: 3}
    assert number_classes({"atrium": [420, 421], "ventricle": [500]}) == {0: 0, 420: 1, 421: 1, 500: 2}
    assert len(set(number_classes(PRESETS["mmwhs_ct"].structures).values())) == 8


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_every_orientation_is_turned_to_the_view_of_prepare_data(tmp_path, thick):
    spacing = [1.0, 1.0, 1.0]
    spacing[thick] = 3.0
    array = np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10)
    for number, (axes, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3))
    ):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, axes] * np.array(signs) * spacing
        save_nifti(tmp_path / str(number) / "imagesTr/a.nii", array, affine)
        save_nifti(tmp_path / str(number) / "labelsTr/a.nii", (array > 300).astype(np.uint8), affine)
        task = find_task(tmp_path / str(number), structures={"a": [1]})
        codes = "".join(nibabel.aff2axcodes(affine))
        volume = Volume(array, codes=codes, spacing_mm=tuple(spacing))
        view, _, view_spacing, _ = arrange(volume, "auto")
        [pair] = task.pairs
        np.testing.assert_array_equal(read_image(pair)[0], np.moveaxis(view, 2, 0), err_msg=codes)
        np.testing.assert_array_equal(read_label(pair, task.classes), np.moveaxis(view, 2, 0) > 300)
        assert pair.spacing_mm == (view_spacing[2], *view_spacing[:2])


def test_prepared_arrays_give_their_own_spacing_and_structures(tmp_path):
    image, label = ball(0)
    (tmp_path / "labels").mkdir()
    for case in "ab":
        np.save(tmp_path / f"{case}.npy", image)
        np.save(tmp_path / f"labels/{case}.npy", label)
    (tmp_path / "dataset.yaml").write_text("spacing_mm: [1, 2, 3]\nstructures: {0: background, 1: dim, 2: bright}\n")
    (tmp_path / "cases.csv").write_text("id,spacing_mm\nb,1 x 2 x 5\n")
    task = find_task(tmp_path)
    assert task.structures == {"dim": [1], "bright": [2]}
    assert [pair.spacing_mm for pair in task.pairs] == [(3, 1, 2), (5, 1, 2)]
    np.testing.assert_array_equal(read_label(task.pairs[0], task.classes), np.moveaxis(label, 2, 0))


def test_mmwhs_and_brats_are_found_by_their_file_names(tmp_path):
    for kind in ("ct", "mr"):
        for number in (1001, 1002):
            stem = tmp_path / f"mmwhs/{kind}_train/{kind}_train_{number}"
            image, label = ball(number)
            save_nifti(stem.with_name(f"{stem.name}_image.nii.gz"), image)
            save_nifti(stem.with_name(f"{stem.name}_label.nii.gz"), np.array([0, 205, 850], np.int16)[label])
    task = find_task(tmp_path / "mmwhs", "mmwhs_mr")
    assert [pair.case for pair in task.pairs] == ["mr_train_1001", "mr_train_1002"]
    assert task.num_classes == 8
    assert set(np.unique(read_label(task.pairs[0], task.classes))) == {0, task.classes[205], task.classes[850]}

    folder = tmp_path / "brats/HGG/Brats18_1"
    for number, channel in enumerate(("flair", "t1", "t1ce", "t2", "seg")):
        image, label = ball(number)
        save_nifti(
            folder / f"Brats18_1_{channel}.nii.gz", np.array([0, 2, 4], np.int16)[label] if number == 4 else image
        )
    [pair] = find_task(tmp_path / "brats", "brats2018").pairs
    t1ce = np.asanyarray(nibabel.load(folder / "Brats18_1_t1ce.nii.gz").dataobj)
    assert pair.channels == 4
    np.testing.assert_array_equal(read_image(pair)[2], pair.arrange(t1ce))
    (folder / "Brats18_1_t2.nii.gz").unlink()
    with pytest.raises(UserError, match=r"Brats18_1 has no Brats18_1_t2.nii.gz"):
        find_task(tmp_path / "brats", "brats2018")


def test_channels_of_nnu_net_are_joined(tmp_path):
    images, label = [ball(seed)[0] for seed in range(2)], ball(0)[1]
    for channel, image in enumerate(images):
        save_nifti(tmp_path / f"imagesTr/a_000{channel}.nii.gz", image)
    save_nifti(tmp_path / "labelsTr/a.nii.gz", label)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2], "core": 2}}))
    task = find_task(tmp_path)
    assert task.structures == {"whole": [1, 2], "core": [2]}
    assert task.members == {"whole": [1, 2], "core": [2]}
    [pair] = task.pairs
    np.testing.assert_array_equal(read_image(pair), [pair.arrange(image) for image in images])


def test_real_hippocampi_are_read(shared):
    task = find_task(shared / "hippocampus")
    assert len(task.pairs) == 180
    assert len({pair.patient for pair in task.pairs}) == 118
    assert task.structures == {"Anterior": [1], "Posterior": [2]}
    for pair in task.pairs[:5]:
        assert pair.spacing_mm == (1, 1, 1)
        assert read_image(pair)[0].shape == read_label(pair, task.classes).shape == pair.shape


# Splits


def test_a_patient_is_in_one_part_and_order_does_not_matter():
    cases = [f"c{i}" for i in range(40)]
    patients = [f"p{i % 17}" for i in range(40)]
    split = make_split(cases, patients, [0.5, 0.2, 0.3], seed=3)
    check_split(split, dict(zip(cases, patients, strict=True)))
    assert sorted(split.train + split.validation + split.test) == sorted(cases)
    assert make_split(cases[::-1], patients[::-1], [0.5, 0.2, 0.3], seed=3) == split
    assert make_split(cases, patients, [0.5, 0.2, 0.3], seed=4) != split


def test_every_part_gets_a_patient_however_few_there_are():
    split = make_split(list("abc"), list("xyz"), [0.98, 0.01, 0.01], seed=0)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [1, 1, 1]
    with pytest.raises(UserError, match="2 patient"):
        make_split(list("abc"), list("xyy"), [0.98, 0.01, 0.01], seed=0)


def test_smaller_choices_of_labelled_cases_are_within_larger_ones():
    train = [f"c{i}" for i in range(30)]
    for seed in range(3):
        chosen = [choose_labelled(train, count, seed) for count in (5, 10, 0)]
        assert chosen[0] == chosen[1][:5] == chosen[2][:5]
        assert sorted(chosen[2]) == sorted(train)
    assert choose_labelled(train[::-1], 5, 0) == choose_labelled(train, 5, 0) != choose_labelled(train, 5, 1)


def test_a_split_may_leave_out_folders_and_suffixes_or_have_those_of_another_task(tmp_path):
    cases = ["imagesTr/a_1.npy", "imagesTr/a_2.npy", "imagesTr/b.npy", "other/b.npy"]
    plain = Split(["a_1"], ["imagesTr/a_2"], ["other/b"])
    whole = Split(["imagesTr/a_1.npy"], ["imagesTr/a_2.npy"], ["other/b.npy"])
    assert full_names(plain, cases) == whole
    assert full_names(whole, cases) == whole
    assert full_names(Split(["imagesTr/a_1.nii.gz"], [], ["a_2.nii.gz"]), ["a_1", "a_2"]) == Split(["a_1"], [], ["a_2"])
    with pytest.raises(UserError, match=r"'b' may be imagesTr/b\.npy or other/b\.npy"):
        full_names(Split(["b"], [], []), cases)
    write_split(Split(["a_1"], [], ["c"]), tmp_path / "split.json")
    with pytest.raises(UserError, match="'c', which is not among the 4"):
        draw_split(str(tmp_path / "split.json"), (), {case: case for case in cases}, 0)


@pytest.mark.parametrize("name", ["split.json"])
def test_a_split_is_read_as_it_was_written(tmp_path, name):
    split = Split(["007", "null"], ["b"], ["c: d"])
    write_split(split, tmp_path / name)
    assert read_split(tmp_path / name) == split


# Encoders


def test_weights_are_found_by_name_and_file(tmp_path):
    before = torch.get_rng_state()
    one, same, other = (load_encoder("random", "resnet18", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    torch.manual_seed(0)
    joint = JointEncoder("resnet18", 16, 1)
    save_joint(joint, tmp_path / "swav3D.pth", MADE_BY)
    for name in ("swav3D.pth", "swav3D_encoder.pth"):  # the arch comes from the .json
        found = load_encoder(str(tmp_path / name))
        torch.testing.assert_close(found.state_dict(), joint.encoder.state_dict())
    found = load_joint_encoder(str(tmp_path / "swav3D.pth"))
    torch.testing.assert_close(found.state_dict(), joint.state_dict())
    assert has_transformer(str(tmp_path / "swav3D.pth"))
    assert not has_transformer(str(tmp_path / "swav3D_encoder.pth"))
    assert describe_weights(str(tmp_path / "swav3D.pth")).startswith("swav3D@")


def test_wrong_weights_are_refused(tmp_path, monkeypatch):
    save_resnet(GreyResNet("resnet18"), tmp_path / "a.pth", MADE_BY)
    with pytest.raises(UserError, match=r"resnet50 was asked for, but .* made with resnet18"):
        load_encoder(str(tmp_path / "a.pth"), "resnet50")
    (tmp_path / "a.json").unlink()
    with pytest.raises(UserError, match="loaded as resnet50; another one is chosen with --arch"):
        load_encoder(str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match="no such file"):
        load_encoder(str(tmp_path / "b.pth"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="nothing is downloaded"):
        load_encoder("imagenet", "resnet18")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "a.pth").rename(tmp_path / "checkpoints/resnet18-f37072fd.pth")
    assert load_encoder("imagenet", "resnet18").num_features == 512


# The network


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_features_in_the_u_net_are_those_of_our_encoder(channels):
    encoder = load_encoder("random", "resnet18", 0).eval()
    model = SliceUNet(encoder, "resnet18", channels, 3).eval()
    seen: list[Tensor] = []
    model.unet.encoder.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    images = torch.rand(2, 1, 64, 64)
    logits = model(images.repeat(1, channels, 1, 1), [2])
    assert logits.shape == (2, 3, 64, 64)
    for stage, ours in zip(seen[2:], encoder(images), strict=True):
        torch.testing.assert_close(stage, ours, rtol=1e-4, atol=1e-5)


def test_an_instance_normalised_decoder_does_not_depend_on_the_batch():
    encoder = load_encoder("random", "resnet18", 0)
    torch.manual_seed(0)
    unet = SliceUNet(encoder, "resnet18", 1, 2, decoder_norm="instance").unet
    norms = [m for m in unet.decoder.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert norms
    assert all(norm.affine and not norm.track_running_stats for norm in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in unet.decoder.modules())
    unet.train()  # even while training
    features = [f.detach() for f in unet.encoder(torch.rand(3, 1, 64, 64))]
    together = unet.decoder(features)
    alone = unet.decoder([f[:1] for f in features])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_the_lines_of_the_documentation_give_the_features_of_our_encoder(tmp_path):
    encoder = load_encoder("random", "resnet18", 0)
    encoder(torch.rand(4, 1, 64, 64))  # BatchNorm statistics that are not the initial ones
    save_resnet(encoder.eval(), tmp_path / "swav3D_encoder.pth", MADE_BY)
    unet = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=4)
    unet.encoder.load_state_dict(torch.load(tmp_path / "swav3D_encoder.pth", weights_only=True))
    grey = torch.rand(2, 1, 64, 64)
    found = unet.eval().encoder((grey.repeat(1, 3, 1, 1) - 0.449) / 0.226)
    for stage, ours in zip(found[2:], encoder(grey), strict=True):
        torch.testing.assert_close(stage, ours, rtol=1e-4, atol=1e-4)


def test_with_f_inter_slices_see_each_other_within_their_stretch_only():
    encoder = load_encoder("random", "resnet18", 0)
    model = SliceUNet(encoder, "resnet18", 1, 2, JointEncoder("resnet18", 16, 1)).eval()
    plain = SliceUNet(encoder, "resnet18", 1, 2).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.rand(8, 1, 32, 32)
    torch.testing.assert_close(model(images, [5, 3]), plain(images, [8]))  # training starts from the plain U-Net
    nn.init.normal_(model.to_bottleneck.weight)
    together = model(images, [5, 3])
    torch.testing.assert_close(together[:5], model(images[:5], [5]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[5:], model(images[5:], [3]), rtol=1e-3, atol=1e-4)
    changed = images.clone()
    changed[4] = 0
    difference = (model(changed, [5, 3]) - together).abs().amax(dim=(1, 2, 3))
    assert difference[:5].min() > 1e-4
    assert difference[5:].max() < 1e-5


class Threshold(nn.Module):
    """Classes by grey value: a segmentation that is right wherever the image is."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor([0.0, 0.5, 1.0]))

    def forward(self, images: Tensor, lengths: list[int]) -> Tensor:
        return -100 * (images - self.levels.view(1, 3, 1, 1)).abs()


@pytest.mark.parametrize("f_inter", [False, True])
@pytest.mark.parametrize("size", [32, 64])
def test_predictions_return_to_the_grid_of_the_file(tmp_path, size, f_inter):
    _, label = ball(0, (37, 28, 9))
    save_nifti(tmp_path / "imagesTr/a.nii.gz", label.astype(np.float32))
    save_nifti(tmp_path / "labelsTr/a.nii.gz", label)
    task = find_task(tmp_path, structures={"dim": [1], "bright": [2]})
    case = load_case(task.pairs[0], task, size)
    assert case.images.shape == (9, 1, size, size)
    cfg = tiny(tmp_path, tmp_path, f_inter=f_inter)
    reference = torch.from_numpy(read_label(task.pairs[0], task.classes))
    found = predict(Threshold(), case, cfg, native=True)
    assert found.shape == reference.shape == task.pairs[0].shape
    scores = segment.metrics.score(found, reference, task.members, task.pairs[0].spacing_mm)
    assert scores["bright"]["dice"] > 0.85  # its border is that of the dim half, where grey values mix
    found = predict(Threshold(), case, cfg, native=False)
    assert (found != case.classes)[found != 1].float().mean() < 0.02


# Training


def test_a_pass_visits_every_slice_once_and_depends_on_seed_and_epoch_only(decathlon, tmp_path):
    task = find_task(decathlon)
    cases = [load_case(pair, task, 32) for pair in task.pairs[:2]]
    cfg = tiny(decathlon, tmp_path, augment=False, batch_size=6)
    images = [images for images, _, lengths in batches(cases, 0, 3, cfg) if lengths == [1] * 6]
    visited = torch.cat(images).flatten(1)
    assert len(visited) == 18 == len(visited.unique(dim=0))
    first, same, later = (
        [images for images, _, _ in batches(cases, epoch, 3, replace(cfg, augment=True))] for epoch in (0, 0, 1)
    )
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], later[0])
    stretches = list(batches(cases, 0, 5, replace(cfg, f_inter=True, inter_slices=3)))
    assert all(lengths == [3, 3] for _, _, lengths in stretches)


def test_labels_move_with_the_image():
    classes = torch.zeros(6, 48, 48, dtype=torch.uint8)
    classes[:, 10:30, 14:26] = 1
    images, moved = augment(classes[:, None].float(), classes, [2, 4], np.random.default_rng(0))
    assert torch.equal(moved[0], moved[1])  # one draw per stretch
    assert not torch.equal(moved[1], moved[2])
    assert not torch.equal(moved[0], classes[0])
    for image, label in zip(images[:, 0], moved, strict=True):
        assert ((image > image.max() / 2) == (label == 1)).float().mean() > 0.98


def test_the_epoch_with_the_best_validation_is_kept(decathlon, tmp_path, monkeypatch):
    seen = []

    def scripted(model, cases, task, cfg):
        seen.append(model.unet.segmentation_head[0].bias.detach().clone())
        return [0.1, 0.7, 0.3][len(seen) - 1]

    monkeypatch.setattr(segment, "validate", scripted)
    result = run(tiny(decathlon, tmp_path, epochs=3, steps_per_epoch=1))
    assert result["best_epoch"] == 2
    kept = torch.load(tmp_path / "best.pth", weights_only=True)["unet.segmentation_head.0.bias"]
    assert torch.equal(kept, seen[1])
    assert not torch.equal(kept, seen[2])


def test_freezing_leaves_the_encoder_as_loaded(decathlon, tmp_path):
    cfg = tiny(decathlon, tmp_path, freeze=True, f_inter=True, epochs=1)
    before = build_model(cfg, find_task(decathlon)).state_dict()
    run(cfg)
    after = torch.load(tmp_path / "best.pth", weights_only=True)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in changed if key.startswith(("unet.encoder.", "projection.", "transformer."))]
    assert {"unet.segmentation_head.0.weight", "to_bottleneck.weight"} <= changed


def test_encoder_lr_is_the_share_of_the_encoder_alone(decathlon, tmp_path):
    cfg = tiny(decathlon, tmp_path, encoder_lr=0.25)
    model = build_model(cfg, find_task(decathlon))
    groups = segment._groups(model, cfg)
    share = {id(p): group["share"] for group in groups for p in group["params"]}
    assert len(share) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert share[id(p)] == (0.25 if name.startswith("unet.encoder.") else 1.0), name


def test_a_run_is_reproducible(decathlon, tmp_path):
    one, same, other = (
        run(tiny(decathlon, tmp_path, f_inter=True, epochs=1, steps_per_epoch=1, seed=seed)) for seed in (0, 0, 1)
    )
    assert same["metrics"] == one["metrics"]
    assert same["history"] == one["history"] != other["history"]


def test_a_run_learns_and_writes_what_it_returns(decathlon, tmp_path):
    result = run(tiny(decathlon, tmp_path / "a", labelled=4, epochs=6, base_lr=0.003, overlays=1))
    assert result["history"][-1]["loss"] < 0.7 * result["history"][0]["loss"]
    assert result["metrics"]["mean"]["dice"] > 0.5
    assert result["cases"] == len(read_split(tmp_path / "a/split.json").test)
    saved = json.loads((tmp_path / "a/results.json").read_text())
    assert saved["metrics"]["bright"]["dice"] == result["metrics"]["bright"]["dice"]
    with open(tmp_path / "a/cases.csv", newline="") as file:
        rows = [float(row["dice"]) for row in csv.DictReader(file) if row["structure"] == "bright"]
    assert np.mean(rows) == pytest.approx(result["metrics"]["bright"]["dice"], rel=1e-5)
    assert len(list((tmp_path / "a").glob("*.png"))) == 1


def test_decoders_start_equal_whatever_the_encoder(decathlon, tmp_path):
    save_resnet(load_encoder("random", "resnet18", 9), tmp_path / "a.pth", MADE_BY)
    task = find_task(decathlon)
    one = build_model(tiny(decathlon, tmp_path), task).unet.decoder.state_dict()
    other = build_model(tiny(decathlon, tmp_path, weights=str(tmp_path / "a.pth")), task).unet.decoder.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


# What users get wrong: one error each, before training


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "fit", lambda *_: pytest.fail("training began"))


@pytest.mark.usefixtures("no_training")
class TestRefused:
    @pytest.mark.parametrize(
        ("folder", "message"),
        [
            ("pair_shape_mismatch", "281.nii.gz: is 37 x 52 x 33 voxels, but its label .* is 512 x 512 x 94"),
            ("image_without_label", "118.nii.gz: has no label"),
            ("label_without_image", "010.nii.gz: has no image"),
        ],
    )
    def test_pairs_that_are_none(self, shared, tmp_path, folder, message):
        with pytest.raises(UserError, match=message):
            run(tiny(shared / "bad_input" / folder, tmp_path))

    def test_another_spacing_or_orientation(self, decathlon, tmp_path):
        root = copy_pairs(decathlon, tmp_path / "data")
        image, _ = ball(3)
        save_nifti(root / "imagesTr/c3.nii.gz", image, np.diag([1.5, 1.0, 2.2, 1]))
        with pytest.raises(
            UserError, match=r"c3.nii.gz: has a spacing of 1.5 x 1 x 2.2 mm, but its label .* 1.5 x 1 x 2"
        ):
            run(tiny(root, tmp_path))
        save_nifti(root / "imagesTr/c3.nii.gz", image, np.diag([-1.5, 1.0, 2.0, 1]))
        with pytest.raises(UserError, match=r"c3.nii.gz: its axes point to LAS, but those of its label .* to RAS"):
            run(tiny(root, tmp_path))

    def test_a_missing_file(self, decathlon, tmp_path):
        root = copy_pairs(decathlon, tmp_path / "data")
        (root / "imagesTr/c2.nii.gz").unlink()
        with pytest.raises(UserError, match=r"imagesTr/c2.nii.gz: no such file, but dataset.json lists it"):
            run(tiny(root, tmp_path))

    @pytest.mark.parametrize(
        ("value", "message"), [(7, "holds label values 7 outside the declared 0, 1, 2"), (0.5, "not whole numbers")]
    )
    def test_label_values_outside_the_declared_ones_even_in_a_test_case(self, decathlon, tmp_path, value, message):
        root = copy_pairs(decathlon, tmp_path / "data")
        split = Split(["c0", "c1"], ["c2"], ["c3", "c4"])
        write_split(split, tmp_path / "split.yaml")
        _, label = ball(4)
        label = label.astype(np.float32)
        label[3, 3, 3] = value
        save_nifti(root / "labelsTr/c4.nii.gz", label)
        with pytest.raises(UserError, match=f"c4.nii.gz: .*{message}"):
            run(tiny(root, tmp_path, split=str(tmp_path / "split.yaml")))

    def test_voxels_without_a_value(self, decathlon, tmp_path):
        root = copy_pairs(decathlon, tmp_path / "data")
        image, _ = ball(0)
        image[0, 0, 0] = np.nan
        for case in range(8):
            save_nifti(root / f"imagesTr/c{case}.nii.gz", image)
        with pytest.raises(UserError, match="1 of 4320 voxels are NaN or Inf"):
            run(tiny(root, tmp_path))

    @pytest.mark.parametrize(
        ("split", "message"),
        [
            (Split(["c0", "c6"], ["c1"], ["c7"]), "patient p6 is in two parts: c6 in train, c7 in test"),
            (Split(["c0", "c0"], ["c1"], ["c2"]), "'c0' is named twice"),
            (Split(["c0", "cx"], ["c1"], ["c2"]), "train names 'cx', which is not among the 8 cases"),
            (Split(["c0", "c1"], [], ["c2"]), "validation has no case"),
            (Split(["c0"], ["c1"], ["c2"]), "2 cases were asked for; the split has 1"),
        ],
    )
    def test_splits(self, decathlon, tmp_path, split, message):
        write_split(split, tmp_path / "split.json")
        with pytest.raises(UserError, match=message):
            run(tiny(decathlon, tmp_path, split=str(tmp_path / "split.json")))

    def test_structures_nobody_declared(self, decathlon, tmp_path):
        root = copy_pairs(decathlon, tmp_path / "data")
        (root / "dataset.json").unlink()
        with pytest.raises(UserError, match="nothing says what the label values mean"):
            run(tiny(root, tmp_path))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"structures": {"heart": [0, 1]}}, "heart: .* must be label values other than 0"),
            ({"window": [200.0, 100.0]}, "window: .* must be two increasing numbers"),
            ({"window": [1000.0, 2000.0]}, "c0.nii.gz: its intensities lie outside the window"),
            ({"size": 16}, "at least 32"),
            ({"fractions": [0.5, 0.5]}, "fractions: .* must be three numbers"),
            ({"patients": "nobody.json"}, "nobody.json: no such file"),
        ],
    )
    def test_options(self, decathlon, tmp_path, changes, message):
        write_split(Split(["c0", "c1"], ["c2"], ["c3"]), tmp_path / "split.json")
        split = None if "fractions" in changes else str(tmp_path / "split.json")
        with pytest.raises(UserError, match=message):
            run(tiny(decathlon, tmp_path, split=split, **changes))

    def test_weights_of_another_network(self, decathlon, tmp_path):
        save_resnet(GreyResNet("resnet18"), tmp_path / "a.pth", {"config": {"arch": "resnet34"}})
        with pytest.raises(UserError, match="missing"):
            run(tiny(decathlon, tmp_path, arch=None, weights=str(tmp_path / "a.pth")))
