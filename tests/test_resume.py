"""A run killed anywhere, and one that goes on with another number of processes.

The same for signals is in test_signals.py; files that cannot be read or written are in test_checkpoint.py.
"""

from __future__ import annotations

import copy
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny import losses, options, run, stop_after
from trials import Trial

import mask_swav
from objectives import SwAV
from training.resume import check_same_run
from utils import checkpoint
from utils.config import to_dict
from utils.distributed import Run
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def chosen(script: str, data: Path, out: Path, **changes) -> dict:
    start = {"resnet_pretrained": "none"} | ({"trans_pretrained": "none"} if "3D" in script else {})
    return options(script, data, out, **(start | {"checkpoint_minutes": 0.001} | changes))


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "weights").glob("*.pth")}


@pytest.mark.parametrize(("script", "workers"), [("ssl_deepcluster2D", 1), ("ssl_swav3D", 0)])
def test_a_killed_run_ends_with_the_same_bytes(script, workers, data, tmp_path):
    whole = Trial(script, chosen(script, data, tmp_path / "whole"), tmp_path / "whole")
    assert whole.wait() == [0], whole.log()
    seconds = time.monotonic() - whole.began
    mine = chosen(script, data, tmp_path / "killed", workers=workers)
    killed = Trial(script, mine, tmp_path / "killed")
    time.sleep(random.Random(script).uniform(0.3, 0.9) * seconds)
    killed.send(signal.SIGKILL)
    assert killed.wait() in ([-9], [0])  # it may just have ended
    resumed = Trial(script, mine, tmp_path / "killed")
    assert resumed.wait() == [0], resumed.log()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "whole")) == 1 + ("3D" in script)
    assert losses(tmp_path / "killed" / "runs" / script) == losses(tmp_path / "whole" / "runs" / script)
    assert not list((tmp_path / "killed").rglob("*.tmp"))


# ---- another number of processes


def test_two_processes_go_on_where_one_stopped(data, tmp_path, monkeypatch):
    """With the same batch on each: the global batch doubles, the bank is dealt out anew, no sample comes twice."""
    script = "ssl_deepcluster3D"
    mine = chosen(script, data, tmp_path, batch_size=2, checkpoint_minutes=60)
    with monkeypatch.context() as patch:
        stop_after(5, patch)  # of 4 a epoch: 2 of 8 volumes of the second epoch are seen
        with pytest.raises(SystemExit):
            run(script, data, tmp_path, batch_size=2)
    folder = tmp_path / "runs" / script
    before = checkpoint.load(folder)
    assert (before["epoch"], before["seen"], before["processes"]) == (1, 2, 1)
    two = Trial(script, mine, tmp_path / "two", ranks=2)
    assert two.wait() == [0, 0], two.log(0) + two.log(1)
    assert "processes: 1 -> 2, global batch: 2 -> 4; the order of the samples goes on" in two.log()
    assert two.steps == [2, 2]  # 6 volumes that were left, at most 4 a step
    after = checkpoint.load(folder)
    assert after["memory"]["inter"]["embeddings"].shape == before["memory"]["inter"]["embeddings"].shape
    changed = (after["memory"]["inter"]["embeddings"] != before["memory"]["inter"]["embeddings"]).any(dim=2).all(dim=0)
    assert changed.sum() == 6  # exactly the volumes that the second epoch had not seen
    one = Trial(script, mine | {"epochs": 3}, tmp_path / "one")
    assert one.wait() == [0], one.log()
    assert "processes: 2 -> 1" in one.log()
    assert one.steps == [4]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ((4, 2), (4, 2), ""),
        ((4, 2), (4, 1), "processes: 2 -> 1, global batch: 8 -> 4"),
        ((4, 2), (8, 1), "processes: 2 -> 1, global batch: 8 -> 8"),
        ((4, 2), (2, 2), None),
        ((4, 2), (3, 1), None),
    ],
)
def test_which_batches_may_go_on(before, after, says, tmp_path):
    old, config = (mask_swav.Config(batch_size=size, epochs=3) for size, _ in (before, after))
    state = {"config": to_dict(old), "processes": before[1], "data": "x", "epoch": 1, "seen": 0}
    place = Run(0, after[1], torch.device("cpu"))
    if says is None:
        with pytest.raises(UserError, match=f"batch_size: {before[0]} -> {after[0]}"):
            check_same_run(state, config, place, "x", tmp_path)
    else:
        assert check_same_run(state, config, place, "x", tmp_path) == says


@pytest.mark.parametrize(("before", "after"), [(6, 6), (6, 4), (4, 6), (0, 4), (4, 0)])
def test_a_queue_of_another_length_keeps_its_newest_rows(before, after):
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(4, 2, 2, 3), dim=-1)  # steps, views, samples, d
    old, new = SwAV(3, [2], queue_length=before), SwAV(3, [2], queue_length=after)
    for part in z:
        old.begin_epoch(0)
        old(part)
    state = copy.deepcopy(old.state_dict())
    new.load_state_dict(state)
    assert state.keys() == old.state_dict().keys()
    kept = min(before, after)
    assert torch.equal(new.queue[:, :kept], old.queue[:, :kept])
    assert not new.queue[:, kept:].any()
    new.begin_epoch(0)
    for part in z:  # goes on, and is full after as many steps as the rows that it lacks take
        assert new(part).isfinite()
    assert after == 0 or new.queue[:, -1].any()


def test_the_newest_checkpoint_is_what_every_process_gets(tmp_path):
    from processes import run_processes

    for rank, (epoch, seen) in enumerate([(1, 4), (2, 0), (0, 8)]):  # of disks that the processes do not share
        state = {"learner": {"w": torch.full((3,), float(rank))}, "epoch": epoch, "seen": seen}
        checkpoint.save(state, tmp_path / str(rank))
    found = run_processes(3, load_own, str(tmp_path))
    assert [state["epoch"] for state in found] == [2, 2, 2]
    assert all(torch.equal(state["learner"]["w"], torch.ones(3)) for state in found)


def load_own(folder: str) -> dict:
    return checkpoint.load(Path(folder) / str(torch.distributed.get_rank()))
