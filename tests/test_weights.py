"""Weights of every known layout load completely or not at all, and come out under the promised names."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from tiny import save_weights

from models.encoder import JointEncoder
from models.resnet import GreyResNet, fold_grey, pooled
from training import weights
from utils.errors import UserError


def chosen(folder: Path, resnet: str = "none", trans: str = "none") -> SimpleNamespace:
    """Options that name weights files."""
    return SimpleNamespace(stage=3, pretrained_path=str(folder), resnet_pretrained=resnet, trans_pretrained=trans)


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


def trunk(source, prefix):
    return {prefix + k: v for k, v in source.items() if not k.startswith("fc.")}


LAYOUTS = {
    "torchvision": lambda s: s,
    "swav": lambda s: (
        trunk(s, "module.")
        | {"module.projection_head.0.weight": torch.ones(4, 4), "module.prototypes.weight": torch.ones(9, 4)}
    ),
    "vissl": lambda s: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": trunk(s, "_feature_blocks."), "heads": {"x": torch.ones(2)}}}
        }
    },
    "ours": lambda s: trunk(s, "encoder.") | {"projection.weight": torch.ones(4, 4)},
    "grey": lambda s: trunk(s, "") | {"conv1.weight": fold_grey(s["conv1.weight"])},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, source, tmp_path, capsys):
    torch.save(LAYOUTS[layout](source), tmp_path / "x.pth")
    resnet = GreyResNet("resnet18")
    weights.load_backbone(resnet, chosen(tmp_path, "x.pth"))
    for key, value in resnet.state_dict().items():
        expected = fold_grey(source[key]) if key == "conv1.weight" else source[key]
        torch.testing.assert_close(value, expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert "x.pth: matched 120, missing 0, unexpected" in line


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "layer3.0.conv2.weight"}, r"missing 1.*layer3\.0\.conv2"),
        (lambda s: s | {"layer4.0.conv1.weight": torch.ones(1, 1, 3, 3)}, r"layer4\.0\.conv1\.weight is \(1, 1"),
        (lambda s: s | {"bn1.bias": torch.full((64,), torch.nan)}, r"bn1\.bias hold NaN"),
        (lambda s: [1, 2], "not a state dict"),
        (lambda s: None, "cannot be read as tensors only"),
    ],
)
def test_incomplete_and_damaged_files_are_refused(state, says, source, tmp_path):
    torch.save(state(source) or source, tmp_path / "x.pth")
    if state(source) is None:
        whole = (tmp_path / "x.pth").read_bytes()
        (tmp_path / "x.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"(?s)x\.pth.*({says})"):
        weights.load_backbone(GreyResNet("resnet18"), chosen(tmp_path, "x.pth"))


def test_files_that_would_run_something_or_are_missing_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: cannot be read as tensors only"):
        weights.load_backbone(GreyResNet("resnet18"), chosen(tmp_path, "evil.pth"))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match=r"no\.pth: no such weights file; run ssl_swav2D.*--resnet_pretrained none"):
        weights.load_backbone(GreyResNet("resnet18"), chosen(tmp_path, "no.pth"))


@pytest.fixture
def joint(tmp_path):
    torch.manual_seed(1)
    encoder = JointEncoder("resnet18", 32, layers=2)
    save_weights(encoder, tmp_path / "joint.pth", {"config": {"arch": "resnet18", "d_model": 32, "layers": 2}})
    return encoder.eval(), tmp_path


def test_joint_files_have_the_promised_names_and_load_back(joint):
    encoder, folder = joint
    state = torch.load(folder / "joint.pth", weights_only=True)
    assert {k.split(".")[0] for k in state} == {"encoder", "projection", "transformer"}
    flat = torch.load(folder / "joint_encoder.pth", weights_only=True)
    assert flat.keys() == {k.removeprefix("encoder.") for k in state if k.startswith("encoder.")}
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(flat)  # strict
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        theirs = resnet.eval()(((images - 0.449) / 0.226).repeat(1, 3, 1, 1))
        torch.testing.assert_close(pooled(encoder.resnet(images)), theirs, atol=1e-4, rtol=1e-4)
        again = weights.load_joint(folder / "joint.pth").eval()
        volumes, mask = torch.rand(2, 6, 32, 32), torch.ones(2, 6, dtype=torch.bool)
        ours = [e.holistic(e.tokens(volumes, mask)[1], mask) for e in (encoder, again)]
    torch.testing.assert_close(*ours, atol=1e-5, rtol=1e-5)
    digest = hashlib.sha256((folder / "joint.pth").read_bytes()).hexdigest()
    assert json.loads((folder / "joint.json").read_text())["sha256"] == digest


def test_parts_that_do_not_fit_and_damaged_records_are_named(joint):
    folder = joint[1]
    with pytest.raises(UserError, match=r"(?s)joint\.pth transformer\..*layers"):
        weights.load_transformer(JointEncoder("resnet18", 32, layers=3), chosen(folder, trans="joint.pth"))
    learner = SimpleNamespace(decoder=torch.nn.Linear(32, 32), mask_token=torch.zeros(32))
    with pytest.raises(UserError, match="decoder"):
        weights.load_mask_head(learner, chosen(folder, trans="joint.pth"))
    (folder / "joint.json").write_text('{"config": {"arch": "resnet18"}}')
    with pytest.raises(UserError, match=r"joint\.json"):
        weights.load_joint(folder / "joint.pth")


def halved(state):
    return {name: v.half() if v.is_floating_point() else v for name, v in state.items()}


def test_a_resnet_is_the_same_after_rounding_and_another_is_not(source, joint, recwarn):
    """The ResNet has a stem in colours, of which stage 2 keeps the sum. Restored: rounded, but in float32 again."""
    encoder, folder = joint
    fresh = JointEncoder("resnet18", 32, layers=2)
    torch.save(source, folder / "first.pth")
    torch.save(halved(source), folder / "first_half.pth")
    weights.load_backbone(encoder.resnet, chosen(folder, "first.pth"))
    state = weights.joint_state(encoder)
    half = halved(state)
    restored = {name: v.float() if v.is_floating_point() else v for name, v in half.items()}
    for stage_2 in (state, half, restored):
        torch.save(stage_2, folder / "second.pth")
        for stage_1 in ("first.pth", "first_half.pth"):
            weights.load_backbone(fresh.encoder, chosen(folder, stage_1))
            weights.load_transformer(fresh, chosen(folder, trans="second.pth"))
            assert not recwarn.list
            with torch.no_grad():
                fresh.encoder.conv1.weight *= 1.005  # as little as that is more than rounding
            with pytest.warns(UserWarning, match=r"second\.pth was trained on another ResNet"):
                weights.load_transformer(fresh, chosen(folder, trans="second.pth"))
        for part in ("projection", "transformer"):
            theirs = getattr(encoder, part).state_dict()
            for name, value in getattr(fresh, part).state_dict().items():
                torch.testing.assert_close(value, theirs[name], atol=1e-3, rtol=1e-3)
