"""Segmentation: a U-Net with our ResNet encoder over slices, scored per structure and per volume in 3D.

    python prepare_data.py --source Task02_Heart --dest Training_Data/Task02_Heart     # once
    python -m downstream.segment --data_path Training_Data/Task02_Heart --weights weights/swav3D_encoder.pth
    python -m downstream.segment --data_path Training_Data/MMWHS --weights weights/swav3D.pth --f_inter true

With f_inter, the transformer over slices tells every slice at the U-Net's bottleneck what the slices around it show.
docs/DOWNSTREAM.md has more.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from monai.losses import DiceCELoss
from torch import Tensor, nn

from datasets.render import content_size, robust_limits
from datasets.transforms import gamma, jitter, resample
from downstream import metrics, pairs, results, task
from downstream.encoders import NAMED, choose_arch, grey, has_transformer, load_encoder, load_joint_encoder
from models.encoder import JointEncoder, real_rows
from models.resnet import GreyResNet
from models.unet import UNetDecoder, widen_stem
from training.weights import load_unet
from utils import config
from utils.errors import UserError
from utils.optim import parameter_groups
from utils.options import FREE, constants, data, model, optimisation, running
from utils.seeding import SHUFFLE, stream

LAYERS = 4  # of a transformer that starts from random weights


@constants
class Config(task.Options):
    """Options of segmentation."""

    data_path = "Training_Data/Task02_Heart"
    base_lr = 0.001
    dump_path = "runs/segment"

    structures: dict[str, list[int]] | None = data(None, "label values of each structure; null: as dataset.yaml says")
    slice_axis: Literal[0, 1, 2] | None = data(None, "axis of the files that counts slices; null: as dataset.yaml says")
    window: list[float] | None = data(None, "intensities that become 0 and 1; null: dataset.yaml's, or percentiles")
    patients: str | None = data(None, "JSON or YAML file that maps cases to patients; null: as cases.csv says")
    size: PositiveInt = data(224, "side in pixels of the square that slices are fitted to, aspect kept")
    augment: bool = data(True, "small rotations, scalings, shifts, changes of brightness, contrast and gamma")
    freeze: bool = model(False, "keep the encoder, and f_inter with it, as loaded; only the rest is trained")
    f_inter: bool = model(False, "transformer over slices at the bottleneck, from the weights where they have one")
    inter_slices: PositiveInt = model(16, "consecutive slices that f_inter sees together")
    d_model: PositiveInt = model(640, "width of an f_inter that starts from random weights")
    load_decoder: bool = model(True, "start the decoder from the weights where they have one (lambda_recon > 0)")
    encoder_lr: PositiveFloat = optimisation(1.0, "learning rate of the encoder and of f_inter, as a share of base_lr")
    overlays: NonNegativeInt = running(0, "test cases of which a slice is drawn with outlines", FREE)

    def check(self) -> None:
        super().check()
        if self.size < 32:
            raise UserError(f"size: {self.size} pixels; the encoder halves them five times, so at least 32 are needed")
        if self.window and not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise UserError(f"window: {self.window} must be two increasing numbers, e.g. [-160, 240]")


@dataclass(frozen=True)
class Case:
    """One volume at working resolution: S x S slices with the content in the middle."""

    pair: pairs.Pair
    images: Tensor  # [D, C, S, S] float16 in 0..1
    classes: Tensor  # [D, S, S] uint8
    content: tuple[slice, slice]  # rows and columns that are not padding


class Segmentation(task.Task):
    """Slices, or with f_inter stretches of consecutive ones, against CE + Dice; volumes against their references.

    metrics: {structure or "mean": {"dice", "iou", "hd95_mm", "present", "absent", "missed"}}.
    """

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, device)
        self.data = pairs.LabelledVolumes(cfg.data_path, cfg.structures, cfg.slice_axis, cfg.window, cfg.patients)
        self.pairs = {pair.case: pair for pair in self.data.pairs}
        self.patients = {case: pair.patient for case, pair in self.pairs.items()}
        self.sources = {case: pair.image.path for case, pair in self.pairs.items()}
        self.fingerprint = results.fingerprint(
            path for pair in self.data.pairs for path in (pair.image.path, pair.label)
        )
        self.loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def build(self) -> SliceUNet:
        cfg, channels = self.cfg, self.data.pairs[0].image.channels
        arch = choose_arch(cfg.weights, cfg.arch)
        encoder = load_encoder(cfg.weights, arch, cfg.seed)
        if cfg.f_inter:
            own = has_transformer(cfg.weights)
            encoder = load_joint_encoder(cfg.weights if own else "random", arch, cfg.seed, cfg.d_model, LAYERS)
            if not own and cfg.weights != "random":
                print(f"{cfg.weights} has no transformer over slices: f_inter starts from random weights", flush=True)
        torch.manual_seed(cfg.seed)
        unet = SliceUNet(encoder, channels, max(self.data.classes.values()) + 1, cfg.freeze)
        if cfg.load_decoder and cfg.weights not in NAMED:
            load_unet(unet.decoder, Path(cfg.weights))
        return unet

    def examine(self) -> None:
        for name in [*self.labelled, *self.split.validation, *self.split.test]:
            pairs.intensity_limits(self.pairs[name])
            pairs.require_declared(self.pairs[name], self.data.classes)
        if not self.shown(self.split.validation):
            raise UserError("split: the validation volumes show no structure, so no epoch can be chosen by them")

    def load(self) -> None:
        self.cases = {name: self.case(name) for name in [*self.labelled, *self.split.validation]}

    def case(self, name: str) -> Case:
        """Read, normalised, and fitted to size x size."""
        pair, size = self.pairs[name], self.cfg.size
        depth, height, width = pair.shape
        h, w = content_size(height, width, size)
        top, left = (size - h) // 2, (size - w) // 2
        content = slice(top, top + h), slice(left, left + w)
        images = torch.zeros(depth, pair.image.channels, size, size, dtype=torch.float16)
        for channel, limits in enumerate(pairs.intensity_limits(pair)):
            for place, pixels in enumerate(pairs.read_image(pair)[channel]):
                images[place, channel, content[0], content[1]] = grey(pixels, *limits, (h, w))
        classes = torch.zeros(depth, size, size, dtype=torch.uint8)
        label = torch.from_numpy(pairs.read_label(pair, self.data.classes))[:, None]
        classes[:, content[0], content[1]] = F.interpolate(label, (h, w), mode="nearest-exact")[:, 0]
        return Case(pair, images, classes, content)

    def shown(self, cases: Sequence[str]) -> set[int]:
        """The structures' classes in some cases."""
        return {self.data.classes[value] for case in cases for value in pairs.label_values(self.pairs[case])} - {0}

    def describe(self) -> str:
        data, there = self.data, self.shown(self.labelled)
        absent = [name for name, members in data.members.items() if not there & set(members)]
        warnings = [f"warning: no labelled volume shows {name}; it cannot be learnt" for name in absent]
        head = f"{data.name}: {len(data.pairs)} volumes; {', '.join(data.structures)}"
        return "\n".join([head, *data.notes, *warnings])

    @property
    def steps(self) -> int:
        slices = sum(self.pairs[name].shape[0] for name in self.labelled)
        return self.cfg.steps_per_epoch or max(1, slices // self.cfg.batch_size)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [
            {**group, "share": share, "start": begin}
            for part, share, begin in ((model.encoder, self.cfg.encoder_lr, self.head_start), (model.decoder, 1.0, 0))
            for group in parameter_groups(part, self.cfg.wd)
        ]

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, list[int]]:
        """Images [N, C, S, S], classes [N, S, S] and the lengths of the stretches that the N slices are of."""
        cfg = self.cfg
        length = cfg.inter_slices if cfg.f_inter else 1
        per_step = max(1, cfg.batch_size // length)
        depths = tuple(self.pairs[name].shape[0] for name in self.labelled)
        order = stretches(depths, length, self.steps * per_step, cfg.seed, epoch)
        chosen = order[step * per_step : (step + 1) * per_step]
        parts = [(self.cases[self.labelled[i]], slice(start, start + length)) for i, start in chosen]
        images = torch.cat([case.images[part] for case, part in parts]).float()
        classes = torch.cat([case.classes[part] for case, part in parts])
        lengths = [len(case.images[part]) for case, part in parts]
        if cfg.augment:
            images, classes = augment(images, classes, lengths, stream(cfg.seed, epoch, step, 1))
        return images, classes.long(), lengths

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, list[int]]) -> Tensor:
        images, classes, lengths = batch
        logits = model(images.to(self.device), lengths)
        return self.loss_of(logits.float(), classes[:, None].to(self.device))

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean Dice over structures, of means over the volumes, at working resolution."""
        cases = [self.cases[name] for name in self.split.validation]
        volumes = [(self.predict(model, case, native=False), case.classes) for case in cases]
        found = [[metrics.dice(*metrics.masks(*one, own)) for one in volumes] for own in self.data.members.values()]
        return {"validation_dice": metrics.mean(list(map(metrics.mean, found)))}

    def test(self, model: nn.Module) -> task.Outcome:
        scores, rows, overlays = [], [], {}
        for name in self.split.test:
            case = self.case(name)
            prediction = self.predict(model, case, native=True)
            reference = torch.from_numpy(pairs.read_label(case.pair, self.data.classes))
            scores.append(metrics.score(prediction, reference, self.data.members, case.pair.spacing_mm))
            for structure, values in scores[-1].items():
                numbers = {metric: f"{value:.6g}" for metric, value in values.items()}
                rows.append({"case": name, "patient": case.pair.patient, "structure": structure, **numbers})
            if len(scores) <= self.cfg.overlays:
                overlays[f"{name}.png"] = draw(case, prediction.numpy(), reference.numpy())
        return task.Outcome(metrics.summarise(scores), rows, files=overlays)

    def predict(self, model: nn.Module, case: Case, native: bool) -> Tensor:
        """Classes of a volume, uint8 on the CPU: [D, H, W] on the grid of its file, or [D, S, S] at working resolution.

        With f_inter, stretches of slices overlap by half and their probabilities are averaged. Probabilities, not
        classes, are resampled to the file's grid.
        """
        cfg, depth = self.cfg, len(case.images)
        length, hop = (cfg.inter_slices, max(1, cfg.inter_slices // 2)) if cfg.f_inter else (cfg.batch_size,) * 2
        probabilities, seen = None, torch.zeros(depth, 1, 1, 1)
        for start in sorted({min(start, max(0, depth - length)) for start in range(0, depth, hop)}):
            part = slice(start, start + length)
            images = case.images[part].float().to(self.device)
            with self.precision.autocast():
                logits = model(images, [len(images)])
            softmax = logits.float().softmax(dim=1).cpu()
            if probabilities is None:
                probabilities = torch.zeros(depth, *softmax.shape[1:])
            probabilities[part] += softmax
            seen[part] += 1
        probabilities /= seen
        if not native:
            return probabilities.argmax(1).to(torch.uint8)
        inside = probabilities[:, :, case.content[0], case.content[1]]
        size = case.pair.shape[1:]
        resized = (F.interpolate(one[None], size, mode="bilinear", antialias=True).argmax(1) for one in inside)
        return torch.cat(list(resized)).to(torch.uint8)


run, check = functools.partial(task.run, Segmentation), functools.partial(task.check, Segmentation)


@functools.lru_cache(maxsize=1)
def stretches(depths: tuple[int, ...], length: int, count: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """At least `count` stretches of `length` slices in random order: (number of the volume, first slice).

    A pass visits every slice once; of longer stretches it takes as many as hold all slices, from random ones on.
    """
    random, found = stream(seed, epoch, 0, 0, SHUFFLE), []
    while len(found) < count:
        one_pass = [
            (i, int(random.integers(max(1, depth - length + 1))) if length > 1 else start)
            for i, depth in enumerate(depths)
            for start in range(0, depth, length)
        ]
        found += [one_pass[i] for i in random.permutation(len(one_pass))]
    return found


def augment(
    images: Tensor, classes: Tensor, lengths: Sequence[int], random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One draw per stretch: rotation up to 15 degrees, scale 0.85..1.18, shift up to 5 %, brightness, contrast, gamma.

    images [N, C, S, S], classes [N, S, S]. Labels are resampled as one-hot maps, so borders stay smooth.
    """
    angle, log_scale, x, y, brightness, contrast, log_gamma = (
        torch.from_numpy(random.uniform(-limit, limit, len(lengths))).float().repeat_interleave(torch.tensor(lengths))
        for limit in (math.radians(15), math.log(1.18), 0.1, 0.1, 0.1, 0.2, 0.3)
    )
    cos, sin = angle.cos() * log_scale.exp(), angle.sin() * log_scale.exp()
    theta = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)  # [N, 2, 3]
    size = images.shape[-1]
    one_hot = F.one_hot(classes.long()).permute(0, 3, 1, 2).float()
    moved = resample(one_hot, theta, size, size).argmax(1).to(classes.dtype)
    images = jitter(resample(images, theta, size, size).clamp(0, 1), brightness, contrast)
    return gamma(images, log_gamma), moved


