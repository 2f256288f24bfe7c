"""A run's network, rebuilt from its checkpoint, and what it makes of the data as they are, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.embeddings import VIEWS
from datasets.index import Sample, fingerprint, volumes
from datasets.loaders import Slices, canvas_size
from datasets.masks import draw_masks
from datasets.store import SliceStore, prepare
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from models.resnet import GreyResNet, pooled
from models.transformer import AttentionMaps
from objectives.masked import interpolate_masked
from reporting.runs import Run
from utils.errors import UserError

AT_ONCE = 32  # slices in a forward pass


@dataclass
class Network:
    """What a checkpoint holds of a model, in evaluation mode."""

    resnet: GreyResNet
    joint: JointEncoder | None = None  # stages 2 and 3
    head: ProjectionHead | None = None
    intra: list[Tensor] = field(default_factory=list)  # unit prototypes [K, feat_dim] of every head
    inter: list[Tensor] = field(default_factory=list)  # unit prototypes [K, d_model] of every head
    decoder: nn.Linear | None = None  # of masked prediction, with its token
    mask_token: Tensor | None = None


@dataclass
class Level:
    """Embeddings of one kind of items: `intra` (slices and images) or `inter` (volumes)."""

    name: str
    z: Tensor  # [N, d], unit length
    items: list[tuple[int, int, int]]  # sample, first slice, one past the last
    samples: list[Sample]
    prototypes: list[Tensor]  # of every head; none in stage 2

    def label(self, index: int) -> str:
        sample, start, stop = self.items[index]
        of = self.samples[sample]
        if of.kind == "image":
            return of.name
        return f"{of.name} slice {start}" if stop - start == 1 else f"{of.name} slices {start}-{stop - 1}"

    def dataset(self, index: int) -> str:
        return self.samples[self.items[index][0]].dataset


@dataclass
class Attention:
    """What the transformer looked at in one volume."""

    item: tuple[int, int, int]
    sample: Sample
    maps: list[AttentionMaps]  # per layer, of one volume: positions [1, G, n], weights [1, heads, D, n]


@dataclass
class MaskedError:
    """Mean squared error per slice of a volume when that slice is hidden."""

    item: tuple[int, int, int]
    sample: Sample
    model: np.ndarray  # [D]
    interpolation: np.ndarray  # [D]


def build(run: Run) -> Network:
    """The network of a run's checkpoint. Raises UserError where the checkpoint does not fit its own configuration."""
    config, state = run.config, run.state["learner"]
    try:
        joint = None
        if run.stage == 1:
            resnet = GreyResNet(config["arch"])
            resnet.load_state_dict(_below(state, "encoder."))
        else:
            attention = config.get("attention", "deformable")
            joint = JointEncoder(config["arch"], config["d_model"], config["layers"], attention=attention)
            joint.load_state_dict(_below(state, "encoder."))
            resnet = joint.eval().encoder
        network = Network(resnet.eval(), joint)
        if "head.0.weight" in state:
            head = ProjectionHead(resnet.num_features, config["hidden_mlp"], config["feat_dim"])
            head.load_state_dict(_below(state, "head."))
            network.head = head.eval()
        network.intra, network.inter = _prototypes(state, "intra"), _prototypes(state, "inter")
        if "mask_token" in state:
            network.mask_token = state["mask_token"]
            network.decoder = nn.Linear(config["d_model"], config["d_model"]).eval()
            network.decoder.load_state_dict(_below(state, "decoder."))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{run.folder}: the checkpoint does not fit config.yaml or this version of the project ({reason})"
        ) from None
    return network


def open_data(
    run: Run, data_path: str | None, cache_path: str | None, workers: int
) -> tuple[list[Sample], SliceStore, bool]:
    """(samples, store, whether these are the data that the run was trained on). Raises UserError as `prepare` does."""
    config = run.config
    sides = config["size_crops"] if run.stage == 1 else config["target_shape"][1:]
    where = data_path or config["data_path"], canvas_size(*sides), cache_path or config["cache_path"]
    samples, store = prepare(*where, config["on_bad"], workers, progress=False)
    return samples, store, run.state is None or fingerprint(samples) == run.state["data"]


def choose(groups: list[str], count: int, seed: int) -> list[int]:
    """Up to `count` indices, in order: as many of every group as possible, each group in a random order of its own."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    rng = np.random.default_rng(seed)
    shuffled = [list(rng.permutation(part)) for part in members.values()]
    turns = [part[turn] for turn in range(max(map(len, shuffled), default=0)) for part in shuffled if turn < len(part)]
    return sorted(int(index) for index in turns[:count])


def window(sample: Sample, slices: int) -> tuple[int, int]:
    """First slice and one past the last of the middle `slices` of a volume."""
    length = min(sample.slices, slices)
    start = (sample.slices - length) // 2
    return start, start + length


def pictures(store: SliceStore, item: tuple[int, int, int], size: tuple[int, int]) -> Tensor:
    """Slices of one item [n, H, W], resized without augmentation."""
    slices = torch.from_numpy(store.read(*item)).unsqueeze(1)
    return F.interpolate(slices, size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def view_size(config: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels that the network was trained on; stage 1: of the large crops."""
    return (config["size_crops"][0],) * 2 if "size_crops" in config else tuple(config["target_shape"][1:])


