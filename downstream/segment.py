"""Segmentation: a U-Net with our ResNet encoder over slices, scored per structure and per volume in 3D.

    python -m downstream.segment --data_path Task02_Heart --weights weights/swav3D_encoder.pth --labelled 5 --seed 0
    python -m downstream.segment --data_path mmwhs --preset mmwhs_ct --weights weights/swav3D.pth --f_inter true

The U-Net is segmentation_models_pytorch's. With f_inter, the transformer over slices tells every slice at the U-Net's
bottleneck what the slices around it show. Layouts, presets, metrics and expected output: docs/SEGMENTATION.md.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from monai.losses import DiceCELoss
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from datasets.render import PERCENTILES, SAMPLED_VOXELS, content_size
from datasets.transforms import gamma, jitter, resample
from downstream import metrics
from downstream.encoders import choose_arch, describe_weights, has_transformer, load_encoder, load_joint_encoder
from downstream.pairs import PRESETS, Pair, Task, find_task, read_image, read_label
from downstream.splits import choose_labelled, draw_split, write_split
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, multi_scale
from utils import checkpoint, distributed
from utils import config as options
from utils.errors import UserError
from utils.files import write_json
from utils.optim import WarmupCosine, parameter_groups
from utils.precision import Precision
from utils.seeding import SHUFFLE, stream

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # those that the U-Net's library has
LAYERS = 4  # of a transformer that starts from random weights


@dataclass
class Config:
    data_path: str = "Training_Data/Task02_Heart"
    """one data set of image/label pairs: imagesTr/ and labelsTr/ (NIfTI), or CASE.npy and labels/CASE.npy"""
    preset: Literal[("none", *PRESETS)] = "none"
    """a public data set: its file names, structures and channels"""
    structures: dict[str, list[int]] | None = None
    """label values of each structure, which may overlap; null: what dataset.json, dataset.yaml or the preset say"""
    slice_axis: Literal[0, 1, 2] | None = None
    """axis of the files that counts slices; null: what dataset.yaml says, else as prepare_data.py chooses"""
    window: list[float] | None = None
    """intensities that become 0 and 1 (HU for CT); null: what dataset.yaml says, else robust percentiles"""
    patients: str | None = None
    """JSON or YAML file that maps cases to patients, as dataset.json may under `patient`; null: what that says"""
    split: str | None = None
    """YAML or JSON file with the cases of train, validation and test; null: draw one, by patient"""
    fractions: list[NonNegativeFloat] = field(default_factory=lambda: [0.6, 0.15, 0.25])
    """of the patients in train, validation and test, where the split is drawn"""
    split_seed: NonNegativeInt = 0
    """of the split that is drawn: the same test cases whatever the seed below"""
    labelled: NonNegativeInt = 0
    """training volumes whose labels are used; 0: all. Chosen by the seed; 5 are among the 10 of the same seed"""

    weights: str = "random"
    """random, imagenet (from torch's cache), or a file of weights of any stage"""
    arch: Literal[ARCHITECTURES] | None = None
    """ResNet of the encoder; null: what the .json beside the weights says, else resnet50"""
    freeze: bool = False
    """keep the encoder, and f_inter with it, as loaded; train the rest of the U-Net only"""
    f_inter: bool = False
    """transformer over slices at the bottleneck, from the weights where they have one"""
    inter_slices: PositiveInt = 16
    """consecutive slices that f_inter sees together"""
    d_model: PositiveInt = 640
    """width of an f_inter that starts from random weights"""
    decoder_norm: Literal["batch", "instance"] = "batch"
    """normalisation in the U-Net's decoder; instance needs no running means, which few steps leave unsettled"""

    size: PositiveInt = 224
    """side in pixels of the square that slices are fitted to, up or down, aspect kept"""
    augment: bool = True
    """small rotations, scalings, shifts, changes of brightness, contrast and gamma"""
    epochs: PositiveInt = 40
    """passes over the labelled slices; of several, the one with the best validation Dice is tested"""
    steps_per_epoch: NonNegativeInt = 0
    """steps of an epoch, however many slices are labelled; 0: one pass"""
    batch_size: PositiveInt = 16
    """slices of a step"""
    base_lr: PositiveFloat = 0.001
    """peak learning rate of AdamW, cosine schedule"""
    encoder_lr: PositiveFloat = 1.0
    """learning rate of the encoder, and of f_inter, as a share of base_lr, from whatever weights they start"""
    wd: NonNegativeFloat = 0.0001
    """weight decay"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    seed: NonNegativeInt = 0
    """of random weights, the choice of labelled volumes, order and augmentation"""

    dump_path: str = "runs/segment"
    """receives results.json, cases.csv, split.json and best.pth"""
    overlays: NonNegativeInt = 0
    """test cases of which a slice is drawn with outlines: reference on the left, prediction on the right"""


def main(cfg: Config) -> None:
    run(cfg)


def run(cfg: Config) -> dict[str, Any]:
    """Train, keep the epoch with the best validation Dice, test it once. Everything is checked before training.

    Returns {"metrics": {structure or "mean": {"dice", "iou", "hd95_mm", "present", "absent", "missed"}},
    "cases": number of test cases, ...}, which results.json holds too (there, null stands for nan). Raises UserError.
    """
    began = time.monotonic()
    place = distributed.start(cfg.device, cfg.seed)
    if place.world_size > 1:
        raise UserError("segmentation trains in one process; start it with python, not with torchrun")
    if cfg.size < 32:
        raise UserError(f"size: {cfg.size} pixels; the encoder halves them five times, so at least 32 are needed")
    task = find_task(cfg.data_path, cfg.preset, cfg.structures, cfg.slice_axis, cfg.window, cfg.patients)
    patients = {pair.case: pair.patient for pair in task.pairs}
    split = draw_split(cfg.split, cfg.fractions, patients, cfg.split_seed)
    labelled = choose_labelled(split.train, cfg.labelled, cfg.seed)
    label = describe_weights(cfg.weights)
    model = build_model(cfg, task).to(place.device)
    print(
        f"{task.name}: {len(task.pairs)} volumes; {', '.join(task.structures)}\n"
        f"{len(labelled)} labelled for training, {len(split.validation)} for validation, {len(split.test)} for the test"
        + ("" if task.patients_known else "\nno file names patients: every volume counts as a patient of its own"),
        flush=True,
    )
    pairs = {pair.case: pair for pair in task.pairs}
    train, validation = (
        [load_case(pairs[name], task, cfg.size) for name in names] for names in (labelled, split.validation)
    )
    for name in split.test:  # checked now, kept later: there may be more of them than fit in memory
        load_case(pairs[name], task, cfg.size)
    _check_structures(task, train, validation)

    out = Path(cfg.dump_path)
    write_split(split, out / "split.json")
    history = fit(model, train, validation, task, cfg, place.device)
    best = max(range(len(history)), key=lambda epoch: history[epoch]["validation_dice"])
    checkpoint.write({key: value.cpu() for key, value in model.state_dict().items()}, out / "best.pth")

    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name in split.test:
        case = load_case(pairs[name], task, cfg.size)
        prediction, reference = predict(model, case, cfg, native=True), read_label(case.pair, task.classes)
        scores[name] = metrics.score(prediction, torch.from_numpy(reference), task.members, case.pair.spacing_mm)
        if len(scores) <= cfg.overlays:
            draw(case, prediction.numpy(), reference, out / f"{name}.png")
    summary = metrics.summarise(list(scores.values()))
    print(metrics.format_table(summary))
    chosen = f"; epoch {best + 1} of {cfg.epochs} was the best on validation" if cfg.epochs > 1 else ""
    print(f"{len(scores)} test volumes{chosen}")

    result = {
        "metrics": summary,
        "cases": len(scores),
        "weights": label,
        "labelled": labelled,
        "best_epoch": best + 1,
        "history": history,
        "seconds": round(time.monotonic() - began, 1),
        "torch": torch.__version__,
        "config": options.to_dict(cfg),
    }
    write_json(result, out / "results.json")
    write_cases(scores, pairs, out / "cases.csv")
    print(f"wrote {out}/results.json and cases.csv", flush=True)
    return result


class SliceUNet(nn.Module):
    """U-Net on slices whose encoder is our ResNet, optionally with f_inter at the bottleneck.

    forward: images [N, C, H, W] in 0..1, N = sum(lengths) slices of len(lengths) stretches of a volume each ->
    logits [N, classes, H, W].
    C channels: the grey stem's weights / C each, so C times the same image gives the features of that image.
    With f_inter, slice embeddings are made as in pre-training from the encoder's stages; what the transformer returns
    for a slice is mapped to the bottleneck's channels and added there, everywhere in the slice. This map starts at 0:
    training starts from the plain U-Net.
    """

    def __init__(
        self,
        encoder: GreyResNet,
        arch: str,
        channels: int,
        classes: int,
        inter: JointEncoder | None = None,
        freeze: bool = False,
        decoder_norm: str = "batch",
    ) -> None:
        super().__init__()
        self.unet = smp.Unet(
            arch,
            encoder_weights=None,
            in_channels=channels,
            classes=classes,
            decoder_use_norm={"type": f"{decoder_norm}norm"} | ({"affine": True} if decoder_norm == "instance" else {}),
        )
        state = encoder.torchvision_state()
        state["conv1.weight"] = (encoder.conv1.weight.detach() / channels).repeat(1, channels, 1, 1)
        self.unet.encoder.load_state_dict(state)
        loaded: list[nn.Module] = [self.unet.encoder]
        self.transformer = None
        if inter is not None:
            self.projection, self.transformer = inter.projection, inter.transformer
            loaded += [self.projection, self.transformer]
            self.to_bottleneck = nn.Linear(self.projection.out_features, encoder.num_features)
            nn.init.zeros_(self.to_bottleneck.weight)
            nn.init.zeros_(self.to_bottleneck.bias)
        self.loaded, self.frozen = loaded, loaded if freeze else []
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> SliceUNet:
        super().train(mode)
        for module in self.frozen:
            module.eval()  # BatchNorm keeps its statistics
        return self

    def forward(self, images: Tensor, lengths: Sequence[int]) -> Tensor:
        features = self.unet.encoder((images - GREY_MEAN) / GREY_STD)  # the images, the stem, four stages
        if self.transformer is not None:
            embedded = self.projection(multi_scale(features[2:]))  # [N, d]
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            mask = mask.to(embedded.device)
            tokens = embedded.new_zeros(*mask.shape, embedded.shape[1])
            tokens[mask] = embedded
            context = self.to_bottleneck(self.transformer(tokens, mask)[mask])  # [N, channels of the last stage]
            features[-1] = features[-1] + context[:, :, None, None]
        return self.unet.segmentation_head(self.unet.decoder(features))


@dataclass(frozen=True)
class Case:
    """One volume at working resolution: S x S slices with the content in the middle."""

    pair: Pair
    images: Tensor  # [D, C, S, S] float16 in 0..1
    classes: Tensor  # [D, S, S] uint8
    content: tuple[slice, slice]  # rows and columns that are not padding


def build_model(cfg: Config, task: Task) -> SliceUNet:
    """The network from cfg.weights; its other weights are the same for the same seed, whatever cfg.weights."""
    arch = choose_arch(cfg.weights, cfg.arch)
    if arch not in ARCHITECTURES:
        raise UserError(f"weights: {cfg.weights} is a {arch}; the U-Net takes {', '.join(ARCHITECTURES)}")
    channels = {pair.channels for pair in task.pairs}
    if len(channels) > 1:
        raise UserError(f"{task.name}: some volumes have {min(channels)} channels, others {max(channels)}")
    encoder, inter = load_encoder(cfg.weights, arch, cfg.seed), None
    if cfg.f_inter:
        own = has_transformer(cfg.weights)
        inter = load_joint_encoder(cfg.weights if own else "random", arch, cfg.seed, cfg.d_model, LAYERS)
        if not own and cfg.weights != "random":
            print(f"{cfg.weights} has no transformer over slices: f_inter starts from random weights", flush=True)
    torch.manual_seed(cfg.seed)
    return SliceUNet(encoder, arch, channels.pop(), task.num_classes, inter, cfg.freeze, cfg.decoder_norm)


def load_case(pair: Pair, task: Task, size: int) -> Case:
    """Read, check, normalise and fit to size x size. Raises UserError for unusable voxels or label values."""
    classes = torch.from_numpy(read_label(pair, task.classes))
    _, height, width = classes.shape
    h, w = content_size(height, width, size)
    top, left = (size - h) // 2, (size - w) // 2
    content = slice(top, top + h), slice(left, left + w)
    images = torch.zeros(len(classes), pair.channels, size, size, dtype=torch.float16)
    for channel, volume in enumerate(read_image(pair)):
        grey = torch.from_numpy(normalise(volume, task.window))[:, None]
        if grey.min() == grey.max():  # read_image has refused constant volumes
            raise UserError(f"{pair.images[0]}: its intensities lie outside the window {task.window}; correct it")
        resized = F.interpolate(grey, (h, w), mode="bilinear", antialias=True)[:, 0]
        images[:, channel, content[0], content[1]] = resized.clamp(0, 1).half()
    canvas = torch.zeros(len(classes), size, size, dtype=torch.uint8)
    canvas[:, content[0], content[1]] = F.interpolate(classes[:, None], (h, w), mode="nearest-exact")[:, 0]
    return Case(pair, images, canvas, content)


def normalise(volume: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """float32 in 0..1, contiguous: linear in the window, or between robust percentiles, as for pre-training."""
    low, high = window or np.percentile(volume.ravel()[:: max(1, volume.size // SAMPLED_VOXELS)], PERCENTILES)
    if low == high:  # a vessel-only volume can be 99.9 % zeros
        low, high = volume.min(), volume.max()
    scaled = (np.ascontiguousarray(volume).astype(np.float64) - float(low)) / (float(high) - float(low))
    return scaled.clip(0, 1).astype(np.float32)


def fit(
    model: SliceUNet, train: list[Case], validation: list[Case], task: Task, cfg: Config, device: torch.device
) -> list[dict[str, float]]:
    """Train on CE + Dice and leave the weights of the epoch with the best validation Dice in the model.

    Returns per epoch the mean loss and the validation Dice: per volume at working resolution, mean over volumes, then
    over structures. Raises UserError when the loss is not finite.
    """
    precision = Precision(cfg.precision, device)
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimizer = torch.optim.AdamW(_groups(model, cfg), cfg.base_lr)
    steps = cfg.steps_per_epoch or max(1, sum(len(case.images) for case in train) // cfg.batch_size)
    rate = WarmupCosine(cfg.base_lr, 0.0, 0.0, min(steps, cfg.epochs * steps // 10), cfg.epochs * steps)
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    for epoch in tqdm(range(cfg.epochs), desc="training", unit="epoch", disable=None):
        model.train()
        losses = []
        for step, (images, classes, lengths) in enumerate(batches(train, epoch, steps, cfg), start=epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["share"]
            images, classes = images.to(device), classes.to(device)
            with precision.autocast():
                logits = model(images, lengths)
            loss = loss_of(logits.float(), classes[:, None])
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower --base_lr, or change --weights")
            optimizer.zero_grad()
            precision.backward(loss)
            precision.step(optimizer)
            losses.append(loss.item())
        score = validate(model, validation, task, cfg) if cfg.epochs > 1 else math.nan  # one has nothing to choose
        if not history or score > max(line["validation_dice"] for line in history):
            best = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        history.append({"loss": float(np.mean(losses)), "validation_dice": score})
        tqdm.write(f"epoch {epoch + 1:3}  loss {history[-1]['loss']:.4f}  validation Dice {score:.4f}")
    model.load_state_dict(best)
    return history


def _groups(model: SliceUNet, cfg: Config) -> list[dict[str, Any]]:
    """Parameters with the decay of their kind and their `share` of the learning rate."""
    loaded = {id(p) for module in model.loaded for p in module.parameters()}
    found = []
    for group in parameter_groups(model, cfg.wd):
        for share, inside in ((cfg.encoder_lr, True), (1.0, False)):
            params = [p for p in group["params"] if (id(p) in loaded) == inside]
            found.append({"params": params, "weight_decay": group["weight_decay"], "share": share})
    return [group for group in found if group["params"]]


def batches(cases: list[Case], epoch: int, steps: int, cfg: Config) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """`steps` times images [N, C, S, S], classes [N, S, S] and the lengths of the stretches that the N slices are of.

    A stretch is one slice, or with f_inter `inter_slices` consecutive ones; it is augmented as a whole. Every pass
    visits all stretches in a new order. A function of (seed, epoch).
    """
    order = stream(cfg.seed, epoch, 0, 0, SHUFFLE)
    length = cfg.inter_slices if cfg.f_inter else 1
    per_step = max(1, cfg.batch_size // length)
    stretches: list[tuple[Case, int]] = []
    while len(stretches) < steps * per_step:
        depths = [(case, len(case.images)) for case in cases]
        one_pass = [
            (case, int(order.integers(max(1, depth - length + 1))) if cfg.f_inter else start)
            for case, depth in depths
            for start in range(0, depth, length)
        ]
        stretches += [one_pass[i] for i in order.permutation(len(one_pass))]
    for step in range(steps):
        chosen = stretches[step * per_step : (step + 1) * per_step]
        images = [case.images[start : start + length] for case, start in chosen]
        lengths = [len(some) for some in images]
        classes = torch.cat([case.classes[start : start + length] for case, start in chosen])
        joined = torch.cat(images).float()
        if cfg.augment:
            joined, classes = augment(joined, classes, lengths, stream(cfg.seed, epoch, step, 1))
        yield joined, classes.long(), lengths


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


@torch.no_grad()
def predict(model: SliceUNet, case: Case, cfg: Config, native: bool) -> Tensor:
    """Classes of a whole volume, uint8 on the CPU: [D, H, W] on the file's grid, or [D, S, S] at working resolution.

    Slides over the slices; with f_inter the stretches overlap by half and their probabilities are averaged.
    Probabilities, not classes, are resampled to the file's grid.
    """
    model.eval()
    device = next(model.parameters()).device
    precision = Precision(cfg.precision, device)
    length, hop = (cfg.inter_slices, max(1, cfg.inter_slices // 2)) if cfg.f_inter else (cfg.batch_size,) * 2
    depth = len(case.images)
    starts = sorted({min(start, max(0, depth - length)) for start in range(0, depth, hop)})
    probabilities, seen = None, torch.zeros(depth, 1, 1, 1)
    for start in starts:
        part = slice(start, start + length)
        images = case.images[part].float().to(device)
        with precision.autocast():
            logits = model(images, [len(images)])
        softmax = logits.float().softmax(dim=1).cpu()
        if probabilities is None:
            probabilities = torch.zeros(depth, *softmax.shape[1:])
        probabilities[part] += softmax
        seen[part] += 1
    probabilities /= seen
    if not native:
        return probabilities.argmax(1).to(torch.uint8)
    size = case.pair.shape[1:]
    inside = probabilities[:, :, case.content[0], case.content[1]]
    resized = (F.interpolate(one[None], size, mode="bilinear", antialias=True).argmax(1) for one in inside)
    return torch.cat(list(resized)).to(torch.uint8)


def validate(model: SliceUNet, cases: list[Case], task: Task, cfg: Config) -> float:
    """Mean Dice over structures, of means over the volumes, at working resolution."""
    found: dict[str, list[float]] = {name: [] for name in task.structures}
    for case in cases:
        prediction = predict(model, case, cfg, native=False)
        for name, members in task.members.items():
            p, r = (torch.isin(volume, volume.new_tensor(members)) for volume in (prediction, case.classes))
            found[name].append(metrics.dice(p, r))
    return float(np.nanmean([np.nanmean(values) for values in found.values() if not np.isnan(values).all()]))


def draw(case: Case, prediction: np.ndarray, reference: np.ndarray, path: Path) -> None:
    """PNG of the slice with most labelled pixels: outlines of the reference on the left, of the prediction right."""
    colours = np.array([[0, 0, 0], [230, 70, 60], [70, 190, 90], [80, 130, 255], [240, 190, 40], [200, 90, 220]])
    chosen = int((reference > 0).sum(axis=(1, 2)).argmax())
    grey = normalise(read_image(case.pair)[0, chosen], None)
    panels = []
    for classes in (reference[chosen], prediction[chosen]):
        padded = np.pad(classes, 1, mode="edge")
        neighbours = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
        outline = (classes > 0) & np.any([classes != other for other in neighbours], axis=0)
        rgb = np.repeat((grey * 255).astype(np.uint8)[:, :, None], 3, axis=2)
        rgb[outline] = colours[1 + (classes[outline] - 1) % (len(colours) - 1)]
        panels.append(rgb)
    picture = Image.fromarray(np.concatenate(panels, axis=1))
    factor = max(1, round(256 / picture.height))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)


def write_cases(scores: dict[str, dict[str, dict[str, float]]], pairs: dict[str, Pair], path: Path) -> None:
    """One line per test case and structure."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "patient", "structure", *metrics.METRICS])
        for case, by_structure in scores.items():
            for structure, values in by_structure.items():
                table.writerow([case, pairs[case].patient, structure, *(f"{values[m]:.6g}" for m in metrics.METRICS)])


def _check_structures(task: Task, train: list[Case], validation: list[Case]) -> None:
    """Say which structures no labelled volume shows; refuse validation cases that show none at all."""

    def shown(cases: list[Case]) -> set[int]:
        return {int(number) for case in cases for number in case.classes.unique()}

    in_train = shown(train)
    for name, members in task.members.items():
        if not in_train & set(members):
            print(f"warning: no labelled volume shows {name}; it cannot be learnt", flush=True)
    if shown(validation) == {0}:
        raise UserError("split: the validation volumes show no structure, so no epoch can be chosen by them")


if __name__ == "__main__":
    options.main(main, Config, __doc__)
