"""What a run costs: found for known costs, said by the scripts, and nothing touched."""

from __future__ import annotations

import pytest
from tiny import options

import mask_swav
import ssl_deepcluster3D
import ssl_swav3D
from training import cost
from training.cost import GIB
from training.train import Training
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("each", "most", "breaks", "largest"),
    [(3.0, 1000, 1000, 2), (0.11, 1000, 1000, 71), (9.0, 1000, 1000, 0), (0.11, 37, 1000, 37), (0.11, 1000, 50, 49)],
)
def test_the_largest_batch_is_found_in_few_probes_and_none_is_much_larger(each, most, breaks, largest):
    tried = []

    def probe(batch: int) -> int | None:
        tried.append(batch)
        return round((0.1 + each * batch) * GIB) if batch < breaks else None

    assert cost.search(probe, 8 * GIB, most)[0] == largest
    assert len(tried) <= 14
    assert max(tried) <= 2 * max(1, largest)


def test_a_script_says_what_fits_or_what_to_do_and_stops(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "measure", lambda _, config, free: round((1 + 0.5 * config.batch_size) * GIB))
    monkeypatch.setattr(cost, "free_memory", lambda device: 100 * GIB)
    cfg = ssl_swav3D.Config(**options("ssl_swav3D", data, tmp_path, fit_batch=4.0))
    ssl_swav3D.main(cfg)
    assert "fit_batch: --batch_size 6 needs 4.00 of 4 GiB" in capsys.readouterr().out
    cfg.fit_batch = 1.0
    with pytest.raises(UserError, match=r"not even one sample fits.*recompute"):
        ssl_swav3D.main(cfg)
    assert not list(tmp_path.iterdir())  # no run folder, no weights


@pytest.mark.slow
def test_a_real_step_needs_its_weights_gradients_and_momenta_and_leaves_no_trace(data, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*") if ".cache" not in p.parts}
    cfg = ssl_deepcluster3D.Config(**options("ssl_deepcluster3D", data, tmp_path))
    assert 3 * 4 * 11e6 < cost.measure(Training, cfg) < 8 * GIB  # ResNet-18 has 11 million
    assert not list(tmp_path.iterdir())
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*") if ".cache" not in p.parts} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "changes"), [(ssl_deepcluster3D, {}), (mask_swav, {"cached_views": 1})], ids=["3D", "cached"]
)
def test_a_dry_run_says_what_a_run_costs_and_leaves_no_trace(script, changes, data, tmp_path, capsys):
    cfg = script.Config(**options(script.__name__, data, tmp_path, dry_run=2, **changes))
    script.main(cfg)
    table = capsys.readouterr().out.split("dry run: 2 updates")[1]
    for row in ("whole run", "an update", "wait for data", "peak memory", "cache", "checkpoints", "all-reduced"):
        assert row in table
    assert f"{cfg.epochs} epochs of 4 updates" in table
    assert not list(tmp_path.iterdir())
