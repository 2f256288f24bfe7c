"""The network of segmentation: segmentation_models_pytorch's U-Net on our encoder."""

from __future__ import annotations

from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, multi_scale

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # those that the library has


class SliceUNet(nn.Module):
    """U-Net on slices whose encoder is our ResNet, optionally with f_inter at the bottleneck.

    forward: images [N, C, H, W] in 0..1, N = sum(lengths) slices of len(lengths) stretches of a volume each ->
    logits [N, classes, H, W].
    C channels: the grey stem's weights / C each, so C times the same image gives the features of that image.
    With f_inter, slice embeddings are made as in pre-training from the encoder's stages; what the transformer returns
    for a slice is mapped to the bottleneck's channels and added there, everywhere in the slice. This map starts at 0:
    training starts from the plain U-Net.
    """

    def __init__(
        self,
        encoder: GreyResNet,
        arch: str,
        channels: int,
        classes: int,
        inter: JointEncoder | None = None,
        freeze: bool = False,
        decoder_norm: str = "batch",
    ) -> None:
        super().__init__()
        self.unet = smp.Unet(
            arch,
            encoder_weights=None,
            in_channels=channels,
            classes=classes,
            decoder_use_norm={"type": f"{decoder_norm}norm"} | ({"affine": True} if decoder_norm == "instance" else {}),
        )
        state = encoder.torchvision_state()
        state["conv1.weight"] = (encoder.conv1.weight.detach() / channels).repeat(1, channels, 1, 1)
        self.unet.encoder.load_state_dict(state)
        loaded: list[nn.Module] = [self.unet.encoder]
        self.transformer = None
        if inter is not None:
            self.projection, self.transformer = inter.projection, inter.transformer
            loaded += [self.projection, self.transformer]
            self.to_bottleneck = nn.Linear(self.projection.out_features, encoder.num_features)
            nn.init.zeros_(self.to_bottleneck.weight)
            nn.init.zeros_(self.to_bottleneck.bias)
        self.loaded, self.frozen = loaded, loaded if freeze else []
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> SliceUNet:
        super().train(mode)
        for module in self.frozen:
            module.eval()  # BatchNorm keeps its statistics
        return self

    def forward(self, images: Tensor, lengths: Sequence[int]) -> Tensor:
        features = self.unet.encoder((images - GREY_MEAN) / GREY_STD)  # the images, the stem, four stages
        if self.transformer is not None:
            embedded = self.projection(multi_scale(features[2:]))  # [N, d]
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            mask = mask.to(embedded.device)
            tokens = embedded.new_zeros(*mask.shape, embedded.shape[1])
            tokens[mask] = embedded
            context = self.to_bottleneck(self.transformer(tokens, mask)[mask])  # [N, channels of the last stage]
            features[-1] = features[-1] + context[:, :, None, None]
        return self.unet.segmentation_head(self.unet.decoder(features))
