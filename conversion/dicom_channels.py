"""Which frames of a DICOM series are one volume: by their positions, then by what is one for each channel."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from conversion.dicom_frames import Frame, b_value
from conversion.dicom_header import image_type, numbers, value
from conversion.dicom_pixels import intensities
from conversion.volume import BadFile

SLICE_TOLERANCE = 0.1  # slice distances may differ from their median by this share of it
SAME_POSITION_MM = 0.02  # at most, and at most a tenth of a pixel, as of microscopes
SAME_NUMBER = 0.01  # echo times and b-values of one channel may differ by this share


def _of(sequence: str, name: str, own_name: str = "") -> Callable[[Frame], tuple[Any, ...]]:
    return lambda frame: numbers(value(frame.header, frame.index, sequence, name, own_name))


def _vector(name: str) -> Callable[[Frame], tuple[Any, ...]]:
    """Of a gamma camera's frame, the number that a vector gives it."""
    return lambda frame: numbers(frame.header.get(name))[frame.index : frame.index + 1]


def _type(frame: Frame) -> tuple[str, ...]:
    for kind in ("MRImageFrameType", "CTImageFrameType", "PETFrameType"):
        if found := value(frame.header, frame.index, f"{kind}Sequence", "FrameType"):
            return tuple(map(str, found))
    return image_type(frame.header)


def _direction(frame: Frame) -> tuple[float, ...]:
    """Of the diffusion gradient."""
    of_frame, own = "DiffusionGradientDirectionSequence", "DiffusionGradientOrientation"
    found = value(frame.header, frame.index, "MRDiffusionSequence", of_frame, own)
    return numbers(found[0].get(own) if found and hasattr(found[0], "get") else found)


