"""Plotly figures as plain dictionaries. Colours of text and grid come from the page, which knows light from dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reporting.embed import Attention, Level, MaskedError, attention_over_slices
from reporting.runs import Run

Figure = dict[str, Any]  # title, note, alt, data, layout, height

# Okabe and Ito's colours, without black and yellow, which one of the two backgrounds would swallow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon", "triangle-down", "pentagon")
SCALE = "Cividis"  # reads the same to colour-blind eyes
DASHES = {"": "solid", "intra": "solid", "inter": "dash"}

# Name without its level -> title, how to read it. Columns that are not here are shown under their own name.
LOSSES = ("loss", "intra", "inter", "mask", "interpolation")
KNOWN = {
    "usage": ("Prototype usage", "perplexity of the assignments, as a share of the prototypes; 1: all used alike"),
    "dead": ("Dead prototypes", "prototypes that no sample was assigned to; lower is better"),
    "target_entropy": ("Entropy of the targets", "share of ln K; 0: hard, 1: every prototype alike"),
    "prediction_entropy": ("Entropy of the predictions", "share of ln K; at 1 the network says nothing"),
    "agreement": (
        "Agreement of two views",
        "share of samples whose views have the same prototype; dotted: of pairs of different samples",
    ),
    "nmi": ("Assignments kept since the last epoch", "normalised mutual information; 1: nothing moved"),
    "std": ("Spread of the embeddings", "standard deviation times √d; 1: the whole sphere, 0: collapsed"),
    "rank": ("Effective rank (RankMe)", "dimensions that the embeddings use; higher is better"),
    "origin": (
        "Nearest neighbours from the same data set",
        "share of 5-NN votes on the data set of origin that are right; dotted: the largest",
    ),
    "skill": ("Masked-prediction skill", "1 - error / error of interpolation; above 0: something was learned"),
    "lr": ("Learning rate", "at the end of the epoch"),
    "seconds": ("Time of an epoch", "seconds"),
    "samples_per_second": ("Throughput", "samples per second"),
    "data_wait": ("Waiting for data", "share of the time; above 0.1 more workers may help"),
    "peak_memory_mib": ("Peak memory", "MiB"),
    "bad_steps": ("Steps not applied", "per epoch; loss or gradient was not finite"),
}
ASIDE = {"origin_chance": "origin", "positives": "agreement"}  # what another column is to be compared with
LAST = ("lr", "seconds", "samples_per_second", "data_wait", "peak_memory_mib", "bad_steps")


def curves(runs: Sequence[Run]) -> list[tuple[str, list[Figure]]]:
    """(heading, figures): the losses, then every other column that the runs have, then what concerns the machine."""
    charts: dict[tuple[int, str], list[tuple[int, str]]] = {}  # (stage of a loss, name) -> run, column
    for r, run in enumerate(runs):
        for column in run.metrics:
            if column not in ("epoch", "intra_chance", "inter_chance"):  # ln K is drawn beside the loss
                charts.setdefault(_chart(run, column), []).append((r, column))
    groups: dict[str, list[Figure]] = {"Losses": [], "Diagnostics": [], "Schedule and machine": []}
    for (stage, name), columns in sorted(charts.items(), key=lambda item: (item[0][0], _place(item[0][1]))):
        machine = name in LAST or name.startswith("time_")
        heading = "Losses" if stage else "Schedule and machine" if machine else "Diagnostics"
        groups[heading].append(_curve(runs, stage, name, columns))
    return [(heading, figures) for heading, figures in groups.items() if figures]


def _chart(run: Run, column: str) -> tuple[int, str]:
    if column in LOSSES:  # those of other stages are other quantities
        masked = "loss" if run.stage == 2 else "mask"
        return int(run.stage), masked if column == "interpolation" else column
    for prefix in ("intra_", "inter_", "mask_"):
        column = column.removeprefix(prefix)
    return 0, ASIDE.get(column, column)


def _place(name: str) -> int:
    order = [*LOSSES, *KNOWN]
    return order.index(name) if name in order else len(LOSSES)


def _curve(runs: Sequence[Run], stage: int, name: str, columns: list[tuple[int, str]]) -> Figure:
    title, note = KNOWN.get(name, (name, ""))
    if stage:
        of = {"intra": "Loss of slices and images", "inter": "Loss of volumes", "mask": "Masked-slice error"}
        title = f"{of.get(name, 'Masked-slice error' if stage == 2 else 'Loss')} · stage {stage}"
        error = stage == 2 or name == "mask"
        note = "mean squared error; below interpolation something was learned" if error else "nats; at ln K nothing"
        note = "sum of the weighted parts" if stage == 3 and name == "loss" else note
        note = f"{note} was learned yet" if note.endswith("nothing") else note
    data = []
    for r, column in columns:
        run, level = runs[r], column.split("_")[0] if column.startswith(("intra_", "inter_")) else ""
        aside = column.endswith(("interpolation", *ASIDE))
        label = " · ".join(part for part in (run.name, level, column if aside else "") if part)
        line = {"color": _colour(r), "width": 2, "dash": "dot" if aside else DASHES[level]}
        # A line of one epoch would be invisible without its point.
        mode = "lines+markers" if len(run.metrics["epoch"]) <= 30 else "lines"
        data.append(_line(_plus_one(run.metrics["epoch"]), run.metrics[column], label, line, mode))
        if stage in (1, 3) and name != "mask" and (k := _ln_k(run, name)):
            ends = _plus_one([run.metrics["epoch"][0], run.metrics["epoch"][-1]])
            data.append(_line(ends, [k, k], f"{run.name} · ln K = {k:.2f}", line | {"dash": "dot", "width": 1.5}))
    seen = [(trace["name"], next((y for y in reversed(trace["y"]) if y is not None), None)) for trace in data]
    last = "; ".join(f"{label} {value:.4g}" for label, value in seen if value is not None)
    axis = {"type": "log"} if stage == 2 or name == "mask" else {"rangemode": "normal" if stage else "tozero"}
    layout = {"xaxis": {"title": {"text": "epoch"}, "nticks": 7}, "yaxis": axis, "hovermode": "x unified"}
    return _figure(title, note, f"{title} over the epochs. Last values: {last}.", data, layout, 280)


def _ln_k(run: Run, name: str) -> float | None:
    """What a network that knows nothing scores, mean over heads; None for the sum of stage 3 or without prototypes."""
    if run.stage == 3 and name == "loss":
        return None
    level = "intra" if name == "loss" else name
    if f"{level}_chance" in run.metrics:
        return run.metrics[f"{level}_chance"][-1]
    if run.state is None:
        return None
    heads = [len(value) for key, value in run.state["learner"].items() if key.startswith(f"{level}.prototypes.heads.")]
    return sum(map(math.log, heads)) / len(heads) if heads else None


def map_of(level: Level, places: np.ndarray, axes: str, thumbs: Sequence[str], datasets: Sequence[str]) -> Figure:
    """Every item a point, one colour and shape per data set; a click on the page shows the item."""
    data = []
    for d, dataset in enumerate(datasets):
        where = [i for i in range(len(level.items)) if level.dataset(i) == dataset]
        if where:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": _plain(dataset),
                    "meta": dataset,
                    "x": _numbers(places[where, 0]),
                    "y": _numbers(places[where, 1]),
                    "text": [_plain(level.label(i)) for i in where],
                    "customdata": [[thumbs[i], level.label(i)] for i in where],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"color": _colour(d), "symbol": SYMBOLS[d % len(SYMBOLS)], "size": 8, "opacity": 0.8},
                }
            )
    what = "Volumes" if level.name == "inter" else "Slices and images"
    axis = {"showticklabels": False, "zeroline": False}
    counts = ", ".join(f"{trace['meta']} {len(trace['x'])}" for trace in data)
    alt = f"{what} on a plane, coloured by data set: {counts}."
    layout = {"xaxis": axis, "yaxis": axis | {"scaleanchor": "x"}, "hovermode": "closest", "dragmode": "pan"}
    return _figure(f"{what}: {len(level.items)} points", axes, alt, data, layout, 460)


def attention_maps(seen: Attention) -> list[Figure]:
    """For every layer who reads whom, and where the sampled points have moved."""
    D = seen.item[2] - seen.item[1]
    slices = list(range(seen.item[1], seen.item[2]))
    figures = []
    for number, maps in enumerate(seen.maps, start=1):
        over = attention_over_slices(maps, D).numpy()
        trace = {
            "type": "heatmap",
            "x": slices,
            "y": slices,
            "z": [_numbers(100 * row) for row in over],
            "colorscale": SCALE,
            "zmin": 0,
            "hovertemplate": "slice %{y} reads slice %{x}: %{z:.1f} %<extra></extra>",
            "colorbar": {"title": {"text": "%"}, "thickness": 8, "xpad": 2},
        }
        layout = {
            "xaxis": {"title": {"text": "slice that is read"}, "constrain": "domain"},
            "yaxis": {"title": {"text": "slice that reads"}, "autorange": "reversed", "scaleanchor": "x"},
        }
        near = float(np.mean([over[i, max(0, i - 2) : i + 3].sum() for i in range(D)]))
        note = f"{near:.0%} goes to slices at most two away"
        alt = f"Attention of layer {number}: {note}."
        figures.append(_figure(f"Layer {number}: attention", note, alt, [trace], layout, 280))
    for number, maps in enumerate(seen.maps, start=1):
        positions = maps.positions[0]  # [G, n]
        stride = -(-D // positions.shape[1])
        centres = np.arange(positions.shape[1]) * stride + (stride - 1) / 2
        offsets = positions.numpy() - centres
        data = [
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"group {g + 1}",
                "x": _numbers(centres + seen.item[1]),
                "y": _numbers(row),
                "marker": {"color": _colour(g), "symbol": SYMBOLS[g % len(SYMBOLS)], "size": 7, "opacity": 0.85},
                "hovertemplate": "from slice %{x:.1f}: %{y:+.2f} slices<extra>%{fullData.name}</extra>",
            }
            for g, row in enumerate(offsets)
        ]
        layout = {
            "xaxis": {"title": {"text": "reference point, slice"}},
            "yaxis": {"title": {"text": "offset, slices"}, "zeroline": True},
            "showlegend": False,
        }
        size = float(np.abs(offsets).mean())
        note = f"{size:.1f} slices on average, at most {np.abs(offsets).max():.1f}"
        alt = f"Offsets of layer {number}: {note}."
        figures.append(_figure(f"Layer {number}: offsets", note, alt, data, layout, 240))
    return figures


def masked_error(error: MaskedError) -> Figure:
    slices = list(range(error.item[1], error.item[2]))
    data = [
        _line(slices, error.model, "transformer", {"color": COLOURS[0], "width": 2}),
        _line(slices, error.interpolation, "interpolation", {"color": COLOURS[1], "width": 2, "dash": "dash"}),
    ]
    model, guess = float(np.nanmean(error.model)), float(np.nanmean(error.interpolation))
    better = float(np.mean(error.model < error.interpolation))
    note = f"mean {model:.4g} against {guess:.4g}; better on {better:.0%} of the slices"
    layout = {
        "xaxis": {"title": {"text": "slice"}},
        "yaxis": {"title": {"text": "mean squared error, log"}, "type": "log"},
        "hovermode": "x unified",
    }
    alt = f"Masked-slice error of {error.sample.name}: {note}."
    return _figure(error.sample.name, note, alt, data, layout, 280)


def _line(
    x: Iterable[float], y: Iterable[float], name: str, line: dict[str, Any], mode: str = "lines"
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": _plain(name),
        "x": _numbers(x),
        "y": _numbers(y),
        "line": line,
        "marker": {"size": 5},
        "hovertemplate": "%{y:.5g}",
    }


def _figure(title: str, note: str, alt: str, data: list[Any], layout: dict[str, Any], height: int) -> Figure:
    return {"title": title, "note": note, "alt": alt, "data": data, "layout": layout, "height": height}


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _plus_one(epochs: Sequence[float]) -> list[float]:
    """The table counts epochs from 0, what a run prints from 1."""
    return [epoch + 1 for epoch in epochs]


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Five digits are enough for the eye; JSON has neither nan nor inf."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _plain(text: str) -> str:
    """Plotly reads some HTML in its texts; a file name is none."""
    return html.escape(text, quote=False)
