"""Stops, files and options at their edges: what a late review found, and what it found right."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from tiny import losses, run, stop_after, write_data

import mask_swav
import ssl_swav3D
from models.encoder import JointEncoder
from models.resnet import GreyResNet
from objectives.learners import MaskedSlices
from training import weights
from utils import checkpoint, config
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def chosen(folder: Path, resnet: str = "none", trans: str = "none") -> SimpleNamespace:
    """Options that name weights files."""
    return SimpleNamespace(stage=3, pretrained_path=str(folder), resnet_pretrained=resnet, trans_pretrained=trans)


def save_joint(folder: Path, layers: int = 2) -> JointEncoder:
    torch.manual_seed(1)
    encoder = JointEncoder("resnet18", 32, layers=layers)
    weights.save_joint(
        SimpleNamespace(encoder=encoder, resnet=encoder.resnet),
        folder / "joint.pth",
        {"config": {"arch": "resnet18", "d_model": 32, "layers": layers}},
    )
    return encoder


# ---- stopping at the end of an epoch


@pytest.mark.parametrize("script", ["ssl_swav2D", "mask_swav"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_stopped_in_the_last_step_of_an_epoch_ends_the_same(script, epoch, data, tmp_path, monkeypatch):
    whole = run(script, data, tmp_path / "whole")
    steps = 5 if "2D" in script else 4
    with monkeypatch.context() as patch:
        stop_after(epoch * steps, patch)
        with contextlib.suppress(SystemExit):  # in the very last step there is nothing left to stop
            run(script, data, tmp_path / "parts")
    resumed = run(script, data, tmp_path / "parts")
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    assert losses(tmp_path / "parts" / "runs" / script) == losses(tmp_path / "whole" / "runs" / script)


def test_a_moved_tree_goes_on(data, tmp_path):
    run("mask_swav", data, tmp_path, epochs=1)
    other = write_data(tmp_path / "elsewhere")
    run("mask_swav", other, tmp_path, epochs=2)


# ---- checkpoints


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / checkpoint.LATEST)
    with pytest.raises(UserError, match=r"checkpoint\.pth.*not a checkpoint"):
        checkpoint.load(tmp_path)


# ---- weights of another architecture


def test_a_bottleneck_resnet_is_refused(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"(?s)x\.pth.*arch"):
        weights.load_backbone(GreyResNet("resnet18"), chosen(tmp_path, "x.pth"))


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_transformer_layers_is_refused(layers, tmp_path):
    saved = save_joint(tmp_path)
    fresh = JointEncoder("resnet18", 32, layers=layers)
    fresh.encoder.load_state_dict(saved.encoder.state_dict())
    with pytest.raises(UserError, match=r"(?s)joint\.pth transformer\..*layers"):
        weights.load_transformer(fresh, chosen(tmp_path, trans="joint.pth"))


def test_the_mask_head_of_a_file_without_one_is_refused(tmp_path):
    save_joint(tmp_path)
    learner = torch.nn.Module()
    learner.decoder, learner.mask_token = torch.nn.Linear(32, 32), torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(UserError, match="decoder"):
        weights.load_mask_head(learner, chosen(tmp_path, trans="joint.pth"))


@pytest.mark.parametrize("text", ["{", "{}", '{"config": {"arch": "resnet18"}}'])
def test_a_damaged_record_is_named(text, tmp_path):
    save_joint(tmp_path)
    (tmp_path / "joint.json").write_text(text)
    with pytest.raises(UserError, match=r"joint\.json"):
        weights.load_joint(tmp_path / "joint.pth")


# ---- options


@pytest.mark.parametrize("script", [mask_swav, ssl_swav3D])
def test_one_slice_per_view_is_refused_only_where_slices_are_masked(script):
    cfg = script.Config(target_shape=(1, 64, 64))
    if script is mask_swav:
        with pytest.raises(UserError, match="target_shape"):
            config.check(cfg)
    else:
        config.check(cfg)  # lambda_mask is 0


def test_only_images_in_stage_2_is_said_as_such(data, tmp_path):
    shutil.copytree(data / "Images", tmp_path / "images" / "Images")
    with pytest.raises(UserError) as error:
        run("mask_swav", tmp_path / "images", tmp_path)
    assert "volumes" in str(error.value)
    assert "lower --batch_size" not in str(error.value)  # no batch size would help


def test_the_first_failed_step_does_not_promise_a_checkpoint(data, tmp_path, monkeypatch):
    forward = MaskedSlices.forward
    monkeypatch.setattr(
        MaskedSlices, "forward", lambda self, b: {k: v * float("nan") for k, v in forward(self, b).items()}
    )
    with pytest.raises(UserError, match=r"epoch 0 step 2;.*\(3 in a row.*none was saved yet") as error:
        run("mask_swav", data, tmp_path, max_bad_steps=3)
    assert not (tmp_path / "runs" / "mask_swav" / "checkpoint.pth").exists()
    assert "keeps the last good checkpoint" not in str(error.value)
