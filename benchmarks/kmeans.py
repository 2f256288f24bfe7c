"""Spherical k-means: the project's torch back end, beside faiss and a plain single-process one with sparse matrices.

    python -m benchmarks.kmeans                                # CPU: 100,000 points, 3,000 clusters, 640 dimensions
    python -m benchmarks.kmeans --device cuda                  # GPU: 1,000,000 points, 10 iterations
    torchrun --nproc_per_node=2 -m benchmarks.kmeans           # the points spread over processes, torch alone
    python -m benchmarks.kmeans --points 10000 --clusters 300  # seconds

All start from the same centroids, do the same number of iterations and take turns; where torch uses a GPU, the others
work on the CPU, once. Points: unit vectors around random centres, each as far from its centre as the centre is long.
Objective: mean cosine between a point and its nearest centroid, computed in float32 for all. torch compares points in
half precision where the device computes in it; `torch_float32` does not. Memory: what the first run of torch adds to
the points themselves.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from benchmarks import timing
from objectives.kmeans import assign, fast_products, kmeans_faiss, kmeans_torch
from utils import config as options
from utils import distributed

LINUX_PEAK = Path("/proc/self/clear_refs")
MADE_AT_ONCE = 2**14
USUAL = {"cpu": {"points": 10**5, "iterations": 3}, "cuda": {"points": 10**6, "iterations": 10}}


@dataclass
class Config:
    device: str = "auto"
    """auto, cpu or cuda"""
    points: NonNegativeInt = 0
    """points of all processes; 0: 100,000 on a CPU, 1,000,000 on a GPU"""
    clusters: PositiveInt = 3000
    """centroids"""
    dim: PositiveInt = 640
    """dimensions"""
    centres: PositiveInt = 1000
    """random centres that the points lie around"""
    iterations: NonNegativeInt = 0
    """of each; 0: 3 on a CPU, 10 on a GPU"""
    repeats: PositiveInt = 3
    """measurements of each, but of faiss and sparse one only where torch uses a GPU"""
    threads: NonNegativeInt = 0
    """CPU threads of each process, for all three; 0: as torch chooses"""
    references: bool = True
    """whether to measure faiss (where it is installed) and sparse matrices, too"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    on_gpu = run.device.type == "cuda"
    usual = USUAL[run.device.type]
    n, iterations = cfg.points or usual["points"], cfg.iterations or usual["iterations"]
    if n < cfg.clusters:
        raise SystemExit(f"--points {n} is less than --clusters {cfg.clusters}")
    set_threads(cfg.threads or torch.get_num_threads())
    points = make_points(n, cfg.dim, cfg.centres)
    start = points[:: n // cfg.clusters][: cfg.clusters].clone()
    own, start_here = points[run.rank :: run.world_size].to(run.device), start.to(run.device)
    products = fast_products(n * cfg.clusters, run.device)

    work: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: kmeans_torch(own, start_here, iterations, products=products),
        "torch_float32": lambda: kmeans_torch(own, start_here, iterations),
    }
    others: dict[str, Callable[[], Tensor]] = {}
    if cfg.references and run.world_size == 1:
        if importlib.util.find_spec("faiss") is not None:
            others["faiss"] = lambda: kmeans_faiss(points, start, iterations)
        else:
            print("faiss is left out: pip install faiss-cpu")
        if importlib.util.find_spec("scipy") is not None:
            others["sparse"] = lambda: kmeans_sparse(points, start, iterations)
        else:
            print("sparse matrices are left out: pip install scipy")

    found, memory = {}, Memory(run.device)
    found["torch"] = work["torch"]()
    extra_bytes = memory.added()
    again = work["torch"]()
    same_bits = torch.equal(found["torch"], again)
    if on_gpu:
        times = timing.measure(keep(work, found), cfg.repeats, warmup=1, device=run.device)
        times |= timing.measure(keep(others, found), repeats=1, warmup=0)
    else:
        times = timing.measure(keep(work | others, found), cfg.repeats, warmup=0)

    objective = {name: mean_cosine(own, centroids.to(own)) for name, centroids in found.items()}
    results: dict[str, Any] = {
        "points": n,
        "clusters": cfg.clusters,
        "dim": cfg.dim,
        "iterations": iterations,
        "processes": run.world_size,
        "products": str(products or torch.float32).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("faiss-cpu",) if "faiss" in others},
        "memory_beside_points_mib": extra_bytes / 2**20,
        "same_bits_twice": same_bits,
        "seconds": {name: t.record() for name, t in times.items()},
        "mean_cosine": objective,
        "over_torch": {name: times[name].median / times["torch"].median for name in times},
        "objective_over_torch": {name: objective[name] / objective["torch"] for name in objective},
    }
    if run.is_main:
        report(results, run.device)
        print(f"\nwritten to {timing.write(name_of(results, run.device), results, run.device)}")
    distributed.stop()


