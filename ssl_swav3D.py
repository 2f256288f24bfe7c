"""Stage 3, SwAV: cluster slices and images (intra) and whole volumes (inter) together.

    torchrun --nproc_per_node=2 ssl_swav3D.py --batch_size 8  # every constant is an option
    python ssl_swav3D.py --arch resnet18 --target_shape [32,48,48]  # one process, CPU

L = lambda_inter * L_inter + lambda_intra * L_intra, and more (docs/TRAINING.md).
Starts from weights/resnet_swav2D.pth of stage 1 and weights/mask_swav.pth of stage 2 (or none).
Result: weights/swav3D.pth and weights/swav3D_encoder.pth, the ResNet alone in torchvision's layout, to copy into
downstream code.
"""

from __future__ import annotations

from datasets.batch import Counts
from datasets.loaders import VolumeLoader
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from objectives import JointClustering, PositionContrast, SwAV
from training import train, weights
from utils import config, distributed, options


@options.constants
class Config(options.Joint, options.JointSwAV, options.Clustering, options.Training):
    resnet_pretrained = "resnet_swav2D.pth"  # stage 1
    trans_pretrained = "mask_swav.pth"  # stage 2
    checkpoint_name = "swav3D.pth"
    dump_path = "runs/swav3D"

    arch = "resnet50"
    d_model = 640
    layers = 4
    attention = "deformable"
    freeze = False

    target_shape = (64, 128, 128)  # slices, height, width
    policy = "strong"
    intra_slices = 8  # of each volume, enter L_intra
    images_per_step = 8  # 2D images per process, enter L_intra
    lambda_inter = 1.0
    lambda_intra = 1.0
    lambda_position = 1.0
    position_threshold = 0.0  # 0: off
    lambda_recon = 0.0
    lambda_mask = 0.0

    nmb_prototypes = 0  # of volumes; 0: 2 * sqrt(number of volumes)
    nmb_prototypes_intra = 0  # of slices and images
    temperature = 0.1  # of both levels
    epsilon = 0.02
    queue_length = 0  # of volumes: a queue collapses them on small data (docs/DECISIONS.md)
    queue_length_intra = -1  # as many as the prototypes need
    freeze_prototypes_niters = 50

    epochs = 100
    batch_size = 4  # volumes per process
    base_lr = 0.3
    final_lr = 0.0003
    warmup_epochs = 10
    wd = 1e-6


def data(cfg: Config, run: distributed.Run) -> VolumeLoader:
    """Two views of volumes, picked slices of them, and 2D images beside them."""
    return VolumeLoader(
        cfg,
        run,
        mask_ratio=cfg.mask_ratio if cfg.lambda_mask else 0,
        intra_slices=cfg.intra_slices,
        images_per_step=cfg.images_per_step if cfg.clusters_slices else 0,
        min_scale_images=cfg.min_scale_images,
        recon=cfg.lambda_recon > 0,
    )


def model(cfg: Config, counts: Counts) -> JointClustering:
    """f_intra and f_inter (one `JointEncoder`), a projection head for slices, and an objective per level."""
    encoder = JointEncoder(cfg.arch, cfg.d_model, cfg.layers, cfg.dropout, cfg.recompute, cfg.attention)
    head = ProjectionHead(encoder.resnet.num_features, cfg.hidden_mlp, cfg.feat_dim)
    inter = SwAV.of(cfg, cfg.d_model, counts, "inter")
    intra = SwAV.of(cfg, cfg.feat_dim, counts, "intra")
    position = PositionContrast.of(cfg, encoder.resnet.num_features)
    return JointClustering(encoder, head, intra, inter, position, cfg.lambdas, cfg.freeze)


def main(cfg: Config) -> None:
    run = train.start(cfg)
    loader = data(cfg, run)
    learner = model(cfg, loader.counts)
    weights.load_backbone(learner.resnet, cfg)
    weights.load_transformer(learner.encoder, cfg)
    if cfg.lambda_mask:
        weights.load_mask_head(learner, cfg)
    train.fit(learner, loader, cfg, run)


if __name__ == "__main__":
    config.main(main, Config, __doc__)
