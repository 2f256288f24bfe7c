"""Exported weights load strictly in the library they are for, by the lines of their card, and give our features."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_weights
from torch import Tensor, nn

import export_weights
import ssl_swav2D
import ssl_swav3D
from downstream.encoders import load_encoder
from export_weights import Config
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, pooled
from objectives import MaskedSlices
from training import weights
from utils import files
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
for library in ("timm", "segmentation_models_pytorch", "monai", "safetensors", "onnxruntime"):
    pytest.importorskip(library)

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def make(arch: str, folder: Path) -> SimpleNamespace:
    """A network as after training, and its files as the stages write them: first, second, third, third_encoder."""
    generator = torch.Generator().manual_seed(1)
    joint = JointEncoder(arch, d_model=32, layers=1).eval()
    for module in joint.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
    made_by = weights.record(ssl_swav3D.Config(arch=arch, d_model=32, layers=1), [], {})
    weights.save(MaskedSlices(joint), folder / "second.pth", made_by)
    save_weights(joint, folder / "third.pth", made_by)
    save_weights(joint.encoder, folder / "first.pth", weights.record(ssl_swav2D.Config(arch=arch), [], {}))
    return SimpleNamespace(folder=folder, joint=joint)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> SimpleNamespace:
    return make("resnet18", tmp_path_factory.mktemp("resnet18"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 1, 48, 64, generator=torch.Generator().manual_seed(2))


def export(made: SimpleNamespace, dest: Path, stem: str = "third", **options) -> dict:
    """The card of the one format that was asked for."""
    export_weights.main(Config(weights=str(made.folder / f"{stem}.pth"), dest=str(dest), **options))
    half = "_fp16" * options.get("half", False)
    return json.loads((dest / f"{stem}_{options['format']}{half}.json").read_text())


def follow(card: dict, folder: Path, monkeypatch: pytest.MonkeyPatch, **given) -> SimpleNamespace:
    """What the names stand for after the card's lines have run."""
    monkeypatch.chdir(folder)
    names = {name: importlib.import_module(name) for name in ("torch", card["library"])} | given
    exec("\n".join(card["use"]), names)
    return SimpleNamespace(**names)


def features(loaded: SimpleNamespace, x: Tensor) -> Tensor:
    """Global averages of the last stage, by the library's own forward."""
    unet = getattr(loaded, "unet", None)
    return unet.eval().encoder(x)[-1].mean(dim=(2, 3)) if unet else loaded.resnet.eval()(x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "channels", "stem"),
    [("torchvision", 1, "first"), ("torchvision", 3, "second"), ("smp", 1, "third"), ("monai2d", 1, "third_encoder")],
)
def test_the_lines_of_the_card_load_the_files_and_give_our_features(
    name, channels, stem, resnet18, images, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    card = export(resnet18, tmp_path, stem, format=name, channels=channels)
    loaded = follow(card, tmp_path, monkeypatch)
    ours = pooled(resnet18.joint.resnet(images))
    x = ((images - GREY_MEAN) / GREY_STD).repeat(1, channels, 1, 1)
    torch.testing.assert_close(features(loaded, x), ours, **TOLERANCE)
    assert card["input"]["shape"] == f"[N, {channels}, H, W]"
    assert card["input"]["normalise"].startswith("outside: give (grey - 0.449) / 0.226")
    pickled = torch.load(tmp_path / f"{stem}_{name}.pth", weights_only=True)
    assert all(torch.equal(value, pickled[key]) for key, value in load_file(f"{stem}_{name}.safetensors").items())
    torch.testing.assert_close(load_encoder(f"{stem}_{name}.pth").eval()(images)[-1].mean(dim=(2, 3)), ours)


@torch.no_grad()
@pytest.mark.parametrize(("name", "suffix"), [("timm", ".safetensors"), ("monai2d", ".pth")])
def test_half_precision_in_one_file_loads_into_a_float32_network(name, suffix, resnet18, images, tmp_path, monkeypatch):
    card = export(resnet18, tmp_path, format=name, channels=1, half=True, one_file=True)
    assert {path.suffix for path in tmp_path.iterdir()} == {suffix, ".json", ".md"}
    assert (tmp_path / f"third_{name}_fp16{suffix}").stat().st_size < 23e6  # ResNet-18 has 11.2 million weights
    loaded = follow(card, tmp_path, monkeypatch)
    assert {value.dtype for value in loaded.resnet.parameters()} == {torch.float32}
    ours = pooled(resnet18.joint.resnet(images))
    # Each weight is off by 2^-11 of itself at most (tiny ones by 3e-8), and the errors of many average out.
    error = features(loaded, (images - GREY_MEAN) / GREY_STD) - ours
    assert 0 < error.norm() < 2e-3 * ours.norm()
    assert "float16" in (tmp_path / f"third_{name}_fp16.md").read_text()


@pytest.mark.slow
def test_encoders_of_monai_and_torchvision_take_a_resnet50(tmp_path):
    from monai.networks.nets import FlexibleUNet
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    made = make("resnet50", tmp_path)
    with torch.device("meta"):  # skips their initialisation, which takes seconds
        unet = FlexibleUNet(1, 2, "resnet50", spatial_dims=3)
        detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=15)
    for name, encoder in (("monai3d", unet.encoder), ("torchvision", detector.backbone.body)):
        export(made, tmp_path, format=name)
        state = torch.load(tmp_path / f"third_{name}.pth", weights_only=True)
        encoder.load_state_dict(state, assign=True)
        assert torch.equal(encoder.conv1.weight, state["conv1.weight"])


