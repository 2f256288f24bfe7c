"""Exported weights load strictly in the library they are for, by the lines of their card, and give our features."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import export_weights
import ssl_swav2D
import ssl_swav3D
from export_weights import Config
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, pooled
from training import exports, weights
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
for library in ("timm", "segmentation_models_pytorch", "monai", "safetensors", "onnxruntime"):
    pytest.importorskip(library)

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def used(joint: JointEncoder) -> JointEncoder:
    """As after training: BatchNorm has seen data, its gains and biases have moved."""
    generator = torch.Generator().manual_seed(1)
    for module in joint.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.2), (module.running_var, 0.5, 2.0)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
            for tensor in (module.bias, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            module.num_batches_tracked.fill_(7)
    return joint.eval()


def make(arch: str, folder: Path, stages: Sequence[str]) -> SimpleNamespace:
    """A network, and files of it as the stages write them: `first`, `second`, `third` with `third_encoder`."""
    torch.manual_seed(0)
    joint = used(JointEncoder(arch, d_model=32, layers=1))
    made_by = weights.record(ssl_swav3D.Config(arch=arch, d_model=32, layers=1), [], {})
    if "first" in stages:
        first = weights.record(ssl_swav2D.Config(arch=arch), [], {})
        weights.save_resnet(SimpleNamespace(encoder=joint.encoder), folder / "first.pth", first)
    if "second" in stages:
        learner = nn.Module()
        learner.encoder, learner.mask_token, learner.decoder = joint, nn.Parameter(torch.zeros(32)), nn.Linear(32, 32)
        weights.save_masked(learner, folder / "second.pth", made_by)
    weights.save_joint(SimpleNamespace(encoder=joint), folder / "third.pth", made_by)
    return SimpleNamespace(folder=folder, joint=joint)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> SimpleNamespace:
    return make("resnet18", tmp_path_factory.mktemp("resnet18"), ("first", "second", "third"))


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory) -> SimpleNamespace:
    return make("resnet50", tmp_path_factory.mktemp("resnet50"), ("third",))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(2))


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
    if hasattr(loaded, "unet"):
        return loaded.unet.eval().encoder(x)[-1].mean(dim=(2, 3))
    return loaded.resnet.eval()(x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arch", "stem", "channels"),
    [
        *((name, "resnet18", "first", 1) for name in ("torchvision", "timm", "smp", "monai2d")),
        *((name, "resnet50", "third", 3) for name in ("torchvision", "timm", "smp")),
    ],
)
def test_the_lines_of_the_card_load_the_file_and_give_our_features(
    name, arch, stem, channels, images, tmp_path, monkeypatch, request
):
    made = request.getfixturevalue(arch)
    card = export(made, tmp_path, stem, format=name, channels=channels)
    loaded = follow(card, tmp_path, monkeypatch)
    x = ((images - GREY_MEAN) / GREY_STD).repeat(1, channels, 1, 1)
    torch.testing.assert_close(features(loaded, x), pooled(made.joint.encoder(images)), **TOLERANCE)
    assert card["input"] | {"normalise": ""} == {
        "shape": f"[N, {channels}, H, W]",
        "range": [0, 1],
        "grey_mean": GREY_MEAN,
        "grey_std": GREY_STD,
        "normalise": "",
    }
    assert card["input"]["normalise"].startswith("outside")


@pytest.mark.parametrize("stem", ["first", "second", "third", "third_encoder"])
def test_every_stage_exports_the_same_tensors_in_both_files(stem, resnet18, tmp_path):
    from safetensors.torch import load_file

    export(resnet18, tmp_path, stem, format="torchvision")
    expected = resnet18.joint.encoder.torchvision_state()
    pickled = torch.load(tmp_path / f"{stem}_torchvision.pth", weights_only=True)
    safe = load_file(tmp_path / f"{stem}_torchvision.safetensors")
    for state in (pickled, safe):
        assert sorted(state) == sorted(expected)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["torchvision", "timm", "smp", "monai2d"])
def test_the_lines_of_the_card_load_half_precision_into_a_float32_network(
    name, resnet18, images, tmp_path, monkeypatch
):
    card = export(resnet18, tmp_path, format=name, channels=1, half=True)
    loaded = follow(card, tmp_path, monkeypatch)
    parameters = getattr(loaded, "unet", None) or loaded.resnet
    assert {value.dtype for value in parameters.parameters()} == {torch.float32}
    ours = pooled(resnet18.joint.encoder(images))
    # Each weight is off by 2^-11 of itself at most (tiny ones by 3e-8), and the errors of many average out.
    error = features(loaded, (images - GREY_MEAN) / GREY_STD) - ours
    assert 0 < error.norm() < 2e-3 * ours.norm()
    assert card["dtype"] == "float16"


def test_a_resnet50_in_half_precision_is_one_file_of_less_than_50_megabytes(resnet50, tmp_path):
    card = export(resnet50, tmp_path, format="torchvision", half=True, one_file=True)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".pth"]
    assert list(card["files"]) == ["third_torchvision_fp16.pth"]
    assert (tmp_path / "third_torchvision_fp16.pth").stat().st_size < 50e6
    state = torch.load(tmp_path / "third_torchvision_fp16.pth", weights_only=True)
    for key, value in resnet50.joint.encoder.torchvision_state().items():
        expected = value.half() if value.is_floating_point() else value
        assert state[key].dtype == expected.dtype
        assert torch.equal(state[key], expected)


@pytest.mark.parametrize(("name", "suffix"), [("timm", ".safetensors"), ("smp", ".pth")])
def test_one_file_is_the_one_that_the_card_loads(name, suffix, resnet18, tmp_path, monkeypatch):
    card = export(resnet18, tmp_path, format=name, one_file=True)
    assert [Path(file).suffix for file in card["files"]] == [suffix]
    follow(card, tmp_path, monkeypatch)


def test_what_half_precision_cannot_hold_is_refused_by_name():
    state = {"bn.running_var": torch.tensor([1.0, 7e4]), "bn.num_batches_tracked": torch.tensor(10**9)}
    with pytest.raises(UserError, match=r"bn.running_var hold values up to 70000, .*at most 65504"):
        exports.halved(state)
    small = exports.halved({**state, "bn.running_var": torch.tensor([1.0, 6.5e4])})
    assert small["bn.running_var"].dtype == torch.float16
    assert int(small["bn.num_batches_tracked"]) == 10**9  # a count stays one


@pytest.mark.parametrize("name", ["joint", "onnx"])
def test_a_program_has_no_half_precision(name, resnet18, tmp_path):
    with pytest.raises(UserError, match=f"{name} is a program"):
        export(resnet18, tmp_path, format=name, half=True)
    assert not any(tmp_path.iterdir())


def test_the_card_says_what_they_were_trained_on_and_what_not_to_expect(resnet18, tmp_path):
    card = export(resnet18, tmp_path, format="torchvision", half=True, channels=1)
    people = (tmp_path / "third_torchvision_fp16.md").read_text()
    assert people.index("## Trained on") < people.index("## What not to expect")
    assert all(f"- {limit}" in people for limit in card["not_to_expect"])
    assert "the transformer over slices is not in this file" in people
    assert "float16" in people


@torch.no_grad()
def test_a_volume_constant_along_depth_gives_the_2d_response_in_3d(resnet18, tmp_path, monkeypatch):
    """Under `mean` where no zero padding along depth is in sight: after layer1 of ResNet-18 that is 21 slices in. The
    pooled features of so short a volume are then far from the 2D ones, which is why it is not the default."""
    card = export(resnet18, tmp_path, format="monai3d", inflation="mean")
    loaded = follow(card, tmp_path, monkeypatch)
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    volume = ((image - GREY_MEAN) / GREY_STD).unsqueeze(2).expand(1, 1, 48, 32, 32)
    maps = {}
    loaded.resnet.eval().layer1.register_forward_hook(lambda module, given, out: maps.update(first=out))
    features, expected = loaded.resnet(volume), resnet18.joint.encoder(image)
    torch.testing.assert_close(maps["first"][:, :, 6], expected[0], **TOLERANCE)
    assert torch.linalg.norm(features - pooled(expected)) > 0.1 * torch.linalg.norm(pooled(expected))


@torch.no_grad()
def test_by_default_a_volume_of_any_depth_gives_the_2d_features(resnet50, images, tmp_path, monkeypatch):
    card = export(resnet50, tmp_path, format="monai3d", channels=3)
    loaded = follow(card, tmp_path, monkeypatch)
    volume = ((images - GREY_MEAN) / GREY_STD).repeat(1, 3, 1, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(loaded.resnet.eval()(volume), pooled(resnet50.joint.encoder(images)), **TOLERANCE)
    assert card["inflation"] == "centre"
    assert card["input"]["shape"] == "[N, 3, D, H, W]"


def test_mean_inflation_spreads_a_kernel_evenly_and_leaves_batch_norm_as_it_is():
    state = {
        "conv.weight": torch.rand(4, 2, 7, 7),
        "bn.weight": torch.rand(4),
        "bn.num_batches_tracked": torch.ones(()),
    }
    deep = exports.inflate(state, "mean")
    assert deep["conv.weight"].shape == (4, 2, 7, 7, 7)
    assert torch.equal(deep["conv.weight"][:, :, 0], deep["conv.weight"][:, :, 6])
    torch.testing.assert_close(deep["conv.weight"].sum(dim=2), state["conv.weight"])
    assert torch.equal(deep["bn.weight"], state["bn.weight"])


def test_monai_flexible_unet_takes_the_file_as_its_encoder(resnet50, tmp_path):
    from monai.networks.nets import FlexibleUNet

    export(resnet50, tmp_path, format="monai3d")
    with torch.device("meta"):  # skips MONAI's initialisation, which takes seconds
        unet = FlexibleUNet(1, 2, "resnet50", spatial_dims=3)
    state = torch.load(tmp_path / "third_monai3d.pth", weights_only=True)
    unet.encoder.load_state_dict(state, assign=True)
    assert torch.equal(unet.encoder.conv1.weight, state["conv1.weight"])


def test_torchvisions_own_detector_takes_the_file_as_its_body(resnet50, tmp_path):
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    export(resnet50, tmp_path, format="torchvision")
    with torch.device("meta"):
        detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=15)
    state = torch.load(tmp_path / "third_torchvision.pth", weights_only=True)
    detector.backbone.body.load_state_dict(state, assign=True)
    assert torch.equal(detector.backbone.body.conv1.weight, state["conv1.weight"])


@torch.no_grad()
def test_the_exported_program_embeds_volumes_of_any_size(resnet18, tmp_path, monkeypatch):
    card = export(resnet18, tmp_path, format="joint")
    loaded = None
    for shape in ((1, 5, 40, 48), (3, 12, 64, 33), (2, 23, 36, 36)):
        volumes = torch.rand(shape, generator=torch.Generator().manual_seed(4))
        mask = torch.ones(shape[:2], dtype=torch.bool)
        mask[0, -2:] = False
        loaded = loaded or follow(card, tmp_path, monkeypatch, volumes=volumes, mask=mask)
        _, tokens = resnet18.joint.tokens(volumes, mask)
        torch.testing.assert_close(loaded.model(volumes, mask), resnet18.joint.holistic(tokens, mask), **TOLERANCE)
    assert loaded.embedding.shape == (1, 32)
    assert card["input"]["normalise"].startswith("inside")


@torch.no_grad()
def test_onnxruntime_gives_features_and_maps_of_any_size(resnet50, images, tmp_path, monkeypatch):
    card = export(resnet50, tmp_path, format="onnx")
    for x in (images, images[:1, :, :50, :40]):
        loaded = follow(card, tmp_path, monkeypatch, images=x.numpy())
        stages = resnet50.joint.encoder(x)
        torch.testing.assert_close(torch.from_numpy(loaded.features), pooled(stages), **TOLERANCE)
        (third,) = loaded.session.run(["stage3"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(third), stages[2], **TOLERANCE)


def test_the_card_names_files_by_checksum_and_what_made_them(resnet18, tmp_path):
    card = export(resnet18, tmp_path, format="timm")
    assert len(card["files"]) == 2
    for name, digest in card["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert card["source"]["sha256"] == hashlib.sha256((resnet18.folder / "third.pth").read_bytes()).hexdigest()
    assert (card["config"]["arch"], card["config"]["d_model"]) == ("resnet18", 32)
    assert not [key for key in card["config"] if key.endswith("_path")]  # nobody else's business
    assert "mask_swav.pth" in card["licence"]  # the weights that it started from
    people = (tmp_path / "third_timm.md").read_text()
    for said in (*card["use"], *card["files"].values(), card["commit"], "(grey - 0.449) / 0.226", card["licence"]):
        assert said in people


def test_this_projects_loaders_read_an_exported_file(resnet18, tmp_path):
    from downstream.encoders import load_encoder

    export(resnet18, tmp_path, format="timm")
    again = load_encoder(str(tmp_path / "third_timm.pth"))
    torch.testing.assert_close(again.conv1.weight, resnet18.joint.encoder.conv1.weight)
    export(resnet18, tmp_path, format="timm", half=True)
    again = load_encoder(str(tmp_path / "third_timm_fp16.pth"))
    torch.testing.assert_close(again.conv1.weight, resnet18.joint.encoder.conv1.weight, rtol=1e-3, atol=1e-5)
    assert again.conv1.weight.dtype == torch.float32


def test_all_leaves_out_what_a_resnet_alone_cannot_give(resnet18, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_weights, "TARGETS", {k: export_weights.TARGETS[k] for k in ("smp", "joint", "onnx")})
    export_weights.main(Config(weights=str(resnet18.folder / "first.pth"), format="all", dest=str(tmp_path)))
    assert "joint: left out" in capsys.readouterr().out
    assert {p.suffix for p in tmp_path.iterdir()} == {".pth", ".safetensors", ".onnx", ".json", ".md"}
    with pytest.raises(UserError, match="holds a ResNet alone"):
        export(resnet18, tmp_path, "first", format="joint")


def test_a_wide_resnet_is_refused_where_the_library_has_none(resnet18, tmp_path, monkeypatch):
    record = {"config": {"arch": "wide_resnet50_2"}, "sha256": ""}
    source = export_weights.Source(tmp_path / "w.pth", record, resnet18.joint.encoder, None)
    monkeypatch.setattr(export_weights, "read", lambda weights, arch: source)
    with pytest.raises(UserError, match="segmentation_models_pytorch has no wide_resnet50_2"):
        export_weights.main(Config(weights="w.pth", format="smp", dest=str(tmp_path)))


def test_wrong_input_is_named(resnet18, tmp_path):
    file, about = tmp_path / "first.pth", tmp_path / "first.json"

    def said(**options) -> str:
        with pytest.raises(UserError) as error:
            export_weights.main(Config(**({"weights": str(file), "dest": str(tmp_path / "out")} | options)))
        return str(error.value)

    assert "no such file" in said()
    shutil.copy(resnet18.folder / "first.pth", file)
    assert f"{about}: missing" in said()
    about.write_text("{}")
    assert f"{about}: damaged" in said()
    record = json.loads((resnet18.folder / "first.json").read_text())
    about.write_text(json.dumps(record | {"sha256": "0" * 64}))
    assert "is of other weights" in said()
    about.write_text(json.dumps(record))
    assert "made with resnet18" in said(arch="resnet50")
    (tmp_path / "taken").touch()
    assert "dest" in said(dest=str(tmp_path / "taken"))
    other = {"weights": str(tmp_path / "x.pth")}
    torch.save({"fc.weight": torch.ones(2)}, other["weights"])
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    (tmp_path / "x.json").write_text(json.dumps(record | {"sha256": digest}))
    assert "missing" in said(**other)
    record["config"]["arch"] = "resnet50"
    about.write_text(json.dumps(record))
    assert "loaded as resnet50" in said()
