"""What pre-training will cost, before it starts: hours, memory, disk, network traffic of the three stages.

    python -m benchmarks.constants                               # once: what this machine does per second, minutes
    python estimate.py --volumes 1000 --volume_shape [512,512,200] --processes 2
    python estimate.py --method deepcluster --images 50000 --stage3 "{epochs: 50, batch_size: 8}"
    python estimate.py --constants benchmarks/assumed/h200.json  # a machine that was not measured: figures are assumed

Work is counted (floating-point operations, bytes, samples) from the model and the options of the entry scripts, and
divided by what the machine does per second. docs/SCALING.md has the method, its check against real runs, and limits.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datasets.embeddings import SEAL_BYTES
from datasets.loaders import canvas_size
from datasets.render import content_size
from datasets.store import NPY_HEADER
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from models.resnet import GreyResNet, multi_scale, pooled
from models.transformer import SliceTransformer
from objectives import DeepClusterV2, ImageClustering, JointClustering, MaskedSlices, SwAV
from objectives.learners import Learner
from objectives.sizes import prototype_counts, queue_size
from utils import config as options
from utils.errors import UserError

ROOT = Path(__file__).parent
VIEWS = 2
FIT_SLICES = 4096  # that stage 2's projection is fitted to at most


@dataclass
class Config:
    volumes: NonNegativeInt = 1000
    """number of volumes"""
    volume_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (512, 512, 200)
    """height, width and slices of a typical one, as its file holds it"""
    images: NonNegativeInt = 0
    """number of 2D images"""
    image_shape: tuple[PositiveInt, PositiveInt] = (512, 512)
    """height and width of a typical one"""
    processes: PositiveInt = 1
    """training processes, one per GPU"""
    method: Literal["swav", "deepcluster"] = "swav"
    """SwAV or DeepCluster-v2"""
    stage1: dict = field(default_factory=dict)
    """options of ssl_<method>2D.py that are not its defaults, e.g. "{epochs: 50, batch_size: 128}" """
    stage2: dict = field(default_factory=dict)
    """options of mask_<method>.py that are not its defaults"""
    stage3: dict = field(default_factory=dict)
    """options of ssl_<method>3D.py that are not its defaults"""
    constants: str = "benchmarks/results/constants_cpu.json"
    """what the machine does per second, from python -m benchmarks.constants; or assumptions (benchmarks/assumed)"""


@dataclass(frozen=True)
class Data:
    """A collection of equal volumes [H, W, slices] and equal images [H, W]."""

    volumes: int
    volume_shape: tuple[int, int, int]
    images: int = 0
    image_shape: tuple[int, int] = (512, 512)

    @property
    def slices(self) -> int:
        return self.volume_shape[2]

    def stage1_samples(self, per_volume: int) -> int:
        return self.images + self.volumes * min(per_volume or self.slices, self.slices)


@dataclass
class Cost:
    """Of one stage, on `processes` processes. Bytes are those of one process where nothing else is said."""

    seconds: dict[str, float]  # by what they are spent on
    steps: int  # of an epoch
    memory: float  # peak of a process
    cache: float  # bytes on disk, all data
    files: int  # in the caches
    checkpoint: float  # one file
    disk: float  # all checkpoints of the run
    saving: int  # host memory beside, while a checkpoint is saved: the whole bank on the CPU of every process
    gradients: int  # bytes all-reduced per step
    traffic: float  # bytes that a process sends in the whole run

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


# --------------------------------------------------------------------------------------------------------- the machine


class Machine:
    """Measured (or assumed) constants. Rates between two measured sizes are interpolated; beyond them, the nearest."""

    def __init__(self, constants: dict[str, Any], where: str = "", assumed: tuple[str, ...] = ()) -> None:
        self.constants, self.where, self.assumed = constants, where, assumed

    @classmethod
    def read(cls, path: str | Path) -> Machine:
        """Raises UserError where the file is missing or is no file of constants."""
        path = Path(path)
        try:
            content = json.loads((path if path.is_absolute() or path.exists() else ROOT / path).read_text())
            constants, where = content["results"], content["environment"]
            where = where.get("cpu") if where["device"] == "cpu" else where["device"]
            return cls(constants, where, tuple(content.get("assumed", ())))
        except FileNotFoundError:
            raise UserError(
                f"constants: {path} does not exist; run python -m benchmarks.constants, some minutes, to measure "
                "this machine"
            ) from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"constants: {path} is no file of python -m benchmarks.constants ({error!r})") from None

    def __getitem__(self, name: str) -> float:
        return self.constants[name]

    def rate(self, name: str, size: float, arch: str | None = None) -> float:
        """Operations per second at a size (side of an image, d_model): linear in its logarithm."""
        table = self.constants[name]
        if arch is not None:
            if arch == "resnet34":
                arch = "resnet18"  # of the same blocks
            table = table.get(arch) or list(table.values())[-1]  # others are taken to be like the deepest measured
        return between(table, size)

    def kmeans_rate(self, K: int, d: int) -> float:
        """Products of points and centroids per second; older files have one table by K for every d."""
        table = self.constants["kmeans"]
        if any(isinstance(of_d, dict) for of_d in table.values()):
            table = {dim: between(of_d, K) for dim, of_d in table.items()}
            return between(table, d)
        return between(table, K)


def between(table: dict[str, float], size: float) -> float:
    """Linear in the logarithm of the size; beyond the measured ones, the nearest."""
    known = sorted((float(k), v) for k, v in table.items())
    for (a, low), (b, high) in pairwise(known):
        if a <= size <= b:
            return low + (high - low) * math.log(size / a) / math.log(b / a)
    return known[0][1] if size < known[0][0] else known[-1][1]


# ------------------------------------------------------------------------------------------------------------ counting


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations (a multiplication and an addition are two) of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@lru_cache
def resnet_flops(arch: str, height: int, width: int, train: bool) -> int:
    """Of one grey slice: forward, or forward and backward. Counted on shapes alone."""
    with torch.device("meta"):
        resnet, images = GreyResNet(arch), torch.empty(2, 1, height, width)  # BatchNorm wants more than one value

    def run() -> None:
        with torch.set_grad_enabled(train):
            total = pooled(resnet(images)).sum()
        if train:
            total.backward()

    return flops(run) // 2


@lru_cache
def resnet_activations(arch: str, height: int, width: int, recompute: bool = False) -> int:
    """Bytes in float32 that the network keeps of one slice for its backward pass, every tensor counted once."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.device("meta"):
        resnet, images = GreyResNet(arch), torch.empty(2, 1, height, width)
    own = {p.untyped_storage()._cdata for p in [*resnet.parameters(), *resnet.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        stages = resnet(images)
        multi_scale(stages)
    every = sum(x.untyped_storage().nbytes() for where, x in kept.items() if where not in own) // 2
    if not recompute:
        return every
    # Kept: the input of each block; and, one after the other, all that the largest block needs.
    inputs = largest = 0
    x = torch.empty(2, resnet.conv1.out_channels, -(-height // 4), -(-width // 4), device="meta")
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        for block in layer:
            inside: dict[int, int] = {}

            def note(t: Tensor, inside: dict[int, int] = inside) -> Tensor:
                if t.untyped_storage()._cdata not in own:
                    inside[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
                return t

            inputs += x.numel() * 2
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                x = block(x.detach().requires_grad_())
            largest = max(largest, sum(inside.values()) // 2)
    stem = resnet.conv1.out_channels * 4 * (-(-height // 2) * -(-width // 2))
    return min(every, inputs + largest + 3 * stem)


@lru_cache
def transformer_flops(d_model: int, layers: int, slices: int) -> int:
    """Of one volume, forward and backward."""
    transformer = SliceTransformer(d_model, layers)
    x, mask = torch.zeros(1, slices, d_model), torch.ones(1, slices, dtype=torch.bool)
    return flops(lambda: transformer(x, mask).sum().backward())


def build(stage: int, method: str, cfg: Any, data: Data, processes: int = 1) -> Learner:
    """The learner that the entry script of a stage makes, of shapes alone."""

    def objective(dim: int, samples: int, option: str, batch: int) -> SwAV | DeepClusterV2:
        sizes = prototype_counts(getattr(cfg, option), samples, option)
        if method == "deepcluster":
            return DeepClusterV2(dim, sizes, samples)
        length = option.replace("nmb_prototypes", "queue_length")
        return SwAV(dim, sizes, queue_length=queue_size(getattr(cfg, length), sizes, batch * processes, length))

    with torch.device("meta"):
        if stage == 1:
            encoder = GreyResNet(cfg.arch)
            head = ProjectionHead(encoder.num_features, cfg.hidden_mlp, cfg.feat_dim)
            samples = data.stage1_samples(cfg.slices_per_volume)
            return ImageClustering(encoder, head, objective(cfg.feat_dim, samples, "nmb_prototypes", cfg.batch_size))
        joint = JointEncoder(cfg.arch, cfg.d_model, cfg.layers, attention=cfg.attention)
        if stage == 2:
            return MaskedSlices(joint)
        images = min(cfg.images_per_step, data.images and cfg.images_per_step) if cfg.lambda_intra else 0
        head = ProjectionHead(joint.encoder.num_features, cfg.hidden_mlp, cfg.feat_dim)
        slices = data.volumes * data.slices + (data.images if images else 0)
        intra_batch = cfg.batch_size * cfg.intra_slices + images
        intra = objective(cfg.feat_dim, slices, "nmb_prototypes_intra", intra_batch)
        inter = objective(cfg.d_model, data.volumes, "nmb_prototypes", cfg.batch_size)
        return JointClustering(joint, head, intra, inter, cfg.lambda_intra, cfg.lambda_inter, cfg.lambda_mask)


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def gradient_bytes(learner: nn.Module) -> int:
    """What processes join per step: every trainable parameter, in float32."""
    return nbytes(p for p in learner.parameters() if p.requires_grad)


def bank_bytes(learner: Learner) -> int:
    """DeepCluster-v2's memory banks, over all processes: crops * N * d * 4, and a byte per sample for `seen`."""
    banks = [o.bank for _, o in learner.objectives() if o.fills_memory]
    return sum(nbytes([bank.embeddings, bank.seen]) for bank in banks)


def checkpoint_bytes(learner: Learner) -> int:
    """Weights, buffers (with queue and assignments), a momentum per trainable parameter, the banks."""
    return nbytes(learner.state_dict().values()) + gradient_bytes(learner) + bank_bytes(learner)


def cache_bytes(shape: tuple[int, int], slices: int, size: int) -> int:
    """Of one volume or image [H, W] in the store of that canvas."""
    return NPY_HEADER + 2 * slices * math.prod(content_size(*shape, size))


def fit_bytes(slices: int, features: int) -> int:
    """Of the principal components that stage 2's projection starts from: the features in float32 and float64, centred,
    as LAPACK's copy and as right singular vectors; left ones and its work space."""
    return slices * features * (4 + 4 * 8) + 5 * 8 * min(slices, features) ** 2


def ring(payload: float, processes: int) -> float:
    """Bytes that each of the processes sends to all-reduce so many: 2 (g - 1) / g times them."""
    return 2 * (processes - 1) / processes * payload


# -------------------------------------------------------------------------------------------------------------- stages


def predict(stage: int, method: str, cfg: Any, data: Data, machine: Machine, processes: int = 1) -> Cost:
    """Cost of a stage. cfg: options of its entry script."""
    learner = build(stage, method, cfg, data, processes)
    gradients = gradient_bytes(learner)
    work = (_images if stage == 1 else _volumes)(stage, cfg, data, machine)
    samples = data.stage1_samples(cfg.slices_per_volume) if stage == 1 else data.volumes
    joint = cfg.batch_size * processes
    if samples < joint:
        raise UserError(f"stage{stage}: a joint batch of {joint} needs as many samples, the data have {samples}")
    steps = -(-samples // joint)
    share = samples / steps / processes  # mean batch of a process
    per_sample, read = work.seconds, work.read * share
    compute = {name: seconds * share for name, seconds in per_sample.items()}
    compute["objective"] = compute.get("objective", 0) + _objective(learner, work, share, machine)
    compute["optimiser"] = gradients / 4 * machine["optimiser"] / cfg.accumulate
    compute["overhead"] = machine["step"]
    busy = sum(compute.values())
    compute["data wait"] = read if not cfg.workers else max(0.0, read / cfg.workers - busy)
    # DistributedDataParallel sends while backward still computes; CPUs have no engine of their own for it.
    sent = ring(gradients, processes) / cfg.accumulate
    exchange = sent / machine["all_reduce"] if processes > 1 else 0.0
    compute["all-reduce"] = max(0.0, exchange - busy / 2) if machine["overlaps"] else exchange
    seconds = {name: value * steps * cfg.epochs for name, value in compute.items() if value}
    if stage == 2:
        encoded = cfg.epochs if not cfg.cached_views else min(cfg.epochs, cfg.cached_views)
        for name in ("f_intra", "augmentation"):
            seconds[name] *= encoded / cfg.epochs
        if cfg.projection_init == "pca":
            slices = min(FIT_SLICES, data.volumes * data.slices)
            height, width = cfg.target_shape[1:]
            rate = machine.rate("forward_flops", math.sqrt(height * width), cfg.arch)
            rate *= machine["bytes_per_value"] / 4  # fitted in float32, assumed to take twice as long as half precision
            seconds["projection"] = slices * resnet_flops(cfg.arch, height, width, False) / rate / processes
    traffic = sent * steps * cfg.epochs
    for _, objective in learner.objectives():
        if objective.fills_memory:
            took, moved = _kmeans(objective, cfg, machine, processes)
            seconds["k-means"] = seconds.get("k-means", 0.0) + took * cfg.epochs
            traffic += moved * cfg.epochs
    if learner.fills_memory:  # a forward pass over all data
        seconds["filling the bank"] = steps * sum(per_sample[k] * share / 3 for k in ("f_intra",))
        seconds["filling the bank"] += steps * per_sample["augmentation"] * share
    checkpoint = checkpoint_bytes(learner)
    saves = cfg.epochs + sum(seconds.values()) / (60 * cfg.checkpoint_minutes)  # at the end of each, and in between
    seconds["checkpoints"] = saves * checkpoint / machine["checkpoint"]
    seconds["start"] = machine["start"]
    cache = data.volumes * cache_bytes(data.volume_shape[:2], data.slices, work.canvas)
    cache += data.images * cache_bytes(data.image_shape, 1, work.canvas)
    files = data.volumes + data.images
    voxels = data.volumes * math.prod(data.volume_shape) + data.images * math.prod(data.image_shape)
    seconds["cache"] = (voxels * machine["cache_voxel"] + files * machine["cache_file"]) / processes
    if stage == 2 and cfg.cached_views:
        width = VIEWS * cfg.d_model * (4 if machine["bytes_per_value"] == 4 else 2)
        each = NPY_HEADER + min(data.slices, cfg.target_shape[0]) * width + SEAL_BYTES
        cache += data.volumes * cfg.cached_views * each
        files += data.volumes * cfg.cached_views
    kept = (cfg.epochs - 1) // cfg.checkpoint_freq
    return Cost(
        seconds,
        steps,
        _memory(learner, work, cfg, data, machine, processes),
        cache,
        files,
        checkpoint,
        checkpoint * (min(2, cfg.epochs) + kept),
        bank_bytes(learner),
        gradients,
        traffic,
    )


@dataclass
class _Work:
    """Of one sample of a stage."""

    seconds: dict[str, float]
    read: float  # seconds of a loading process
    canvas: int  # side of the store
    activations: float  # bytes in float32 kept for the backward pass
    inputs: float  # bytes of what is read and augmented
    embeddings: dict[str, float]  # objective -> embeddings, of all views
    views: int


def _augment(machine: Machine, kind: str, samples: float, pixels: float) -> float:
    base, each = machine[f"augment_{kind}"]
    return samples * base + pixels * each


def _images(stage: int, cfg: Any, data: Data, machine: Machine) -> _Work:
    encoder = activations = augment = inputs = 0.0
    for side, count in zip(cfg.size_crops, cfg.nmb_crops, strict=True):
        encoder += count * resnet_flops(cfg.arch, side, side, True) / machine.rate("train_flops", side, cfg.arch)
        activations += count * resnet_activations(cfg.arch, side, side, cfg.recompute)
        augment += _augment(machine, "crops", count, count * side * side)
        inputs += 4 * count * side * side
    canvas = canvas_size(*cfg.size_crops)
    if cfg.recompute:
        encoder *= 4 / 3
    read = machine["read_sample"] + 2 * canvas * canvas * machine["read_byte"]
    crops = sum(cfg.nmb_crops)
    seconds = {"f_intra": encoder, "augmentation": augment, "objective": _head(cfg, crops, machine)}
    return _Work(seconds, read, canvas, activations, inputs, {"intra": crops}, crops)


def _head(cfg: Any, rows: float, machine: Machine) -> float:
    features = 512 if cfg.arch in ("resnet18", "resnet34") else 2048
    products = features * cfg.hidden_mlp + cfg.hidden_mlp * cfg.feat_dim
    return rows * 3 * 2 * products / machine["dense_flops"]


def _volumes(stage: int, cfg: Any, data: Data, machine: Machine) -> _Work:
    depth, height, width = cfg.target_shape
    side = math.sqrt(height * width)
    real = min(depth, data.slices)
    canvas = canvas_size(height, width)
    if stage == 2:
        each = resnet_flops(cfg.arch, height, width, False) / machine.rate("forward_flops", side, cfg.arch)
        images = 0.0
        activations = 0.0
    else:
        each = resnet_flops(cfg.arch, height, width, True) / machine.rate("train_flops", side, cfg.arch)
        each *= 4 / 3 if cfg.recompute else 1
        images = cfg.images_per_step / cfg.batch_size if data.images and cfg.lambda_intra else 0.0
        if not (cfg.lambda_inter or cfg.lambda_mask):
            real = min(real, cfg.intra_slices)
        activations = VIEWS * (real + images) * resnet_activations(cfg.arch, height, width, cfg.recompute)
    seconds = {"f_intra": VIEWS * (real + images) * each}
    seconds["augmentation"] = _augment(machine, "volumes", VIEWS, VIEWS * depth * height * width)
    if images:
        seconds["augmentation"] += _augment(machine, "crops", VIEWS * images, VIEWS * images * height * width)
    passes = 1 if stage == 2 else bool(cfg.lambda_inter) + bool(cfg.lambda_mask)
    operations = transformer_flops(cfg.d_model, cfg.layers, depth)
    seconds["f_inter"] = passes * VIEWS * operations / machine.rate("transformer_flops", cfg.d_model)
    # Queries, keys, values, norms, hidden units: about this many numbers per slice, layer and feature.
    activations += passes * VIEWS * depth * cfg.layers * cfg.d_model * 4 * 16
    embeddings = {}
    if stage == 3:
        rows = VIEWS * (cfg.intra_slices + images) if cfg.lambda_intra else 0
        seconds["objective"] = _head(cfg, rows, machine)
        embeddings = {"intra": rows, "inter": VIEWS}
    read = machine["read_sample"] + 2 * real * canvas * canvas * machine["read_byte"]
    read += images * (machine["read_sample"] + 2 * canvas * canvas * machine["read_byte"])
    # The window in float16, its views, and the views of the next batch.
    inputs = 2 * depth * canvas * canvas + 2 * 4 * VIEWS * depth * height * width
    return _Work(seconds, read, canvas, activations, inputs, embeddings, VIEWS)


def _objective(learner: Learner, work: _Work, share: float, machine: Machine) -> float:
    """Seconds per step: scores of all views, and Sinkhorn over batch and queue."""
    seconds = 0.0
    for name, objective in learner.objectives():
        rows = work.embeddings[name] * share
        for head in objective.prototypes.heads:
            K, d = head.weight.shape
            seconds += 3 * 2 * rows * K * d / machine["dense_flops"]
            if isinstance(objective, SwAV):
                queue = objective.queue.shape[1]
                crops = objective.assign_crops
                taking_part = crops * (queue + rows / work.views)
                seconds += 2 * crops * queue * K * d / machine["dense_flops"]
                seconds += taking_part * K * machine["sinkhorn"]
    return seconds


def _kmeans(objective: DeepClusterV2, cfg: Any, machine: Machine, processes: int) -> tuple[float, float]:
    """(seconds, bytes sent by a process) of one epoch's clustering, all heads."""
    N = objective.bank.samples
    seconds = moved = 0.0
    for head in objective.prototypes.heads:
        K, d = head.weight.shape
        assignments = (cfg.kmeans_iterations + 1) * N * K * d / processes
        seconds += assignments / machine.kmeans_rate(K, d) + machine["kmeans_head"]
        moved += cfg.kmeans_iterations * ring(4 * K * (2 * d + 1), processes) + ring(4 * N, processes)
    return seconds, moved


def _memory(learner: Learner, work: _Work, cfg: Any, data: Data, machine: Machine, processes: int) -> float:
    """Peak bytes of a process: program, weights with gradients and momenta, bank, batch, activations."""
    states = nbytes(learner.state_dict().values()) + 2 * gradient_bytes(learner) + bank_bytes(learner) / processes
    batch = cfg.batch_size * (work.inputs + work.activations * machine["bytes_per_value"] / 4)
    before = 0
    if isinstance(learner, MaskedSlices):  # the folded copy, and the maps of a chunk of slices
        states += nbytes(learner.encoder.encoder.parameters())
        batch += machine["chunk_bytes"]
        if cfg.projection_init == "pca":
            before = fit_bytes(min(FIT_SLICES, data.volumes * data.slices), learner.encoder.projection.in_features)
    return machine["process_bytes"] + machine["memory_slack"] * states + max(machine["memory_slack"] * batch, before)


# -------------------------------------------------------------------------------------------------------------- output


def stage_config(stage: int, method: str, changes: dict[str, Any]) -> Any:
    """Options of an entry script: its defaults and `changes`. Raises UserError for those that it does not have."""
    module = importlib.import_module({1: f"ssl_{method}2D", 2: f"mask_{method}", 3: f"ssl_{method}3D"}[stage])
    unknown = set(changes) - set(module.Config.__dataclass_fields__)
    if unknown:
        raise UserError(f"stage{stage}: {module.__name__}.py has no option {', '.join(sorted(unknown))}")
    cfg = module.Config(**changes)
    options.check(cfg)
    return cfg


def main(cfg: Config) -> None:
    machine = Machine.read(cfg.constants)
    data = Data(cfg.volumes, tuple(cfg.volume_shape), cfg.images, tuple(cfg.image_shape))
    print(f"{data.volumes:,} volumes {'x'.join(map(str, data.volume_shape))}, {data.images:,} images, {cfg.method}, "
          f"{cfg.processes} process(es) on {machine.where}")  # fmt: skip
    if machine.assumed:
        print(f"ASSUMED, not measured: {', '.join(machine.assumed)}")
    costs = {}
    for stage in (1, 2, 3) if data.volumes else (1,):
        changes = getattr(cfg, f"stage{stage}")
        costs[stage] = predict(
            stage, cfg.method, stage_config(stage, cfg.method, changes), data, machine, cfg.processes
        )
    print(f"\n{'':8s}{'hours':>9s}{'steps':>9s}{'memory':>9s}{'cache':>10s}{'files':>11s}{'checkpoint':>11s}"
          f"{'kept':>9s}{'gradients':>10s}{'sent':>10s}")  # fmt: skip
    for stage, c in costs.items():
        print(
            f"stage {stage} {c.total / 3600:9.2f}{c.steps:9,d}{c.memory / 2**30:6.1f}GiB{c.cache / 1e9:8.1f}GB"
            f"{c.files:11,d}{c.checkpoint / 1e9:9.2f}GB{c.disk / 1e9:7.1f}GB{c.gradients / 1e6:8.0f}MB"
            f"{c.traffic / 1e12:8.2f}TB"
        )
    print(f"together{sum(c.total for c in costs.values()) / 3600:9.2f} hours")
    for stage, c in costs.items():
        if c.saving:
            print(f"stage {stage}: host memory while a checkpoint is saved, beside the rest: {c.saving / 1e9:.2f} GB "
                  f"of each process (the whole bank), {cfg.processes * c.saving / 1e9:.2f} GB where all "
                  f"{cfg.processes} are on one machine")  # fmt: skip
    print(
        "\nsteps: of an epoch; memory: of each process; kept: all checkpoints; gradients: all-reduced per step; sent: "
        "by each\nprocess in the whole stage. Stages 2 and 3 share one cache where their views are alike. Hours go to:"
    )
    for stage, c in costs.items():
        shares = sorted(c.seconds.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {s / c.total:.0%}" for name, s in shares if s / c.total >= 0.005)
        print(f"stage {stage}: {shown}")


if __name__ == "__main__":
    options.main(main, Config, __doc__)