def name_of(results: dict[str, Any], device: torch.device) -> str:
    """Of the results' file: other sizes or several processes do not replace the usual ones."""
    name, usual = "kmeans", USUAL[device.type] | {"clusters": Config.clusters, "dim": Config.dim}
    if any(results[what] != value for what, value in usual.items()):
        name += f"_{results['points']}x{results['clusters']}"
    return name if results["processes"] == 1 else f"{name}_{results['processes']}_processes"


def report(results: dict[str, Any], device: torch.device) -> None:
    print(
        f"\n{results['points']:,} points, {results['dim']} dimensions, {results['clusters']:,} clusters, "
        f"{results['iterations']} iterations,\n{timing.device_name(device)}, {results['processes']} process(es), "
        f"{torch.get_num_threads()} CPU thread(s) each\n"
    )
    print(f"{'':14} {'seconds':>9} {'IQR':>7} {'GFLOP/s':>8} {'over torch':>10} {'mean cosine':>12}")
    flop = 2e-9 * results["points"] * results["clusters"] * results["dim"] * results["iterations"]
    for name, record in results["seconds"].items():
        print(
            f"{name:14} {record['median_s']:9.3f} {record['iqr_s']:7.3f} {flop / record['median_s']:8,.0f} "
            f"{results['over_torch'][name]:10.2f} {results['mean_cosine'][name]:12.6f}"
        )
    print(
        f"\ntorch: products in {results['products']}, {results['memory_beside_points_mib']:.0f} MiB beside the points, "
        f"{'the same bits' if results['same_bits_twice'] else 'OTHER BITS'} when run twice"
    )


def keep(work: dict[str, Callable[[], Tensor]], found: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """The same work; what it returns is put into `found`."""
    return {
        name: lambda name=name, function=function: found.update({name: function()}) for name, function in work.items()
    }


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


def kmeans_sparse(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """The plain way in NumPy: nearest centroids block by block, sums by a sparse [K, n] matrix of ones."""
    import scipy.sparse

    x, centres = points.numpy(), F.normalize(centroids, dim=1).numpy()
    n, K = len(x), len(centres)
    for _ in range(iterations):
        nearest = np.concatenate([(x[i : i + 4096] @ centres.T).argmax(axis=1) for i in range(0, n, 4096)])
        members = scipy.sparse.csr_matrix((np.ones(n, x.dtype), (nearest, np.arange(n))), shape=(K, n))
        sums, filled = members @ x, np.bincount(nearest, minlength=K) > 0
        centres = np.where(filled[:, None], sums, centres)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return torch.from_numpy(centres)


def mean_cosine(own: Tensor, centroids: Tensor) -> float:
    """Over the points of all processes."""
    cosine = assign(own, centroids)[1].double()
    total = distributed.all_sum(torch.stack([cosine.sum(), cosine.new_tensor(len(cosine))]))
    return float(total[0] / total[1])


def set_threads(threads: int) -> None:
    """For torch, faiss and, where its library can be told while it runs, NumPy."""
    torch.set_num_threads(threads)
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(threads)
    if importlib.util.find_spec("threadpoolctl") is not None:
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads, user_api="blas")


class Memory:
    """What is allocated from now on, at its peak: on a GPU by torch, on Linux what becomes resident of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif LINUX_PEAK.exists():
            with suppress(AttributeError):  # other C libraries keep less
                ctypes.CDLL(None).malloc_trim(0)  # else freed blocks would be used again unseen
            LINUX_PEAK.write_text("5")  # the peak is what is resident now
        self.before = self._peak()

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return most_resident() if LINUX_PEAK.exists() else math.nan

    def added(self) -> float:
        """Bytes; nan where the system does not tell."""
        return self._peak() - self.before


def most_resident() -> float:
    """Bytes, as Linux has counted them since its peak was last set."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])


if __name__ == "__main__":
    options.main(main, Config, __doc__)
