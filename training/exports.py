"""The encoders in the layouts that other libraries load: state dicts of plain ResNets, torch.export, ONNX."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import JointEncoder
from models.resnet import GreyResNet, plain, pooled
from utils.errors import UserError

Inflation = Literal["centre", "mean"]


def plain_state(encoder: GreyResNet, channels: int) -> dict[str, Tensor]:
    """State dict of the ResNet without `fc` in torchvision's names, with a stem for 1 or 3 equal channels.

    A plain ResNet does not normalise: it gives the encoder's features for (grey - GREY_MEAN) / GREY_STD.
    torchvision, timm, segmentation_models_pytorch and MONAI (2D) share these names and shapes.
    """
    state = encoder.torchvision_state()
    if channels == 1:
        state["conv1.weight"] = plain(encoder.conv1.weight)
    return {name: value.contiguous() for name, value in state.items()}


def inflate(state: dict[str, Tensor], how: Inflation = "centre") -> dict[str, Tensor]:
    """2D convolutions [O, I, k, k] -> 3D ones [O, I, k, k, k], the first k along depth; everything else as it is.

    centre: the middle depth gets the 2D kernel, the others 0. A volume that is constant along depth gives the 2D
    response everywhere, and every slice is seen alone until training fills the zeros.
    mean: each depth gets the 2D kernel / k (I3D, Carreira and Zisserman 2017). The 2D response then holds only where
    zero padding along depth is out of sight: not in volumes of usual depth.
    """

    def deep(weight: Tensor) -> Tensor:
        k = weight.shape[-1]
        if how == "mean":
            return (weight / k).unsqueeze(2).repeat(1, 1, k, 1, 1)
        return F.pad(weight.unsqueeze(2), (0, 0, 0, 0, k // 2, k - 1 - k // 2))

    return {name: deep(value) if value.dim() == 4 else value for name, value in state.items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float16, everything else as it is. Raises UserError naming tensors that do not fit."""
    small = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if broken := [name for name, value in small.items() if value.is_floating_point() and not value.isfinite().all()]:
        largest = max(float(state[name].abs().max()) for name in broken)
        raise UserError(
            f"half: {', '.join(broken[:3])}{', ...' * (len(broken) > 3)} hold values up to {largest:g}, which half "
            f"precision cannot (at most {torch.finfo(torch.float16).max:g}); leave --half out"
        )
    return small


class VolumeEmbedding(nn.Module):
    """`JointEncoder` as one function with plain shapes, for tracing.

    forward: volumes [B, D, H, W] in 0..1 and mask [B, D] (True for real slices, which come first) -> [B, d], unit
    length. Padded slices pass through the ResNet and are dropped after it, which gives the same result in eval mode.
    """

    def __init__(self, joint: JointEncoder) -> None:
        super().__init__()
        self.joint = joint

    def forward(self, volumes: Tensor, mask: Tensor) -> Tensor:
        _, embedded = self.joint.slices(volumes.flatten(0, 1).unsqueeze(1))
        tokens = embedded.unflatten(0, mask.shape) * mask.unsqueeze(-1)
        return self.joint.holistic(tokens, mask)


class EncoderOutputs(nn.Module):
    """`GreyResNet`: images [N, 1, H, W] in 0..1 -> pooled features [N, C4] and its four maps."""

    def __init__(self, encoder: GreyResNet) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        stages = self.encoder(images)
        return pooled(stages), *stages


def state_file(state: dict[str, Tensor]) -> bytes:
    """A state dict as torch.save writes it (.pth)."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def program_file(joint: JointEncoder) -> bytes:
    """`VolumeEmbedding` through torch.export (.pt2): any batch, D from 5, H and W from 33 (torch fixes sizes of 1)."""
    volumes, mask = torch.rand(2, 9, 64, 64), torch.ones(2, 9, dtype=torch.bool)
    any_size = torch.export.Dim.AUTO
    shapes = {"volumes": dict.fromkeys(range(4), any_size), "mask": dict.fromkeys(range(2), any_size)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(VolumeEmbedding(joint).eval(), (volumes, mask), dynamic_shapes=shapes), file)
    return file.getvalue()


def onnx_file(encoder: GreyResNet) -> bytes:
    """`EncoderOutputs` as ONNX: input `images`, outputs `features` and `stage1` to `stage4`, any batch and size."""
    stages = [f"stage{i}" for i in range(1, 5)]
    spatial = {0: "batch", 2: "height", 3: "width"}
    sizes = {"images": spatial, "features": {0: "batch"}} | dict.fromkeys(stages, spatial)
    names = {"input_names": ["images"], "output_names": ["features", *stages], "dynamic_axes": sizes}
    example, file = torch.rand(2, 1, 64, 64), io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript; this one writes the same graph for a ResNet.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(EncoderOutputs(encoder).eval(), (example,), file, dynamo=False, **names)
    return file.getvalue()
