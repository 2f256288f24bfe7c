"""The networks that the options `arch` name: torchvision's ResNets. Here, as options and models both need them."""

ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
