"""What is learned: clustering at two levels (SwAV, DeepCluster-v2) and masked slice-embedding prediction."""

from objectives.deepcluster import DeepClusterV2
from objectives.learners import ImageClustering, JointClustering, MaskedSlices
from objectives.position import PositionContrast
from objectives.swav import SwAV

__all__ = ["DeepClusterV2", "ImageClustering", "JointClustering", "MaskedSlices", "PositionContrast", "SwAV"]