@torch.inference_mode()
def embed_slices(
    run: Run, network: Network, samples: list[Sample], store: SliceStore, count: int, seed: int
) -> Level | None:
    """`count` slices and images through head and intra prototypes; None where the run has none of these."""
    if network.head is None:
        return None
    dataset = Slices(samples, store, run.config.get("slices_per_volume", 0))
    chosen = choose(dataset.groups, count, seed)
    items = [(int(i), int(s), int(s) + 1) for i, s in dataset.items[chosen]]
    size = view_size(run.config)
    parts = []
    for start in range(0, len(items), AT_ONCE):
        images = torch.stack([pictures(store, item, size)[0] for item in items[start : start + AT_ONCE]])
        parts.append(F.normalize(network.head(pooled(network.resnet(images.unsqueeze(1)))), dim=1))
    return Level("intra", torch.cat(parts), items, samples, network.intra)


def _windows(run: Run, samples: list[Sample], count: int, seed: int) -> list[tuple[int, int, int]]:
    where = volumes(samples)
    chosen = choose([samples[i].dataset for i in where], count, seed)
    return [(where[k], *window(samples[where[k]], run.config["target_shape"][0])) for k in chosen]


def _tokens(run: Run, network: Network, store: SliceStore, item: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Slice embeddings [1, D, d] and mask [1, D] of one volume, which needs no padding alone."""
    parts = pictures(store, item, view_size(run.config)).unsqueeze(1).split(AT_ONCE)
    tokens = torch.cat([network.joint.slices(part)[1] for part in parts]).unsqueeze(0)
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)


@torch.inference_mode()
def embed_volumes(
    run: Run, network: Network, samples: list[Sample], store: SliceStore, count: int, seed: int
) -> Level | None:
    """The middle windows of `count` volumes through the transformer; None in stage 1 or without volumes."""
    items = _windows(run, samples, count, seed) if network.joint else []
    if not items:
        return None
    z = torch.cat([network.joint.holistic(*_tokens(run, network, store, item)) for item in items])
    return Level("inter", z, items, samples, network.inter)


@torch.inference_mode()
def attention(
    run: Run, network: Network, samples: list[Sample], store: SliceStore, count: int, seed: int
) -> Iterator[Attention]:
    for item in _windows(run, samples, count, seed) if network.joint else []:
        _, maps = network.joint.transformer(*_tokens(run, network, store, item), return_maps=True)
        if maps:  # only deformable attention has them
            yield Attention(item, samples[item[0]], maps)


def attention_over_slices(maps: AttentionMaps, slices: int) -> Tensor:
    """[D, D] of one volume: how much of each row's attention reads each slice, mean over the heads; rows sum to 1.

    A sampled point reads its two neighbouring slices by linear interpolation, so its weight is divided among them.
    """
    positions, weights = maps.positions[0], maps.weights[0]  # [G, n], [heads, D, n]
    hats = (1 - (positions.unsqueeze(-1) - torch.arange(slices)).abs()).clamp(min=0)  # [G, n, D]
    return (weights @ hats.repeat_interleave(len(weights) // len(hats), dim=0)).mean(dim=0)


@torch.inference_mode()
def masked_errors(
    run: Run, network: Network, samples: list[Sample], store: SliceStore, count: int, seed: int
) -> Iterator[MaskedError]:
    """Every slice of a volume hidden with others as in training, until each was hidden at least once."""
    if network.decoder is None:
        return
    config = run.config
    for item in _windows(run, samples, count, seed):
        tokens, mask = _tokens(run, network, store, item)
        D = tokens.shape[1]
        if D < 2:
            continue
        sums = torch.zeros(3, D)  # of the model, of interpolation, times hidden
        how = config["mask_ratio"], config["mask_style"], seed
        for draw in range(20 * D):  # random masks may take long to reach the last slice, but never this long
            hidden = draw_masks(torch.tensor([D]), torch.tensor([item[0]]), *how, draw // VIEWS, 1 + draw % VIEWS, D)
            inside = torch.where(hidden.unsqueeze(-1), network.mask_token, tokens)
            predicted = network.decoder(network.joint.transformer(inside, mask))
            guessed = interpolate_masked(tokens, mask & ~hidden)
            errors = [(x - tokens).square().mean(dim=2) * hidden for x in (predicted, guessed)]
            sums += torch.cat([*errors, hidden])
            if bool((sums[2] > 0).all()):
                break
        model, interpolation = (sums[:2] / sums[2]).numpy()
        yield MaskedError(item, samples[item[0]], model, interpolation)


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prototypes(state: dict[str, Any], level: str) -> list[Tensor]:
    heads = _below(state, f"{level}.prototypes.heads.")
    return [F.normalize(heads[f"{h}.weight"].float(), dim=1) for h in range(len(heads))]


def data_of(samples: list[Sample]) -> list[dict[str, Any]]:
    """A row per data set and kind: files, slices, sides in pixels."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.dataset, sample.kind), []).append(sample)
    return [
        {
            "dataset": dataset,
            "kind": kind,
            "files": len(members),
            "slices": sum(s.slices for s in members),
            "depth": _range([s.slices for s in members]) if kind == "volume" else "-",
            "height": _range([s.height for s in members]),
            "width": _range([s.width for s in members]),
            "size_mb": sum(s.size_bytes for s in members) / 1e6,
            "modality": members[0].modality or "-",
        }
        for (dataset, kind), members in groups.items()
    ]


def _range(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"
