"""Stage 2, DeepCluster-v2: predict masked slice embeddings to pre-train the transformer over slices.

    torchrun --nproc_per_node=2 mask_deepcluster.py --data_path Training_Data  # every constant is an option
    python mask_deepcluster.py --arch resnet18 --target_shape [32,48,48]  # one process, CPU

Needs weights/resnet_deepcluster2D.pth from ssl_deepcluster2D.py or elsewhere. Result: weights/mask_deepcluster.pth.
"""

from __future__ import annotations

from datasets.batch import Counts
from datasets.embeddings import EmbeddingLoader
from datasets.loaders import VolumeLoader
from models.encoder import JointEncoder
from objectives import MaskedSlices
from objectives.sizes import prototype_counts
from training import slices, train, weights
from utils import config, distributed, options


@options.constants
class Config(options.Masked, options.Training):
    resnet_pretrained = "resnet_deepcluster2D.pth"  # stage 1; frozen here
    checkpoint_name = "mask_deepcluster.pth"
    dump_path = "runs/mask_deepcluster"

    arch = "resnet50"
    d_model = 640
    layers = 4
    attention = "deformable"
    projection_init = "pca"

    target_shape = (64, 128, 128)  # slices, height, width
    policy = "strong"
    mask_ratio = 0.6
    mask_style = "span"  # which interpolation between neighbours cannot solve
    lambda_cluster = 1.0
    cached_views = 0  # new views in every epoch

    epochs = 100
    batch_size = 4  # volumes per process
    base_lr = 0.3  # 3 diverges where clusters are predicted, too
    final_lr = 0.0
    warmup_epochs = 10
    wd = 1e-6


def data(cfg: Config, run: distributed.Run) -> VolumeLoader:
    return VolumeLoader(cfg, run, mask_ratio=cfg.mask_ratio)


def model(cfg: Config, counts: Counts) -> MaskedSlices:
    encoder = JointEncoder(cfg.arch, cfg.d_model, cfg.layers, cfg.dropout, attention=cfg.attention)
    [clusters] = prototype_counts(cfg.nmb_clusters, min(counts.slices, slices.SAMPLE), "nmb_clusters")
    return MaskedSlices(encoder, clusters, cfg.lambda_cluster)


def main(cfg: Config) -> None:
    run = train.start(cfg)
    loader = data(cfg, run)
    learner = model(cfg, loader.counts)
    weights.load_backbone(learner.resnet, cfg)
    slices.fit(learner, loader.dataset, cfg, run)
    if cfg.cached_views:
        loader = EmbeddingLoader(loader, learner, cfg)
    train.fit(learner, loader, cfg, run)


if __name__ == "__main__":
    config.main(main, Config, __doc__)
