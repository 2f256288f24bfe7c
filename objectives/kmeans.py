"""Spherical k-means over points that are spread over the processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import all_sum, broadcast, gather_objects, rank, world_size
from utils.errors import UserError

SCORES_AT_ONCE = 2**24  # cosines held at a time: 64 MiB in float32


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """points [n, d], centroids [K, d] -> index of the nearest centroid [n] int64 and its cosine [n].

    The first centroid wins a tie. Works in blocks, so memory does not grow with n times K.
    """
    block = max(1, SCORES_AT_ONCE // centroids.shape[0])
    best = [(part @ centroids.T).max(dim=1) for part in points.split(block)] if len(points) else []
    if not best:
        return points.new_zeros(0, dtype=torch.long), points.new_zeros(0)
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def _worst_points(points: Tensor, similarity: Tensor, wanted: int) -> Tensor:
    """The `wanted` points of all processes that their centroid represents worst: [wanted, d], equal everywhere."""
    own = similarity.argsort()[:wanted]
    offers = gather_objects((similarity[own].cpu(), points[own].cpu()))
    order = torch.cat([s for s, _ in offers]).argsort(stable=True)[:wanted]
    return torch.cat([p for _, p in offers])[order].to(points)


@torch.no_grad()
def kmeans_torch(points: Tensor, centroids: Tensor, iterations: int = 10, empty: str = "reseed") -> Tensor:
    """Lloyd's iterations on the sphere: points [n, d] of this process, start [K, d] -> centroids [K, d].

    Each process sums its own points; the sums are all-reduced, so every process gets the same centroids.
    empty: `reseed` moves an empty cluster to the point that is represented worst, `keep` leaves its centroid, as the
    published algorithm does.  Source: Caron et al. 2020, DeepCluster-v2.
    """
    centroids = F.normalize(centroids, dim=1)
    K = centroids.shape[0]
    for _ in range(iterations):
        assignment, similarity = assign(points, centroids)
        sums = all_sum(torch.zeros_like(centroids).index_add_(0, assignment, points))
        counts = all_sum(torch.bincount(assignment, minlength=K).to(points.dtype))
        filled = counts > 0
        centroids = torch.where(filled.unsqueeze(1), sums / counts.clamp(min=1).unsqueeze(1), centroids)
        if empty == "reseed" and not bool(filled.all()):
            missing = (~filled).nonzero().squeeze(1)
            worst = _worst_points(points, similarity, len(missing))
            centroids[missing[: len(worst)]] = worst
        centroids = F.normalize(centroids, dim=1)
    return centroids


@torch.no_grad()
def kmeans_faiss(points: Tensor, centroids: Tensor, iterations: int = 10, seed: int = 0) -> Tensor:
    """The same by faiss on rank 0's CPU: points [n, d] of this process are gathered there, so they must fit."""
    import faiss  # optional: the torch back end needs nothing but torch

    parts = gather_objects(points.cpu())
    result = centroids.clone()
    if rank() == 0:
        joint = torch.cat(parts).float().contiguous().numpy()
        K, d = centroids.shape
        kmeans = faiss.Kmeans(
            d,
            K,
            niter=iterations,
            spherical=True,
            seed=seed % 2**31,
            min_points_per_centroid=1,
            max_points_per_centroid=len(joint) // K + 1,
        )
        kmeans.train(joint, init_centroids=F.normalize(centroids, dim=1).cpu().float().numpy())
        result = torch.from_numpy(kmeans.centroids).to(centroids)
    return F.normalize(broadcast(result), dim=1)


def choose_backend(wanted: str, joint_bytes: int, limit_bytes: int = 4 * 2**30) -> str:
    """`auto` is faiss where it can be imported and all points fit one process (4 GiB), else torch."""
    if wanted == "torch":
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError:
        if wanted == "faiss":
            raise UserError("kmeans_backend: faiss is not installed; pip install faiss-cpu, or use torch") from None
        return "torch"
    if wanted == "faiss":
        return "faiss"
    return "faiss" if joint_bytes <= limit_bytes else "torch"


def gather_rows(points: Tensor, rows: Tensor) -> Tensor:
    """Rows of a matrix spread over the processes: global row g is row g // world of process g % world.

    points [n, d] of this process, rows [K] global -> [K, d] on every process.
    """
    own = rows % world_size() == rank()
    out = points.new_zeros(len(rows), points.shape[1])
    out[own] = points[rows[own] // world_size()]
    return all_sum(out)
