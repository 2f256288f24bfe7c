"""Plotly figures. Colours of text and grid come from the page, which knows light from dark."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from models.transformer import AttentionMaps
from reporting.embed import Item, Level, attention_over_slices
from reporting.runs import RunFolder

Figure = dict[str, Any]  # title, note, alt, plot (as plotly.js takes it)

# Okabe and Ito's colours, without black and yellow, which one of the two backgrounds would swallow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon", "triangle-down", "pentagon")
SCALE = "Cividis"  # reads the same to colour-blind eyes

# Heading -> name of a column without its level -> title, how to read it. Others are shown under their own name.
CHARTS = {
    "Losses": {
        "loss": ("Loss", "nats; at ln K nothing was learned yet"),
        "intra": ("Loss of slices and images", "nats; at ln K nothing was learned yet"),
        "inter": ("Loss of volumes", "nats; at ln K nothing was learned yet"),
        "mask": ("Masked-slice error", "mean squared error; below both dotted guesses something was learned"),
        "cluster": ("Cluster of masked slices", "cross-entropy in nats"),
        "position": ("Contrast of positions", "nats"),
        "recon": ("Restored pixels", "mean squared error of hidden ones, in deviations of intensity"),
    },
    "Diagnostics": {
        "usage": ("Prototype usage", "perplexity of the assignments, as a share of the prototypes; 1: all used alike"),
        "dead": ("Dead prototypes", "prototypes that no sample was assigned to; lower is better"),
        "target_entropy": ("Entropy of the targets", "share of ln K; 0: hard, 1: every prototype alike"),
        "prediction_entropy": ("Entropy of the predictions", "share of ln K; at 1 the network says nothing"),
        "agreement": ("Agreement of two views", "samples with one prototype in both; dotted: pairs of two samples"),
        "nmi": ("Assignments kept since the last epoch", "normalised mutual information; 1: nothing moved"),
        "std": ("Spread of the embeddings", "standard deviation times √d; 1: the whole sphere, 0: collapsed"),
        "rank": ("Effective rank (RankMe)", "dimensions that the embeddings use; higher is better"),
        "origin": ("Neighbours from the same data set", "share of 5-NN votes that are right; dotted: the largest set"),
        "skill": ("Masked-prediction skill", "1 - error / that of the better guess; above 0: something was learned"),
    },
    "Schedule and machine": {
        "lr": ("Learning rate", "at the end of the epoch"),
        "seconds": ("Time of an epoch", "seconds"),
        "samples_per_second": ("Throughput", "samples per second"),
        "data_wait": ("Waiting for data", "share of the time; above 0.1 more workers may help"),
        "peak_memory_mib": ("Peak memory", "MiB"),
        "bad_steps": ("Skipped updates", "per epoch; loss or gradient was not finite"),
    },
}
# Dotted, in the chart of the column with which it is to be compared.
REFERENCES = {"interpolation": "mask", "average": "mask", "origin_chance": "origin", "positives": "agreement"}
FEW_EPOCHS = 30  # up to which points are drawn as well: a line of one epoch would be invisible


def curves(runs: Sequence[RunFolder]) -> list[tuple[str, list[Figure]]]:
    """(heading, figures): the losses, then every other column that the runs have, then what concerns the machine."""
    charts: dict[tuple[str, int, str], list[pd.DataFrame]] = {}  # heading, stage of a loss or 0, name -> lines
    for place, run in enumerate(runs):
        for column in run.metrics.columns.drop("epoch"):
            chart, line, dash = _place(column, run.stage)
            if line == "ln K":
                line = f"ln K = {run.metrics[column].iloc[-1]:.2f}"
            rows = run.metrics[["epoch"]] + 1  # counted from 1, as a run prints them
            rows["value"] = run.metrics[column]
            rows["line"] = html.escape(" · ".join(filter(None, (run.name, line))), quote=False)
            rows["colour"], rows["dash"] = COLOURS[place % len(COLOURS)], dash
            charts.setdefault(chart, []).append(rows)
    groups: dict[str, list[Figure]] = {heading: [] for heading in CHARTS}
    order = [name for known in CHARTS.values() for name in known]
    for chart in sorted(charts, key=lambda chart: (chart[1], [*order, chart[2]].index(chart[2]))):
        groups[chart[0]].append(_curve(*chart, pd.concat(charts[chart])))
    return [(heading, figures) for heading, figures in groups.items() if figures]


def _place(column: str, stage: int) -> tuple[tuple[str, int, str], str, str]:
    """Where a column is drawn: (heading, stage of a loss or 0, chart), what its line is called, its dash."""
    level, _, name = column.partition("_") if column.startswith(("intra_", "inter_", "mask_")) else ("", "", column)
    chart = REFERENCES.get(name, name)
    if name == "chance":  # the loss of guessing; the only loss of stage 1 is that of its slices and images
        chart = "loss" if stage == 1 else level
    machine = "Schedule and machine" if name.startswith("time_") else "Diagnostics"
    heading = next((heading for heading, known in CHARTS.items() if chart in known), machine)
    place = heading, stage if heading == "Losses" else 0, chart  # losses of other stages are other quantities
    if name == "chance" or name in REFERENCES:
        return place, "ln K" if name == "chance" else column, "dot"
    return place, level, "dash" if level == "inter" else "solid"


def _curve(heading: str, stage: int, name: str, rows: pd.DataFrame) -> Figure:
    title, note = CHARTS[heading].get(name, (name, ""))
    if stage:
        title = f"{title} · stage {stage}"
    if stage > 1 and name == "loss":
        note = "sum of the weighted parts"
    lines = rows.drop_duplicates("line").set_index("line")
    figure = px.line(
        rows,
        x="epoch",
        y="value",
        color="line",
        line_dash="line",
        color_discrete_map=lines["colour"].to_dict(),
        line_dash_map=lines["dash"].to_dict(),
        markers=rows["epoch"].nunique() <= FEW_EPOCHS,
        log_y=name == "mask",
    )
    figure.update_traces(hovertemplate="%{y:.5g}<extra>%{fullData.name}</extra>")
    figure.update_yaxes(title=None, rangemode="normal" if stage else "tozero")
    figure.update_xaxes(nticks=7)
    last = rows.dropna(subset="value").groupby("line", sort=False)["value"].last()
    said = "; ".join(f"{line} {value:.4g}" for line, value in last.items())
    alt = html.unescape(f"{title} over the epochs. Last values: {said}.")
    return _shown(figure, title, note, alt, hovermode="x unified")


def map_of(level: Level, places: np.ndarray, axes: str, thumbs: Sequence[str], names: Sequence[str]) -> Figure:
    """Every item a point, one colour and shape per data set; a click on the page shows the item."""
    table = pd.DataFrame({"x": places[:, 0], "y": places[:, 1], "thumb": thumbs, "data set": level.datasets})
    table["label"] = [item.label for item in level.items]
    order = [name for name in names if name in set(level.datasets)]
    figure = px.scatter(
        table,
        x="x",
        y="y",
        color="data set",
        symbol="data set",
        color_discrete_map={name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)},
        symbol_map={name: SYMBOLS[k % len(SYMBOLS)] for k, name in enumerate(names)},
        category_orders={"data set": order},
        custom_data=["thumb", "label"],
    )
    for trace in figure.data:  # plotly reads some HTML in its texts, and a file name is none
        texts = [html.escape(label, quote=False) for _, label in trace.customdata]
        trace.update(meta=trace.name, name=html.escape(trace.name, quote=False), text=texts, hovertemplate=None)
    figure.update_traces(hoverinfo="text", marker={"size": 8, "opacity": 0.8})
    figure.update_xaxes(title=None, showticklabels=False, zeroline=False)
    figure.update_yaxes(title=None, showticklabels=False, zeroline=False, scaleanchor="x")
    what = "Volumes" if level.name == "inter" else "Slices and images"
    counts = ", ".join(f"{name} {level.datasets.count(name)}" for name in order)
    alt = f"{what} on a plane, coloured by data set: {counts}."
    more = {"height": 460, "hovermode": "closest", "dragmode": "pan", "legend_y": -0.06}
    return _shown(figure, f"{what}: {len(level.items)} points", axes, alt, **more)


def attention_maps(item: Item, maps: Sequence[AttentionMaps]) -> list[Figure]:
    """For every layer who reads whom, then for every layer where the sampled points have moved."""
    layers = list(enumerate(maps, start=1))
    return [_attention(item, *layer) for layer in layers] + [_offsets(item, *layer) for layer in layers]


def _attention(item: Item, number: int, maps: AttentionMaps) -> Figure:
    over = attention_over_slices(maps, item.slices).numpy()
    slices = list(range(item.start, item.stop))
    figure = px.imshow(
        100 * over,
        x=slices,
        y=slices,
        zmin=0,
        color_continuous_scale=SCALE,
        labels={"x": "slice that is read", "y": "slice that reads", "color": "%"},
    )
    figure.update_traces(hovertemplate="slice %{y} reads slice %{x}: %{z:.1f} %<extra></extra>")
    figure.update_coloraxes(colorbar={"thickness": 8, "xpad": 2})
    near = float(np.mean([over[i, max(0, i - 2) : i + 3].sum() for i in range(item.slices)]))
    note = f"{near:.0%} goes to slices at most two away"
    return _shown(figure, f"Layer {number}: attention", note, f"Attention of layer {number}: {note}.")


def _offsets(item: Item, number: int, maps: AttentionMaps) -> Figure:
    positions = maps.positions[0].numpy()  # [G, n]
    groups, points = positions.shape
    stride = -(-item.slices // points)
    centres = np.arange(points) * stride + (stride - 1) / 2
    offsets = positions - centres
    names = [f"group {g + 1}" for g in range(groups)]
    figure = px.scatter(
        pd.DataFrame(offsets.T, index=centres + item.start, columns=names),
        symbol="variable",
        color_discrete_sequence=COLOURS,
        symbol_sequence=SYMBOLS,
        labels={"index": "reference point, slice", "value": "offset, slices"},
    )
    hover = "from slice %{x:.1f}: %{y:+.2f} slices<extra>%{fullData.name}</extra>"
    figure.update_traces(hovertemplate=hover, marker={"size": 7, "opacity": 0.85})
    note = f"{np.abs(offsets).mean():.1f} slices on average, at most {np.abs(offsets).max():.1f}"
    alt = f"Offsets of layer {number}: {note}."
    return _shown(figure, f"Layer {number}: offsets", note, alt, height=240, showlegend=False)


def masked_error(item: Item, errors: pd.DataFrame) -> Figure:
    """errors: as `Network.masked_errors` gives them."""
    figure = px.line(errors, x="slice", y=["transformer", "interpolation"], log_y=True, color_discrete_sequence=COLOURS)
    figure.update_traces(selector={"name": "interpolation"}, line_dash="dash")
    figure.update_traces(hovertemplate="%{y:.5g}<extra>%{fullData.name}</extra>")
    figure.update_yaxes(title="mean squared error, log")
    model, guess = errors["transformer"], errors["interpolation"]
    note = f"mean {model.mean():.4g} against {guess.mean():.4g}; better on {(model < guess).mean():.0%} of the slices"
    alt = f"Masked-slice error of {item.sample.name}: {note}."
    return _shown(figure, item.sample.name, note, alt, hovermode="x unified")


def _shown(figure: go.Figure, title: str, note: str, alt: str, height: int = 280, **layout: Any) -> Figure:
    """What the templates need of a figure, without Plotly's own look."""
    figure.update_layout(template=None, legend_title=None, margin=None, height=height, **layout)
    return {"title": title, "note": note, "alt": alt, "plot": json.loads(figure.to_json())}
