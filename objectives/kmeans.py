"""Spherical k-means over points that are spread over the processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import all_gather, all_sum, broadcast, gather_objects, obey_signals, rank, world_size
from utils.precision import Precision

SCORES_AT_ONCE = 2**23  # cosines held at a time: 32 MiB in float32
WORTH_HALF = 2**24  # cosines per iteration from which products in half precision are worth their rounding
SUMS_AT_ONCE = 2**12  # partial sums of points: enough to keep a GPU busy when there are few clusters


def assign(points: Tensor, centroids: Tensor, products: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """points [n, d], centroids [K, d] -> index of the nearest centroid [n] int64 and its cosine [n].

    The first centroid wins a tie. products: format that the points are compared in, None for their own; the cosine is
    always computed in their own. Memory beside the result: 12 * SCORES_AT_ONCE bytes at most, whatever n is.
    """
    n, products = len(points), products or points.dtype
    nearest, cosine = points.new_zeros(n, dtype=torch.long), points.new_zeros(n)
    block = max(1, SCORES_AT_ONCE // max(centroids.shape))
    scores = points.new_empty(min(n, block), len(centroids), dtype=products)
    columns = centroids.to(products).T
    for start in range(0, n, block):
        part, rows = points[start : start + block], slice(start, start + block)
        found = torch.mm(part.to(products), columns, out=scores[: len(part)]).max(dim=1)
        nearest[rows] = found.indices
        cosine[rows] = found.values if products == points.dtype else (part * centroids[found.indices]).sum(dim=1)
    return nearest, cosine


def fast_products(cosines: int, device: torch.device) -> torch.dtype | None:
    """Format in which to compare points in iterations of that many cosines, over all processes.

    Half precision where the device computes in it and there is enough to do: about twice as fast on CPUs, and the mean
    cosine after ten iterations is the same to 0.1 % (tests/test_objectives.py).
    """
    return Precision("auto", device).dtype if cosines >= WORTH_HALF else None


def _sum_clusters(points: Tensor, assignment: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """points [n, d], assignment [n] -> sum [K, d] and number [K] of each cluster's points.

    The points are sorted and each sum runs in their order, so it has the same bits every time, on a GPU as well, where
    `index_add_` has not. The sum over a large cluster is split into sums that run side by side.
    """
    n, parts = len(points), -(-SUMS_AT_ONCE // K)
    keys = assignment * parts + torch.arange(n, device=points.device) * parts // max(n, 1)
    keys, order = keys.sort(stable=True)
    first = torch.searchsorted(keys, torch.arange(K * parts + 1, device=points.device))
    sums = F.embedding_bag(order, points, first, mode="sum", include_last_offset=True)
    return sums.view(K, parts, -1).sum(dim=1), first[::parts].diff().to(points.dtype)


def _worst_points(points: Tensor, cosine: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The points of all processes that their centroid represents worst, equal everywhere.

    -> [wanted, d], worst first, and whether there is such a point [wanted] bool.
    """
    order = cosine.argsort(stable=True)[:wanted]
    own, offers = points.new_zeros(wanted, points.shape[1]), cosine.new_full((wanted,), torch.inf)
    own[: len(order)], offers[: len(order)] = points[order], cosine[order]
    values, places = all_gather(offers).sort(stable=True)
    values, places = values[:wanted], places[:wanted]
    mine = (places // wanted == rank()).unsqueeze(1)
    return all_sum(torch.where(mine, own[places % wanted], 0)), values < torch.inf


@torch.no_grad()
def kmeans_torch(
    points: Tensor,
    centroids: Tensor,
    iterations: int = 10,
    empty: str = "reseed",
    products: torch.dtype | None = None,
) -> Tensor:
    """Lloyd's iterations on the sphere: points [n, d] of this process, start [K, d] -> centroids [K, d].

    Each process sums its own points; the sums are all-reduced, so every process gets the same centroids.
    empty: `reseed` moves an empty cluster to the point that is represented worst, `keep` leaves its centroid, as the
    published algorithm does.  products: see `assign`.  Source: Caron et al. 2020, DeepCluster-v2.

    Memory beside points and centroids, in bytes, in float32: 12 * SCORES_AT_ONCE + 60 * n + 40 * d * max(K, 4096). The
    host never waits for the device, but for that several processes obey signals in each iteration.
    """
    centroids = F.normalize(centroids, dim=1)
    K = len(centroids)
    for _ in range(iterations):
        obey_signals()
        assignment, cosine = assign(points, centroids, products)
        sums, counts = (all_sum(t) for t in _sum_clusters(points, assignment, K))
        missing = counts == 0
        means = torch.where(missing.unsqueeze(1), centroids, sums)  # the normalisation divides by the count, too
        if empty == "reseed":
            worst, there = _worst_points(points, cosine, K)
            turn = (missing.cumsum(0) - 1).clamp(min=0)  # the first empty cluster gets the worst point, and so on
            means = torch.where((missing & there[turn]).unsqueeze(1), worst[turn], means)
        centroids = F.normalize(means, dim=1)
    return centroids


@torch.no_grad()
def kmeans_faiss(points: Tensor, centroids: Tensor, iterations: int = 10, seed: int = 0) -> Tensor:
    """The same by faiss on rank 0: points [n, d] of this process are gathered in its memory, so they must fit.

    On the GPU where the points are on one and faiss is a build that uses it, else on the CPU.
    """
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
            gpu=int(points.is_cuda and faiss.get_num_gpus() > 0),  # one: the others train
        )
        kmeans.train(joint, init_centroids=F.normalize(centroids, dim=1).cpu().float().numpy())
        result = torch.from_numpy(kmeans.centroids).to(centroids)
    return F.normalize(broadcast(result), dim=1)


def gather_rows(points: Tensor, rows: Tensor) -> Tensor:
    """Rows of a matrix spread over the processes: global row g is row g // world of process g % world.

    points [n, d] of this process, rows [K] global -> [K, d] on every process.
    """
    own = rows % world_size() == rank()
    out = points.new_zeros(len(rows), points.shape[1])
    out[own] = points[rows[own] // world_size()]
    return all_sum(out)
