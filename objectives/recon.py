"""L_recon: restore hidden parts of slices from what is left of them and from their neighbours."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, statistics_stay, wide
from models.unet import UNetDecoder
from utils.distributed import all_sum, world_size
from utils.profile import span


def recon_loss(encoder: JointEncoder, unet: UNetDecoder, batch: Batch, statistics_move: bool) -> Tensor:
    """Mean squared error over the hidden pixels of the global batch, in units of the stem's normalisation.

    The first view of every volume, its hidden blocks set to the mean grey: encoder, f_inter in every cell of the
    bottleneck, decoder. Masked image modelling as He et al. 2022 do it, for a convolutional encoder and decoder (which
    therefore see what is hidden as grey), with the volume as context.
    statistics_move: whether BatchNorm's running statistics take in pictures with holes; not where other losses train
    the encoder on whole ones.
    """
    pixels = batch.views[0].flatten(0, 1)[batch.rows].unsqueeze(1)  # [n, 1, H, W]
    blocks = batch.hidden.flatten(0, 1)[batch.rows].unsqueeze(1)
    hidden = F.interpolate(blocks.to(pixels.dtype), pixels.shape[-2:], mode="nearest") > 0
    with span("f_intra"), nullcontext() if statistics_move else statistics_stay(encoder.resnet):
        stages = encoder.resnet(torch.where(hidden, GREY_MEAN, pixels), stem=True)
    with span("f_inter"):
        context = encoder.cells(stages[1:], batch.rows, batch.mask)
    with span("decoder"):
        restored = unet(stages, context)
        error = (wide(restored) - (pixels - GREY_MEAN) / GREY_STD).square()
    count = all_sum(hidden.sum().float()).clamp(min=1)
    return (error * hidden).sum() * world_size() / count
