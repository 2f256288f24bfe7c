"""The slice encoder as a fixed function: BatchNorm folded into the convolutions, channels last, no gradients."""

from __future__ import annotations

import copy
import hashlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.encoder import JointEncoder, real_rows, spread
from models.resnet import GreyResNet, multi_scale, wide

# Pixels per call of the ResNet, which bound its memory. A CPU is fastest with 16 to 64 slices of 128 x 128 (4 and 128
# take a tenth longer or more); a GPU wants enough of them to hide what launching its kernels takes.
CHUNK_PIXELS = {"cpu": 2**19, "cuda": 2**25}


def fold_batch_norm(resnet: GreyResNet) -> GreyResNet:
    """A frozen copy without BatchNorm: the same function as `resnet` in eval mode, up to rounding.

    Every BatchNorm of torchvision's ResNets follows its convolution, also in the order of registration. The grey
    normalisation stays: folded into the stem, it would change what zero padding means at the borders.
    """
    folded = copy.deepcopy(resnet).eval()
    for block in list(folded.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(block.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                setattr(block, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(block, norm_name, nn.Identity())
    return folded.requires_grad_(False).to(memory_format=torch.channels_last)


class FrozenSlices:
    """Slice embeddings of a joint encoder whose ResNet and projection do not train: `JointEncoder.tokens`, faster.

    Holds the ResNet's weights as they are now, folded; make another one after they changed.
    """

    def __init__(self, encoder: JointEncoder) -> None:
        self.resnet = fold_batch_norm(encoder.resnet)
        self.projection = encoder.projection

    @torch.no_grad()
    def __call__(self, volumes: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, D, H, W] and mask [B, D] -> slice embeddings [B, D, d] float32, 0 at padded slices.

        rows: `real_rows(mask)`, for callers that know it without waiting for the device.
        """
        rows = real_rows(mask) if rows is None else rows
        images = volumes.flatten(0, 1)[rows].unsqueeze(1)  # [n, 1, H, W]
        count = max(1, CHUNK_PIXELS[images.device.type] // images[0].numel())
        embedded = [self.projection(multi_scale(self.resnet(part))) for part in images.split(count)]
        return spread(wide(torch.cat(embedded)), rows, mask.shape)


def slices_digest(encoder: JointEncoder) -> str:
    """sha256 (hex) of the weights that slice embeddings depend on: those of the ResNet and the projection."""
    digest = hashlib.sha256()
    for part in (encoder.resnet, encoder.projection):
        for name, value in part.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()
