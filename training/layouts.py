"""Whose weights these are: the names of a ResNet's tensors in other code bases, which network to take, and what it is.

A new layout is a row of LAYOUTS, a new kind of pair (student and teacher, query and key) a row of ROLES.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from utils.tensors import Stored

Network = dict[str, Stored]  # torchvision's name -> tensor
STAGES = range(1, 5)
FIRST = "layer1.0.conv1.weight"


class Layout(NamedTuple):
    """first: how `FIRST` is called; names: patterns of all that differs from torchvision's names -> those."""

    first: str
    names: dict[str, str]


LAYOUTS = {
    # also SwAV, DeepCluster-v2, VISSL, DINO, MoCo, BYOL, VICReg, Barlow Twins, solo-learn, timm, MMPretrain, MONAI
    "torchvision": Layout(FIRST, {}),
    # torch.nn.Sequential(*resnet.children()): RadImageNet, lightly, fastai
    "numbered": Layout(
        "4.0.conv1.weight",
        {r"^0\.": "conv1.", r"^1\.": "bn1."} | {rf"^{stage + 3}\.": f"layer{stage}." for stage in STAGES},
    ),
    # the same with the stem in a Sequential of its own
    "stem in layer0": Layout("layer1.0.conv1.weight", {r"^layer0\.0\.": "conv1.", r"^layer0\.1\.": "bn1."}),
    "Hugging Face": Layout(
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
        {r"^embedder\.embedder\.convolution\.": "conv1.", r"^embedder\.embedder\.normalization\.": "bn1."}
        | {rf"^encoder\.stages\.{stage - 1}\.layers\.": f"layer{stage}." for stage in STAGES}
        | {rf"\.layer\.{k}\.convolution\.": f".conv{k + 1}." for k in range(3)}
        | {rf"\.layer\.{k}\.normalization\.": f".bn{k + 1}." for k in range(3)}
        | {r"\.shortcut\.convolution\.": ".downsample.0.", r"\.shortcut\.normalization\.": ".downsample.1."},
    ),
}

# Which of several networks is taken: that of the lowest number, by the first row that its name matches; others have 0.
ROLES = (
    ("ema_state_dict", 1),  # MMEngine swaps: its state_dict is the average
    ("ema|averaged|swa", -1),  # timm and torchvision publish the average
    ("student", 2),  # DINO is evaluated by its teacher; where a network has neither name, by that
    ("teacher", 1),
    ("momentum|target|encoder_k|model_k|key|k", 3),  # MoCo is evaluated by its query, BYOL by its online network
)

OTHERS = {  # part of a name -> the network that has it
    "relative_position_bias_table": "a Swin transformer",
    "patch_embed": "a vision transformer (ViT)",
    "class_token": "a vision transformer (torchvision's)",
    "cls_token": "a vision transformer (ViT)",
    "attnpool": "a CLIP model",
    "downsample_layers.0": "a ConvNeXt",
    "stages.0.blocks.0.conv_dw": "a ConvNeXt (timm's)",
    "denseblock1": "a DenseNet",
    "conv_stem": "an EfficientNet or MobileNet",
    "features.0.0.weight": "an EfficientNet, MobileNet or ConvNeXt (torchvision's)",
    "Mixed_5b": "an Inception network",
    "stem.conv1.norm": "a detectron2 ResNet, which may take BGR images and other strides",
    "res2_0_branch2a": "a Caffe2 ResNet, which takes BGR images",
    "block1.unit01": "a BiT (ResNet-v2)",
    "stages.0.blocks.0.norm1": "a ResNet-v2 or transformer of timm",
    "trunk_output": "a RegNet",
    "down_blocks": "a diffusion model or U-Net",
    "features.0.weight": "a VGG or AlexNet",
    "stages.0.0.convs": "an nnU-Net",
    "encoder.layer.0.attention": "a transformer of texts",
}


def networks(state: Mapping[str, Stored]) -> dict[str, Network]:
    """Every ResNet among tensors of any names, in torchvision's: prefix of the names -> network."""
    found = {}
    for layout in LAYOUTS.values():
        for name in state:
            prefix = name.removesuffix(layout.first)
            if (prefix != name or name == layout.first) and (not prefix or prefix.endswith(".")):
                below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                renamed = {_renamed(key, layout): value for key, value in below.items()}
                if prefix not in found or "conv1.weight" not in found[prefix]:
                    found[prefix] = renamed
    return found


def _renamed(name: str, layout: Layout) -> str:
    for pattern, ours in layout.names.items():
        name = re.sub(pattern, ours, name)
    return name


def choose(found: Mapping[str, Network], arch: str) -> str:
    """The prefix of the network that is taken: one of this architecture, and of these the one its authors evaluate."""
    return min(found, key=lambda prefix: (kind(found[prefix]) != arch, role(prefix), len(prefix), prefix))


def role(prefix: str) -> int:
    """See ROLES."""
    matches = (value for words, value in ROLES if re.search(rf"(?<![a-z])({words})(?![a-z])", prefix.lower()))
    return next(matches, 0)


def kind(network: Network) -> str:
    """`resnet50` and so on, or in words what else a network with ResNet's names is."""
    shapes = {name: value.shape for name, value in network.items()}
    stem, grouped = shapes.get("conv1.weight", ()), shapes.get("layer1.0.conv2.weight", ())
    blocks = {name: shape for name, shape in shapes.items() if name.startswith("layer")}
    if any(len(shape) == 5 for shape in (stem, *blocks.values())):
        return "a ResNet of 3D convolutions"
    if "conv1.0.weight" in shapes or "stem.0.weight" in shapes or "attnpool.c_proj.weight" in shapes:
        return "a ResNet with a stem of several convolutions (ResNet-C, ResNet-D, CLIP)"
    if any(".se." in name or ".fc1." in name for name in blocks):
        return "a ResNet with attention in its blocks (SE-ResNet, ResNeSt)"
    if len(stem) != 4 or len(grouped) != 4:
        return "a ResNet without its first convolution"
    if stem[2:] != (7, 7):
        return f"a ResNet with a stem of {stem[2]} x {stem[3]} pixels (for tiny images)"
    if stem[0] != 64:
        return f"a ResNet with {stem[0]} channels in its stem instead of 64"
    counts = tuple(len({name.split(".")[1] for name in blocks if name.startswith(f"layer{s}.")}) for s in STAGES)
    bottleneck = "layer1.0.conv3.weight" in shapes
    if grouped[0] != grouped[1]:
        return f"a ResNeXt ({grouped[0] // max(grouped[1], 1)} groups)"
    depths = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
    if counts not in depths or bottleneck != (depths[counts] >= 50):
        return f"a ResNet of {' + '.join(map(str, counts))} blocks"
    wide = {64: "resnet{}", 128: "wide_resnet{}_2"}.get(grouped[0] if bottleneck else 64, "a wide ResNet-{}")
    return wide.format(depths[counts])


def other(names: Iterable[str]) -> str:
    """What tensors of these names belong to, where no ResNet is among them."""
    known = (what for part, what in OTHERS.items() if any(part in name for name in names))
    return next(known, "no ResNet that is known here")
