"""Spherical k-means: the project's torch back end beside faiss, which works on the CPU in one process.

    python -m benchmarks.kmeans                                # CPU: 100,000 points, 3,000 clusters, 640 dimensions
    python -m benchmarks.kmeans --device cuda                  # GPU: 1,000,000 points, 10 iterations
    torchrun --nproc_per_node=2 -m benchmarks.kmeans           # the points spread over processes, torch alone
    python -m benchmarks.kmeans --points 10000 --clusters 300  # seconds

All start from the same centroids, do the same number of iterations and take turns. Points: unit vectors around random
centres, each as far from its centre as the centre is long. Objective: mean cosine between a point and its nearest
centroid, computed in float32 for all. torch compares points in half precision where the device computes in it;
`torch_float32` does not. On a GPU also the memory that each adds to the points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from benchmarks import common, plain
from objectives.kmeans import assign, fast_products, kmeans_faiss, kmeans_torch
from utils import config as options
from utils import distributed
from utils.distributed import Run
from utils.errors import UserError

MADE_AT_ONCE = 2**14


@dataclass
class Config(common.Options):
    points: NonNegativeInt = 0
    """points of all processes; 0: 100,000 on a CPU, 1,000,000 on a GPU"""
    clusters: PositiveInt = 3000
    """number of centroids"""
    dim: PositiveInt = 640
    """dimensions of a point"""
    centres: PositiveInt = 1000
    """random centres that the points lie around"""
    iterations: NonNegativeInt = 0
    """iterations of each; 0: 3 on a CPU, 10 on a GPU"""
    reference: bool = True
    """whether to measure faiss, too"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    on_gpu = run.device.type == "cuda"
    n, iterations = cfg.points or (10**6 if on_gpu else 10**5), cfg.iterations or (10 if on_gpu else 3)
    if n < cfg.clusters:
        raise UserError(f"points: {n} are fewer than clusters: {cfg.clusters}; raise --points")
    points = make_points(n, cfg.dim, cfg.centres)
    start = points[:: n // cfg.clusters][: cfg.clusters].clone()
    own = points[run.rank :: run.world_size].to(run.device)
    products = fast_products(n * cfg.clusters, run.device)
    work: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: kmeans_torch(own, start.to(own), iterations, products=products),
        "torch_float32": lambda: kmeans_torch(own, start.to(own), iterations),
    }
    if cfg.reference and run.world_size == 1 and plain.installed("faiss"):
        work["faiss"] = lambda: kmeans_faiss(points, start, iterations)
    common.say(
        f"{n:,} points, {cfg.dim} dimensions, {cfg.clusters:,} clusters, {iterations} iterations,\n"
        f"{common.device_name(run.device)}, {run.world_size} process(es), {torch.get_num_threads()} thread(s) each"
    )
    about = {"points": n, "clusters": cfg.clusters, "dim": cfg.dim, "iterations": iterations}
    about |= {"products": str(products or torch.float32).removeprefix("torch.")}
    common.write(about | measure(work, own, cfg, run), run.device)
    distributed.stop()


def measure(work: dict[str, Callable[[], Tensor]], own: Tensor, cfg: Config, run: Run) -> dict[str, Any]:
    """Times, mean cosine and memory of each."""
    found: dict[str, Tensor] = {}
    keeping = {name: lambda name=name: found.update({name: work[name]()}) for name in work}
    pairs = [(name, "torch") for name in work if name != "torch"]
    times = common.compare(keeping, cfg.repeats, run.device, pairs)
    cosine = {name: mean_cosine(own, centroids.to(own)) for name, centroids in found.items()}
    common.say("  mean cosine: " + ", ".join(f"{name} {value:.6f}" for name, value in cosine.items()))
    return {"mean_cosine": cosine, "times": times, "added_gib": common.added_gib(work, run.device)}


def make_points(n: int, dim: int, centres: int) -> Tensor:
    """Unit vectors [n, dim], the same in every process and for every run."""
    generator = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(centres, dim, generator=generator), dim=1)
    points = torch.empty(n, dim)
    for part in points.split(MADE_AT_ONCE):
        part.normal_(generator=generator).div_(dim**0.5)
        part += middle[torch.randint(centres, (len(part),), generator=generator)]
        part /= part.norm(dim=1, keepdim=True)
    return points


def mean_cosine(own: Tensor, centroids: Tensor) -> float:
    """Mean over the points of all processes."""
    cosine = assign(own, centroids)[1].double()
    total = distributed.all_sum(torch.stack([cosine.sum(), cosine.new_tensor(len(cosine))]))
    return float(total[0] / total[1])


if __name__ == "__main__":
    options.main(main, Config, __doc__)
