"""What a run costs: found for known costs, said by the scripts, and nothing touched."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from tiny import options

from training import cost
from training.cost import GIB
from training.train import Training
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("base", "each"), [(1.0, 0.5), (0.2, 3.0), (6.0, 0.01), (0.0, 7.9), (1.0, 1.75), (9.0, 1.0)])
def test_the_largest_batch_of_a_known_cost_is_found_in_few_probes(base, each):
    tried = []
    largest, _ = cost.search(lambda b: tried.append(b) or round((base + each * b) * GIB), 8 * GIB, 10**6)
    assert largest == max(0, int((8 - base) / each))
    assert len(tried) <= 11
    assert max(tried) <= 2 * max(1, largest)


def test_what_the_line_does_not_foresee_is_found_too():
    def bent(batch: int) -> int:  # something doubles from a batch of 20 on
        return round(GIB * (1 + 0.1 * batch + (0.5 if batch >= 20 else 0)))

    assert cost.search(bent, 3.2 * GIB, 1000)[0] == 19
    assert cost.search(bent, 32 * GIB, 37)[0] == 37  # there are no more samples
    assert cost.search(lambda b: bent(b) if b < 80 else None, 32 * GIB, 1000)[0] == 79  # the machine has no more


def script_options(script: str, data: Path, out: Path, **changes):
    start = {"resnet_pretrained": "none"} | ({"trans_pretrained": "none"} if "3D" in script else {})
    module = importlib.import_module(script)
    return module, module.Config(**options(script, data, out, **(start | changes)))


def test_a_script_says_what_fits_or_what_to_do_and_stops(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "measure", lambda _, config, free: round((1 + 0.5 * config.batch_size) * GIB))
    monkeypatch.setattr(cost, "free_memory", lambda device: 100 * GIB)
    module, cfg = script_options("ssl_swav3D", data, tmp_path, fit_batch=4.0)
    module.main(cfg)
    assert "fit_batch: --batch_size 6 needs 4.00 of 4 GiB" in capsys.readouterr().out
    cfg.fit_batch = 1.0
    with pytest.raises(UserError, match=r"not even one sample fits.*recompute"):
        module.main(cfg)
    assert not list(tmp_path.iterdir())  # no run folder, no weights


@pytest.mark.slow
def test_a_real_step_needs_its_weights_gradients_and_momenta_and_leaves_no_trace(data, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*") if ".cache" not in p.parts}
    _, cfg = script_options("ssl_deepcluster3D", data, tmp_path)
    assert 3 * 4 * 11e6 < cost.measure(Training, cfg) < 8 * GIB  # ResNet-18 has 11 million
    assert not list(tmp_path.iterdir())
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*") if ".cache" not in p.parts} == before


@pytest.mark.slow
@pytest.mark.parametrize(("script", "changes"), [("ssl_deepcluster3D", {}), ("mask_swav", {"cached_views": 1})])
def test_a_dry_run_says_what_a_run_costs_and_leaves_no_trace(script, changes, data, tmp_path, capsys):
    module, cfg = script_options(script, data, tmp_path, dry_run=2, **changes)
    module.main(cfg)
    table = capsys.readouterr().out.split("dry run: 2 updates")[1]
    for row in ("whole run", "an update", "wait for data", "peak memory", "cache", "checkpoints", "all-reduced"):
        assert row in table
    assert f"{cfg.epochs} epochs of 4 updates" in table
    assert not list(tmp_path.iterdir())