def draw(case: Case, prediction: np.ndarray, reference: np.ndarray) -> bytes:
    """PNG of the slice with most labelled pixels: outlines of the reference on the left, of the prediction right."""
    from matplotlib.figure import Figure

    chosen = int((reference > 0).sum(axis=(1, 2)).argmax())
    pixels = pairs.read_image(case.pair)[0, chosen]
    low, high = robust_limits(pixels)
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, classes in zip(figure.subplots(1, 2), (reference[chosen], prediction[chosen]), strict=True):
        axes.imshow(pixels, cmap="gray", vmin=low, vmax=high)
        for number in np.unique(classes[classes > 0]):
            axes.contour(classes == number, levels=[0.5], colors=f"C{number}", linewidths=1)
        axes.set_axis_off()
    figure.savefig(picture := io.BytesIO(), dpi=150, format="png")
    return picture.getvalue()


class SliceUNet(nn.Module):
    """A U-Net whose encoder is our ResNet, with f_inter at the bottleneck where the encoder has one.

    forward: images [N, C, H, W] in 0..1 of len(lengths) stretches of slices -> logits [N, classes, H, W].
    freeze: the encoder, BatchNorm's statistics with it, stays as it is.
    """

    def __init__(self, encoder: GreyResNet | JointEncoder, channels: int, classes: int, freeze: bool = False) -> None:
        super().__init__()
        self.encoder, self.inter = encoder, isinstance(encoder, JointEncoder)
        widen_stem(self.resnet, channels)
        self.decoder = UNetDecoder(self.resnet, classes, encoder.projection.out_features if self.inter else 0)
        self.frozen = freeze
        encoder.requires_grad_(not freeze)

    @property
    def resnet(self) -> GreyResNet:
        return self.encoder.resnet if self.inter else self.encoder

    def train(self, mode: bool = True) -> SliceUNet:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor, lengths: list[int]) -> Tensor:
        stages, context = self.resnet(images, stem=True), None
        if self.inter:
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(images.device)
            context = self.encoder.cells(stages[1:], real_rows(mask), mask)
        return self.decoder(stages, context)


if __name__ == "__main__":
    config.main(run, Config, __doc__)
