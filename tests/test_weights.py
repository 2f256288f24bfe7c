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
    names = {"resnet_pretrained": resnet, "trans_pretrained": trans, "checkpoint_name": "made.pth"}
    return SimpleNamespace(stage=3, arch="resnet18", pretrained_path=str(folder), **names)


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


def trunk(source, prefix):
    return {prefix + k: v for k, v in source.items() if not k.startswith("fc.")}


def test_a_file_of_swav_loads_and_what_is_beside_the_resnet_is_counted(source, tmp_path, capsys):
    heads = {"module.projection_head.0.weight": torch.ones(4, 4), "module.prototypes.weight": torch.ones(9, 4)}
    torch.save(trunk(source, "module.") | heads, tmp_path / "x.pth")
    resnet = GreyResNet("resnet18")
    weights.load_backbone(resnet, chosen(tmp_path, "x.pth"))
    for key, value in resnet.state_dict().items():
        expected = fold_grey(source[key]) if key == "conv1.weight" else source[key]
        torch.testing.assert_close(value, expected)
    (line,) = capsys.readouterr().out.splitlines()
    beside = "projection_head.0.weight, prototypes.weight"
    assert line.endswith(f"x.pth: matched 120, missing 0, unexpected 2 ({beside})")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "layer3.0.conv2.weight"}, r"missing 1.*layer3\.0\.conv2"),
        (lambda s: s | {"layer4.0.conv1.weight": torch.ones(1, 1, 3, 3)}, r"layer4\.0\.conv1\.weight is \(1, 1"),
        (lambda s: s | {"bn1.bias": torch.full((64,), torch.nan)}, r"bn1\.bias hold NaN"),
        (lambda s: [1, 2], "holds no tensors"),
        (lambda s: None, "cannot be read as tensors .*cut short"),
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
    with pytest.raises(UserError, match=r"evil\.pth: holds no tensors"):
        weights.load_backbone(GreyResNet("resnet18"), chosen(tmp_path, "evil.pth"))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match=r"no\.pth: no such weights file; run ssl_swav2D.*--resnet_pretrained none"):
        weights.load_backbone(GreyResNet("resnet18"), chosen(tmp_path, "no.pth"))


def test_imagenet_is_found_in_torch_s_cache(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth is not there, and nothing is downloaded"):
        weights.check(chosen(tmp_path, "imagenet"))
    (tmp_path / "checkpoints").mkdir()
    torch.save(source, tmp_path / "checkpoints/resnet18-f37072fd.pth")
    weights.check(chosen(tmp_path, "imagenet"))
    weights.load_backbone(resnet := GreyResNet("resnet18"), chosen(tmp_path, "imagenet"))
    assert torch.equal(resnet.bn1.weight, source["bn1.weight"])


def test_results_that_could_not_be_written_are_noticed_before_training(source, tmp_path):
    torch.save(source, tmp_path / "first.pth")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "a_encoder.json").mkdir()
    (tmp_path / "link.pth").symlink_to("first.pth")
    for name, says in {
        "weights.json": "overwritten by its own record; end it in .pth",
        "first.pth": "would overwrite resnet_pretrained",
        "link.pth": "would overwrite resnet_pretrained",
        "folder.pth": r"folder\.pth is a folder",
        "a.pth": r"a_encoder\.json is a folder",
        "first.pth/x.pth": "is no folder that can be written to",
    }.items():
        config = chosen(tmp_path, "first.pth")
        config.checkpoint_name = name
        with pytest.raises(UserError, match=says):
            weights.check(config)
    weights.check(chosen(tmp_path, "first.pth"))
    torch.save(source, tmp_path / "first_encoder.pth")
    config = chosen(tmp_path, "first_encoder.pth")
    config.checkpoint_name = "first.pth"
    with pytest.raises(UserError, match=r"would overwrite resnet_pretrained .*first_encoder\.pth"):
        weights.check(config)
    with pytest.raises(UserError, match=r"first\.pth: holds no transformer.*mask_swav"):
        weights.check(chosen(tmp_path, trans="first.pth"))


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


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layers": 10**8}, r"joint\.json: is of other weights than joint\.pth, which holds d_model 32 and layers 2"),
        ({"layers": 1e8}, "of other weights"),
        ({"layers": "2"}, "of other weights"),
        ({"d_model": 10**9}, "of other weights"),
        ({"attention": "magic"}, "attention 'magic' is none of deformable, ordinary, mean"),
        ({"arch": "resnet9000"}, r"joint\.json: damaged"),
        ({"arch": "resnet50"}, "encoder.*missing"),
        ("[" * 10**5, r"joint\.json: damaged"),
        (" " * 2**25, r"joint\.json: damaged"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_record_that_claims_what_the_file_does_not_hold_is_refused(config, says, joint):
    about = joint[1] / "joint.json"
    record = json.loads(about.read_text())
    about.write_text(config if isinstance(config, str) else json.dumps({"config": record["config"] | config}))
    with pytest.raises(UserError, match=says):
        weights.load_joint(joint[1] / "joint.pth")


def test_a_file_that_claims_what_it_does_not_hold_makes_no_network(joint):
    path, width = joint[1] / "joint.pth", 2**20  # a transformer of this width would take terabytes
    state = torch.load(path)
    state["projection.weight"] = torch.zeros(width, 1)
    torch.save(state, path)
    path.with_suffix(".json").write_text(json.dumps({"config": {"arch": "resnet18", "d_model": width, "layers": 2}}))
    with pytest.raises(UserError, match=r"joint\.pth projection\.: .*instead of"):
        weights.load_joint(path)


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
