"""What the diagnostics measure, that nothing changes it, and that the warnings come when they should and only then."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from sklearn.metrics import normalized_mutual_info_score
from tiny import losses, run, unit

from objectives.diagnostics import Diagnostics, neighbour_vote, normalized_mutual_information, rankme
from training import monitor
from training.monitor import Level, Monitor, dominating
from utils.distributed import rank, world_size

pytestmark = pytest.mark.usefixtures("one_thread")
PHANTOMS = Path(__file__).resolve().parents[1] / "Training_Data"
CPU = torch.device("cpu")


# ---- the quantities


def test_nmi_is_scikit_learns():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 7, 300)
    b = np.where(rng.random(300) < 0.5, a, rng.integers(0, 7, 300))
    expected = normalized_mutual_info_score(a, b)
    assert normalized_mutual_information(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, abs=1e-9)
    a[:100], b[50:150] = -1, -1  # not seen in one of the epochs
    expected = normalized_mutual_info_score(a[150:], b[150:])
    assert normalized_mutual_information(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, abs=1e-9)


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(5)) == pytest.approx(5, rel=1e-4)
    assert rankme(torch.ones(7, 3)) == pytest.approx(1, abs=1e-4)
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    singular = torch.tensor([3.0, 1.0], dtype=torch.float64)
    z = q[:, :2] @ torch.diag(singular) @ q[:2, :]  # shares 3/4 and 1/4
    assert rankme(z) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-4)
    assert rankme(z.T) == pytest.approx(rankme(z))
    assert math.isnan(rankme(torch.ones(1, 3)))


def test_the_vote_leaves_the_sample_itself_out():
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 0.05])
    z = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    # The last one lies among the first three and gets their label; all others have two of their own beside them.
    assert neighbour_vote(z, labels, k=3) == pytest.approx(6 / 7)
    for few, says in ((z, None), (z, labels * 0), (z[:3], labels[:3])):
        assert math.isnan(neighbour_vote(few, says, k=3))


# ---- the observer

ORIGINS = ["a"] * 12 + ["b"] * 18
SAMPLES, K, DIM, STEPS = 30, 4, 8, 4


def observe(observer: Diagnostics, epoch: int, steps: range = range(STEPS), broken: bool = False) -> None:
    """Joint batches of 7 samples, drawn with repetitions, of which processes hold unequal shares."""
    for step in steps:
        rng = np.random.default_rng((epoch, step))
        index = torch.from_numpy(rng.integers(0, SAMPLES - 1, 7))
        z = F.normalize(torch.from_numpy(rng.standard_normal((2, 7, DIM)).astype(np.float32)), dim=-1)
        codes = torch.from_numpy(rng.dirichlet(np.ones(K), 7).astype(np.float32))
        if broken:
            z[1, 3], index[3] = torch.nan, 29
        scores = z @ unit(K, DIM).T
        counts = [7] if world_size() == 1 else [4, 3]
        mine = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
        observer(z[:, mine], scores[:, mine], index[mine], counts, codes[mine])


def new_observer() -> Diagnostics:
    return Diagnostics(SAMPLES, K, DIM, 0.1, CPU, ORIGINS)


def two_epochs() -> list[dict[str, float]]:
    observer = new_observer()
    figures = []
    for epoch in range(2):
        observe(observer, epoch)
        figures.append(observer.finish())
    return figures


def interrupted(states: list | None = None) -> dict | list:
    """The second epoch up to its second step, or from there on."""
    observer = new_observer()
    if states is None:
        observe(observer, 0)
        observer.finish()
        observe(observer, 1, range(2))
        return observer.state()
    observer.load(states[0])
    observe(observer, 1, range(2, STEPS))
    return observer.finish()


def same(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5, nan_ok=True) for k in a)


@pytest.mark.slow
def test_two_processes_measure_what_one_does():
    one = two_epochs()
    for figures in run_processes(2, two_epochs):
        assert all(same(a, b) for a, b in zip(figures, one, strict=True))
    assert not math.isnan(one[1]["nmi"])
    assert math.isnan(one[0]["nmi"])


@pytest.mark.slow
def test_an_interrupted_epoch_measures_the_same_whatever_the_processes():
    whole = two_epochs()[1]
    assert interrupted([interrupted()]) == whole  # exactly
    joint = run_processes(2, interrupted)
    assert same(interrupted(joint), whole)
    for figures in run_processes(2, interrupted, [interrupted()]):
        assert same(figures, whole)


def test_figures_of_a_step_worked_by_hand():
    observer = Diagnostics(4, 2, 2, 1.0, CPU, ["a", "a", "b", "b"])
    z = torch.tensor([[[1.0, 0], [1, 0], [0, 1]], [[1, 0], [0, 1], [0, 1]]])  # prototypes: the axes
    observer(z, z, torch.tensor([0, 1, 3]), codes=torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]]))
    p = math.e / (1 + math.e)
    figures = observer.finish()
    expected = {
        "usage": 1.0,  # views in 0, 0, 1 and 0, 1, 1: three each
        "dead": 0.0,
        "target_entropy": 1 / 3,
        "prediction_entropy": -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2),
        "agreement": 2 / 3,
        "positives": 1 / 3,
        "std": math.sqrt(2 / 9) * math.sqrt(2),
        "origin_chance": 2 / 3,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert math.isnan(figures["origin"])  # fewer samples than neighbours
    assert all(math.isnan(value) for name, value in observer.finish().items() if name != "nmi")  # nothing was seen


def test_a_sample_that_is_not_finite_leaves_no_trace():
    observer = new_observer()
    observe(observer, 0, broken=True)
    seen = observer.latest[:-1] >= 0
    figures = observer.finish()
    assert all(math.isfinite(v) for name, v in figures.items() if name != "nmi")
    assert not seen[29]


# ---- warnings

LEVEL = {"name": "intra", "prototypes": 10, "chance": math.log(10), "batch": 8, "queue": 16, "samples": 40}
FINE = {"usage": 0.6, "dead": 1.0, "target_entropy": 0.5, "std": 0.6, "rank": 8.0}
FEW = {"usage": 0.089, "dead": 40.0}


def warned(epochs: list[tuple[float, dict[str, float]]], **changes) -> list[list[str]]:
    """Conditions that are reported after each epoch of (loss, figures that differ from FINE)."""
    config = SimpleNamespace(warmup_epochs=0, freeze_prototypes_niters=0)
    batches = SimpleNamespace(quotas=[3, 2], members=[[0], [3]])
    loader = SimpleNamespace(steps=200, batches=batches, dataset=SimpleNamespace(groups=["a"] * 3 + ["b"] * 2))
    learner = SimpleNamespace(objectives=lambda: iter(()), observe=lambda _: None, stage=1)
    monitor = Monitor(learner, loader, config, CPU)
    monitor.levels = {"intra": Level(**(LEVEL | {"swav": True, "ending": ""} | changes))}
    monitor.observers = {"intra": Mock(finish=Mock(side_effect=[FINE | figures for _, figures in epochs]))}
    return [[name for name, _ in monitor.finish(e, {"loss": loss})[1]] for e, (loss, _) in enumerate(epochs)]


def test_a_condition_is_reported_once_until_it_clears():
    collapsed = {"std": 0.01, "rank": 1.0}
    epochs = [(1.0, figures) for figures in ({}, collapsed, collapsed, collapsed, {}, collapsed, collapsed)]
    assert warned(epochs) == [[], [], ["intra_collapse"], [], [], [], ["intra_collapse"]]


@pytest.mark.parametrize(
    ("expected", "epochs", "changes"),
    [
        ([], [(1.5, {})] * 4, {}),
        (["intra_chance"], [(2.29, {})] * 3, {}),
        ([], [(2.26, {})] * 3, {}),  # 2 % below ln 10 = 2.303
        (["intra_collapse"], [(1.5, {"usage": 0.11})] * 3, {}),
        (["intra_collapse"], [(1.5, {"rank": 93.0})] + [(1.5, FEW)] * 3, {"prototypes": 52}),
        ([], [(1.5, {"usage": 0.11, "dead": 39.0})] * 4, {"prototypes": 52}),
        (["intra_dead"], [(1.5, {"usage": 0.11, "dead": 40.0})] * 4, {"prototypes": 52}),
        (["intra_few"], [(1.5, {})], {"queue": 0, "prototypes": 65}),
        ([], [(1.5, {})], {"queue": 0, "prototypes": 64}),
        (["intra_stale"], [(1.5, {})], {"queue": 81}),
        (["intra_jump"], [(1.0, {}), (1.5, {})], {}),
        ([], [(1.5, {"std": math.nan, "rank": math.nan, "usage": math.nan, "target_entropy": math.nan})] * 3, {}),
    ],
)
def test_each_condition_has_its_threshold(expected, epochs, changes):
    assert [name for names in warned(epochs, **changes) for name in names] == expected


def test_a_data_set_that_dominates_is_named():
    batches = SimpleNamespace(quotas=[1, 19], members=[[0], list(range(1, 20))])
    loader = SimpleNamespace(batches=batches, dataset=SimpleNamespace(groups=["small"] + ["large"] * 19))
    assert "data set large gives 95% of the samples" in dominating(loader)["dominating"]
    batches.quotas = [2, 18]
    assert dominating(loader) == {}


def train(out: Path, **changes) -> tuple[list[str], list[dict[str, str]]]:
    """Stage 1 on the phantoms: reported conditions, rows of metrics.csv."""
    small = {"size_crops": [24], "nmb_crops": [2], "min_scale_crops": [0.25], "max_scale_crops": [1.0]}
    small |= {"slices_per_volume": 3, "batch_size": 16, "hidden_mlp": 128, "feat_dim": 32}
    few = {"epochs": 8, "warmup_epochs": 1, "freeze_prototypes_niters": 0, "cache_path": str(out / "cache")}
    run("ssl_swav2D", PHANTOMS, out, **(small | few | changes))
    folder = out / "runs" / "ssl_swav2D"
    warnings = folder / "warnings.csv"
    return pd.read_csv(warnings).condition.tolist() if warnings.exists() else [], losses(folder)


@pytest.mark.slow
def test_a_run_that_collapses_says_so_and_a_healthy_one_is_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "SETTLING_STEPS", 26)  # so that seconds are enough
    monkeypatch.setattr(monitor, "TRANSIENT_STEPS", 12)
    found, rows = train(tmp_path / "collapsing", base_lr=5, epsilon=1.0)  # uniform targets, and a rate that is too high
    assert {"intra_collapse", "intra_chance"} == set(found)
    assert "lower --epsilon" in capsys.readouterr().out
    assert float(rows[-1]["intra_std"]) < 0.1
    found, rows = train(tmp_path / "healthy", base_lr=1)
    assert found == []
    assert float(rows[-1]["intra_std"]) > 0.12
    assert "warning" not in capsys.readouterr().out
