"""The largest batch that fits: found for known costs, said by the scripts, and nothing touched."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from tiny import options

from training import memory
from training.memory import GIB
from training.train import Training
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def costs(base: float, each: float, most: float = float("inf"), asked: list[int] | None = None):
    def probe(batch: int) -> int | None:
        if asked is not None:
            asked.append(batch)
        used = round((base + each * batch) * GIB)
        return None if used > most * GIB else used

    return probe


@pytest.mark.parametrize(("base", "each"), [(1.0, 0.5), (0.2, 3.0), (6.0, 0.01), (0.0, 7.9), (1.0, 1.75)])
def test_the_largest_batch_of_a_known_cost_is_found(base, each):
    fit = memory.search(costs(base, each), 8 * GIB, most=10**6, available=100 * GIB)
    assert fit.batch_size == int((8 - base) / each)
    assert fit.measured
    assert fit.points[fit.batch_size] <= 8 * GIB


def test_a_batch_that_costs_more_than_the_line_says_is_not_given():
    def bent(batch: int) -> int:  # something doubles from a batch of 20 on
        return round(GIB * (1 + 0.1 * batch + (0.5 if batch >= 20 else 0)))

    fit = memory.search(bent, 3.2 * GIB, most=1000, available=100 * GIB)
    assert fit.batch_size == 19
    assert fit.measured


def test_more_than_the_machine_has_is_extrapolated_and_never_run():
    asked: list[int] = []
    fit = memory.search(costs(1.0, 0.5, asked=asked), 80 * GIB, most=10**6, available=10 * GIB)
    assert (fit.batch_size, fit.measured) == (158, False)
    assert max(asked) * 0.5 + 1 < 10


def script_options(script: str, data: Path, out: Path, **changes):
    start = {"resnet_pretrained": "none"} | ({"trans_pretrained": "none"} if "3D" in script else {})
    module = importlib.import_module(script)
    return module, module.Config(**options(script, data, out, **(start | changes)))


@pytest.mark.parametrize("script", ["ssl_swav2D", "ssl_deepcluster2D", "mask_swav", "mask_deepcluster",
                                    "ssl_swav3D", "ssl_deepcluster3D"])  # fmt: skip
def test_every_script_says_it_and_stops(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "measure", lambda config, batch, free: costs(1.0, 0.5)(batch))
    module, cfg = script_options(script, data, tmp_path, fit_batch=4.0)
    module.main(cfg)
    assert "fit_batch: --batch_size 6 needs 4.00 of 4 GiB (measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # no run folder, no weights


def test_what_does_not_fit_is_an_error_with_a_remedy(data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda config, batch, free: costs(1.0, 0.5)(batch))
    module, cfg = script_options("ssl_swav3D", data, tmp_path, fit_batch=1.0)
    with pytest.raises(UserError, match=r"one sample needs 1\.50 GiB, more than 1; .*recompute"):
        module.main(cfg)


def test_a_real_step_needs_its_weights_gradients_and_momenta_and_leaves_no_trace(data, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    _, cfg = script_options("ssl_deepcluster3D", data, tmp_path, fit_batch=1.0)
    used = memory.measure(cfg, 2)
    assert 3 * 4 * 11e6 < used < 8 * GIB  # ResNet-18 has 11 million
    assert not list(tmp_path.iterdir())
    after = {p: p.stat().st_mtime_ns for p in data.rglob("*") if ".cache" not in p.parts}
    assert after == {p: t for p, t in before.items() if ".cache" not in p.parts}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_probe_makes_updates_as_training_does(accumulate, data, tmp_path, monkeypatch):
    """So an update that accumulates has room for the gradients of the batches before it."""
    seen = []
    monkeypatch.setattr(Training, "update", lambda self, batches, now, parts: seen.append((now, parts)))
    module, cfg = script_options("mask_swav", data, tmp_path, fit_batch=1.0, accumulate=accumulate)
    monkeypatch.setenv(memory.PROBE, "1")
    module.main(cfg)
    assert seen == [(step, accumulate) for step in range(memory.STEPS)]


@pytest.mark.parametrize(("script", "changes"), [("ssl_deepcluster3D", {}), ("mask_swav", {"cached_views": 1})])
def test_a_dry_run_says_what_a_run_costs_and_leaves_no_trace(script, changes, data, tmp_path, capsys):
    module, cfg = script_options(script, data, tmp_path, dry_run=2, **changes)
    module.main(cfg)
    table = capsys.readouterr().out.split("dry run: 2 updates")[1]
    for row in ("whole run", "an update", "wait for data", "peak memory", "cache", "checkpoints", "all-reduced"):
        assert row in table
    assert f"{cfg.epochs} epochs of 4 updates" in table
    assert not list(tmp_path.iterdir())
