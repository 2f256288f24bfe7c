"""U-Net decoder over the slice encoder's stages: what L_recon trains beside the encoder, and segmentation starts from.

Source: Ronneberger, Fischer and Brox 2015, with a ResNet as its contracting path (widths as is usual for that).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import GreyResNet

WIDTHS = (256, 128, 64, 32, 16)  # channels of the blocks, from the bottleneck to full resolution


class Block(nn.Module):
    """Twice as large, joined with the encoder's map of that size, two 3 x 3 convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*_conv(inputs + skip, outputs), *_conv(outputs, outputs))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        size = [2 * side for side in x.shape[-2:]] if skip is None else skip.shape[-2:]
        x = F.interpolate(x, size, mode="nearest")
        return self.convs(x if skip is None else torch.cat([x, skip], dim=1))


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU(inplace=True)]


class UNetDecoder(nn.Module):
    """The encoder's maps (stem, four stages) -> [N, outputs, H, W].

    Instance normalisation: what comes out for a slice depends on this slice alone, whatever the batch.
    d_model: size of the embeddings that f_inter gives for every cell of the bottleneck; 0: there are none. They are
    mapped to its channels and added. This map starts at 0, so a new one changes nothing.
    """

    def __init__(self, resnet: GreyResNet, outputs: int, d_model: int = 0) -> None:
        super().__init__()
        skips = [*reversed(resnet.stage_features[:-1]), resnet.stem_features, 0]
        inputs = [resnet.num_features, *WIDTHS[:-1]]
        self.blocks = nn.ModuleList(Block(*widths) for widths in zip(inputs, skips, WIDTHS, strict=True))
        self.head = nn.Conv2d(WIDTHS[-1], outputs, 3, padding=1)
        self.from_inter = None
        if d_model:
            self.from_inter = nn.Linear(d_model, resnet.num_features)
            nn.init.zeros_(self.from_inter.weight)
            nn.init.zeros_(self.from_inter.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, stages: list[Tensor], context: Tensor | None = None) -> Tensor:
        """stages: of `GreyResNet(..., stem=True)`.  context [N, h, w, d_model]: of `JointEncoder.cells`."""
        *skips, x = stages
        if context is not None:
            x = x + self.from_inter(context).permute(0, 3, 1, 2).to(x.dtype)
        for block, skip in zip(self.blocks, [*reversed(skips), None], strict=True):
            x = block(x, skip)
        return self.head(x)


def widen_stem(resnet: GreyResNet, channels: int) -> None:
    """A stem for several channels: weights / channels each, so that equal channels give the features of one."""
    weight = resnet.conv1.weight.detach() / channels
    resnet.conv1.weight = nn.Parameter(weight.repeat(1, channels, 1, 1).to(memory_format=torch.channels_last))
    resnet.conv1.in_channels = channels