# What may be one for each channel; channels are numbered in the order of the first of these that tells them apart.
TELLS_APART: dict[str, Callable[[Frame], tuple[Any, ...]]] = {
    "TemporalPositionIdentifier": _of("FrameContentSequence", "TemporalPositionIndex", "TemporalPositionIdentifier"),
    "RRIntervalVector": _vector("RRIntervalVector"),
    "TimeSlotVector": _vector("TimeSlotVector"),
    "EnergyWindowVector": _vector("EnergyWindowVector"),
    "EchoTime": _of("MREchoSequence", "EffectiveEchoTime", "EchoTime"),
    "b-value": b_value,
    "DiffusionGradientOrientation": _direction,
    "ImageType": _type,
    "TriggerTime": _of("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "TriggerTime"),
    "AcquisitionNumber": _of("FrameContentSequence", "FrameAcquisitionNumber", "AcquisitionNumber"),
}
MUST_AGREE = ("EchoTime", "b-value", "ImageType")  # along a channel


def _place(frame: Frame) -> tuple[Any, ...]:
    """Where a frame stands among those that were exported, at least from slice to slice."""
    times = (str(frame.header.get(name) or "") for name in ("AcquisitionTime", "ContentTime"))
    return (numbers(frame.header.get("InstanceNumber")), *times)


def channels_of(frames: Sequence[Frame]) -> tuple[list[list[Frame]], list[str]]:
    """(the frames of each channel in the order of their positions, notes).

    Raises BadFile where positions hold different numbers of frames, or a channel would mix what must agree.
    """
    groups, notes = _without_copies(_at_positions(frames))
    uneven, beside = len(set(map(len, groups))) > 1, _beside(groups)
    odd = uneven or beside or not is_regular([group[0] for group in groups])
    if odd and (channels := _shifted(frames)):
        return channels, [*notes, f"its channels lie up to {np.linalg.norm(shift_mm(channels)):.2f} mm from the first"]
    if uneven:
        raise BadFile(_what_is_uneven(groups))
    if beside:
        raise BadFile(f"holds slices that lie beside each other, {beside:.2f} mm apart; convert each by themselves")
    channels = [list(channel) for channel in zip(*_in_order(groups), strict=True)]
    for channel in channels:
        _require_one_kind(channel, MUST_AGREE if len(channels) > 1 else MUST_AGREE[:2])
    return channels, notes


def along(frames: Sequence[Frame]) -> np.ndarray:
    """[n] mm of each frame along the normal of the first."""
    return np.array([frame.position for frame in frames]) @ frames[0].normal


def is_regular(frames: Sequence[Frame]) -> bool:
    distances = np.diff(along(frames))
    return len(distances) == 0 or float(np.ptp(distances)) <= 2 * SLICE_TOLERANCE * float(np.median(distances))


def _at_positions(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The frames at each position, from the first to the last."""
    places = along(frames)
    groups: list[list[Frame]] = []
    last, tolerance = -np.inf, min(SAME_POSITION_MM, min(frames[0].pixel_spacing) / 10)
    for i in np.argsort(places, kind="stable").tolist():
        if places[i] - last > tolerance:
            groups.append([])
        groups[-1].append(frames[i])
        last = places[i]
    return groups


def _without_copies(groups: list[list[Frame]]) -> tuple[list[list[Frame]], list[str]]:
    """(groups, notes) without frames whose pixels are those of another at their position.

    Looked for where a SOPInstanceUID comes twice, and where some positions hold more frames than most.
    """
    usual, copies, result = _usual(groups), 0, []
    if usual == 1 and len(groups) == sum(map(len, groups)):
        return groups, []
    for group in groups:
        names = [str(frame.header.get("SOPInstanceUID")) + f" {frame.index}" for frame in group]
        kept: dict[Any, Frame] = {}
        for frame, name in zip(group, names, strict=True):
            alone = len(group) == usual and names.count(name) == 1
            kept.setdefault(name if alone else _content(frame), frame)
        copies += len(group) - len(kept)
        result.append(list(kept.values()))
    return result, [f"{copies} slices are there twice and count once"] if copies else []


def _content(frame: Frame) -> tuple[Any, ...]:
    pixels, _ = intensities([frame.path])
    array = pixels[frame.path][frame.index]
    return array.dtype.str, array.shape, array.tobytes(), *(TELLS_APART[name](frame) for name in MUST_AGREE)


def _usual(groups: list[list[Frame]]) -> int:
    return Counter(map(len, groups)).most_common(1)[0][0]


def _what_is_uneven(groups: list[list[Frame]]) -> str:
    usual = _usual(groups)
    odd = [group for group in groups if len(group) != usual]
    names = ", ".join(dict.fromkeys(frame.path.name for frame in odd[0][:4]))
    return (
        f"{len(odd)} of {len(groups)} slice positions hold another number of slices than the {usual} of the others, "
        f"the first of them {len(odd[0])} ({names}); move away the surplus slices, or copy the missing ones"
    )


def _beside(groups: list[list[Frame]]) -> float:
    """Millimetres between frames at one position, within their plane; 0 if less than half a pixel."""
    several = [[frame.position for frame in group] for group in groups if len(group) > 1]
    widest = max((float(np.ptp(positions, axis=0).max()) for positions in several), default=0.0)
    return widest if widest > min(groups[0][0].pixel_spacing) / 2 else 0.0


def _shifted(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Channels of their own positions, told apart by one value, or by where their export begins anew; [] without."""
    for tells in (*([tell(frame) for frame in frames] for tell in TELLS_APART.values()), _runs(frames)):
        parts: dict[Any, list[Frame]] = defaultdict(list)
        for frame, tell in zip(frames, tells, strict=True):
            parts[tell].append(frame)
        groups = [_at_positions(parts[key]) for key in sorted(parts)]
        channels = [[frame for group in part for frame in group] for part in groups]
        lengths = {len(channel) for channel in channels} | {len(part) for part in groups}
        if len(channels) > 1 and len(lengths) == 1 and lengths != {1} and all(map(is_regular, channels)):
            distances = [float(np.median(np.diff(along(channel)))) for channel in channels]
            if np.allclose(distances, distances[0], rtol=SLICE_TOLERANCE):
                for channel in channels:
                    _require_one_kind(channel, MUST_AGREE)
                return channels
    return []


def _runs(frames: Sequence[Frame]) -> list[int]:
    """For each frame how often, in the order of export, the positions had begun anew."""
    order = sorted(range(len(frames)), key=lambda i: (*_place(frames[i]), frames[i].index))
    steps = np.diff(along(frames)[order])
    runs = np.concatenate([[0], np.cumsum(steps * np.sign(np.median(steps)) < 0)])
    return runs[np.argsort(order)].tolist()


def shift_mm(channels: Sequence[Sequence[Frame]]) -> np.ndarray:
    """[3] how far, at most, channels lie from the first, along slices, rows and columns."""
    first = channels[0][0]
    axes = np.array([first.normal, first.orientation[1], first.orientation[0]])
    moved = [axes @ (channel[0].position - first.position) for channel in channels]
    return np.abs(moved).max(axis=0)


def _in_order(groups: list[list[Frame]]) -> list[list[Frame]]:
    """Each group in the order of its channels: by what all groups have in common, then as they were exported."""
    if len(groups[0]) == 1:
        return groups
    common = [tell for tell in TELLS_APART.values() if len({tuple(sorted(map(tell, group))) for group in groups}) == 1]

    def order(frame: Frame) -> tuple[Any, ...]:
        return (*(tell(frame) for tell in common), *_place(frame))

    result = []
    for group in groups:
        orders = [(*order(frame), frame.index) for frame in group]
        if len(set(orders)) < len(orders):
            names = ", ".join(frame.path.name for frame in group[:4])
            raise BadFile(f"no header tells the slices at one position apart ({names}); convert each volume alone")
        result.append([frame for _, frame in sorted(zip(orders, group, strict=True), key=lambda pair: pair[0])])
    return result


def _require_one_kind(channel: Sequence[Frame], names: Sequence[str]) -> None:
    for name in names:
        tell = TELLS_APART[name]
        first = tell(channel[0])
        for frame in channel:
            found = tell(frame)
            numeric = len(found) == len(first) and name != "ImageType"
            if found != first and not (numeric and np.allclose(found, first, rtol=SAME_NUMBER, atol=0)):
                said = (" x ".join(map(str, kind)) or "none" for kind in (first, found))
                raise BadFile(
                    f"{name} differs within one volume ({' and '.join(said)}, {channel[0].path.name} and "
                    f"{frame.path.name}); convert the slices of each by themselves"
                )
