"""Stage 1, SwAV: cluster 2D images and slices of volumes to pre-train the slice encoder (L_intra alone).

    torchrun --nproc_per_node=2 ssl_swav2D.py --data_path Training_Data  # every constant is an option
    python ssl_swav2D.py --arch resnet18 --size_crops [64,32] --epochs 20  # one process, CPU

Result: weights/resnet_swav2D.pth, a flat torchvision ResNet state dict. Method: Caron et al., NeurIPS 2020.
"""

from __future__ import annotations

from datasets.batch import Counts
from datasets.loaders import ImageLoader
from models.heads import ProjectionHead
from models.resnet import GreyResNet
from objectives import ImageClustering, PositionContrast, SwAV
from training import train, weights
from utils import config, distributed, options


@options.constants
class Config(options.Images, options.SwAV, options.Clustering, options.Training):
    resnet_pretrained = "none"
    checkpoint_name = "resnet_swav2D.pth"
    dump_path = "runs/swav2D"

    arch = "resnet50"
    slices_per_volume = 32  # 0: all
    size_crops = [224, 96]
    nmb_crops = [2, 6]
    policy = "strong"

    nmb_prototypes = 0  # 2 * sqrt(number of images and slices)
    temperature = 0.1
    position_threshold = 0.0  # 0: off
    epsilon = 0.02
    queue_length = -1  # as many as the prototypes need
    freeze_prototypes_niters = 50

    epochs = 100
    batch_size = 64  # images per process
    base_lr = 1.2
    final_lr = 0.0012
    warmup_epochs = 10
    wd = 1e-6


def data(cfg: Config, run: distributed.Run) -> ImageLoader:
    return ImageLoader(cfg, run)


def model(cfg: Config, counts: Counts) -> ImageClustering:
    encoder = GreyResNet(cfg.arch, cfg.recompute)
    head = ProjectionHead(encoder.num_features, cfg.hidden_mlp, cfg.feat_dim)
    intra = SwAV.of(cfg, cfg.feat_dim, counts, "intra")
    return ImageClustering(encoder, head, intra, PositionContrast.of(cfg, encoder.num_features), cfg.lambda_position)


def main(cfg: Config) -> None:
    run = train.start(cfg)
    loader = data(cfg, run)
    learner = model(cfg, loader.counts)
    weights.load_backbone(learner.resnet, cfg)
    train.fit(learner, loader, cfg, run)


if __name__ == "__main__":
    config.main(main, Config, __doc__)