def test_what_half_precision_cannot_hold_is_refused_by_name():
    state = {"bn.running_var": torch.tensor([1.0, 7e4]), "bn.num_batches_tracked": torch.tensor(10**9)}
    with pytest.raises(UserError, match=r"bn.running_var hold values up to 70000, .*at most 65504"):
        export_weights.halved(state)
    small = export_weights.halved({**state, "bn.running_var": torch.tensor([1.0, 6.5e4])})
    assert small["bn.running_var"].dtype == torch.float16
    assert int(small["bn.num_batches_tracked"]) == 10**9  # a count stays one


@torch.no_grad()
def test_by_default_a_volume_of_any_depth_gives_the_2d_features(resnet18, images, tmp_path, monkeypatch):
    card = export(resnet18, tmp_path, format="monai3d", channels=3)
    loaded = follow(card, tmp_path, monkeypatch)
    volume = ((images - GREY_MEAN) / GREY_STD).repeat(1, 3, 1, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(loaded.resnet.eval()(volume), pooled(resnet18.joint.resnet(images)), **TOLERANCE)
    assert (card["inflation"], card["input"]["shape"]) == ("centre", "[N, 3, D, H, W]")


@torch.no_grad()
@pytest.mark.slow
def test_the_exported_program_embeds_volumes_of_any_size(resnet18, tmp_path, monkeypatch):
    card = export(resnet18, tmp_path, format="joint")
    loaded = None
    for shape in ((1, 5, 40, 48), (3, 12, 64, 33)):
        volumes = torch.rand(shape, generator=torch.Generator().manual_seed(4))
        mask = torch.ones(shape[:2], dtype=torch.bool)
        mask[0, -2:] = False
        loaded = loaded or follow(card, tmp_path, monkeypatch, volumes=volumes, mask=mask)
        _, tokens = resnet18.joint.tokens(volumes, mask)
        torch.testing.assert_close(loaded.model(volumes, mask), resnet18.joint.holistic(tokens, mask), **TOLERANCE)
    assert loaded.embedding.shape == (1, 32)
    assert card["input"]["normalise"].startswith("inside")


@torch.no_grad()
def test_onnxruntime_gives_features_and_maps_of_any_size(resnet18, images, tmp_path, monkeypatch):
    card = export(resnet18, tmp_path, format="onnx")
    for x in (images, images[:1, :, :50, :40]):
        loaded = follow(card, tmp_path, monkeypatch, images=x.numpy())
        stages = resnet18.joint.resnet(x)
        torch.testing.assert_close(torch.from_numpy(loaded.features), pooled(stages), **TOLERANCE)
        (third,) = loaded.session.run(["stage3"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(third), stages[2], **TOLERANCE)


def test_the_card_says_what_the_files_are_what_made_them_and_what_not_to_expect(resnet18, tmp_path):
    card = export(resnet18, tmp_path, format="timm")
    assert len(card["files"]) == 2
    for name, digest in card["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert card["source"]["sha256"] == hashlib.sha256((resnet18.folder / "third.pth").read_bytes()).hexdigest()
    assert (card["config"]["arch"], card["config"]["d_model"]) == ("resnet18", 32)
    assert not [key for key in card["config"] if key.endswith("_path")]  # nobody else's business
    people = (tmp_path / "third_timm.md").read_text()
    for said in (*card["use"], *card["files"].values(), "the transformer over slices is not in this file"):
        assert said in people


def test_an_export_that_is_cut_short_leaves_no_card_of_other_files(resnet18, tmp_path, monkeypatch):
    export(resnet18, tmp_path, format="timm")
    monkeypatch.setattr(os, "replace", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        export(resnet18, tmp_path, format="timm", channels=1)
    assert {path.name for path in tmp_path.iterdir()} == {"third_timm.pth", "third_timm.safetensors"}


@pytest.mark.parametrize("killed_at", range(4))
def test_files_that_belong_together_take_their_places_one_right_after_the_other(killed_at, tmp_path, monkeypatch):
    names = [tmp_path / name for name in ("card", "weights", "others", "list")]
    files.write_together(dict.fromkeys(names, b"old"))
    moved = []

    def move(source, target):
        if len(moved) == killed_at:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))

    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        files.write_together(dict.fromkeys(names, b"new"), last=[names[3], names[0]])
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    order = ["weights", "others", "list", "card"]
    assert there == {"weights": "old", "others": "old"} | dict.fromkeys(order[:killed_at], "new")


@pytest.mark.parametrize("room", [0, 5, 15])
def test_a_full_disk_leaves_what_was_there(room, tmp_path, monkeypatch):
    names = [tmp_path / name for name in ("weights", "others", "card")]
    files.write_together(dict.fromkeys(names, b"older"))
    left, write = room, Path.write_bytes

    def write_bytes(path, data):
        nonlocal left
        write(path, data[: max(0, left)])
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    named = names[room // 6].name
    with pytest.raises(UserError, match=rf"{named}: cannot be written \(No space left on device\); free space"):
        files.write_together(dict.fromkeys(names, b"newer!"), last=[names[2]])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {path.name: b"older" for path in names}


def test_an_export_over_its_own_source_or_a_folder_is_refused(resnet18, tmp_path):
    for suffix in (".pth", ".json"):
        shutil.copy(resnet18.folder / f"first{suffix}", tmp_path / f"first_timm{suffix}")
    (tmp_path / "first_timm_smp.pth").mkdir()
    made = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match=r"first_timm_smp\.pth: cannot be written \(is a folder\)"):
        export(made, tmp_path, "first_timm", format="smp")
    (tmp_path / "first_timm.pth").rename(tmp_path / "first.pth")
    (tmp_path / "first_timm.json").rename(tmp_path / "first.json")
    (tmp_path / "first_timm.pth").symlink_to(tmp_path / "first.pth")
    with pytest.raises(UserError, match=r"dest: .*first\.pth itself would be overwritten"):
        export(made, tmp_path, "first", format="timm")


def test_what_a_format_cannot_hold_is_left_out_or_refused(resnet18, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="onnx is a program"):
        export(resnet18, tmp_path, format="onnx", half=True)
    with pytest.raises(UserError, match="holds a ResNet alone"):
        export(resnet18, tmp_path, "first", format="joint")
    source = export_weights.Source(tmp_path / "w.pth", {"config": {"arch": "wide_resnet50_2"}}, None, None)
    assert "segmentation_models_pytorch has no wide_resnet50_2" in export_weights.impossible("smp", source, False)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(export_weights, "FORMATS", {k: export_weights.FORMATS[k] for k in ("smp", "joint", "onnx")})
    export_weights.main(Config(weights=str(resnet18.folder / "first.pth"), format="all", dest=str(tmp_path)))
    assert "joint: left out" in capsys.readouterr().out
    assert {p.suffix for p in tmp_path.iterdir()} == {".pth", ".safetensors", ".onnx", ".json", ".md"}


def test_wrong_input_is_named(resnet18, tmp_path):
    file, about = tmp_path / "first.pth", tmp_path / "first.json"

    def said() -> str:
        with pytest.raises(UserError) as error:
            export_weights.main(Config(weights=str(file), dest=str(tmp_path / "out")))
        return str(error.value)

    assert f"{file}: missing" in said()
    shutil.copy(resnet18.folder / "first.pth", file)
    assert f"{about}: missing" in said()
    record = json.loads((resnet18.folder / "first.json").read_text())
    about.write_text(json.dumps(record | {"sha256": "0" * 64}))
    assert "is of other weights" in said()
    record["config"]["arch"] = "resnet50"
    about.write_text(json.dumps(record))
    assert "holds a resnet18, to be loaded as a resnet50; first.json says otherwise" in said()
