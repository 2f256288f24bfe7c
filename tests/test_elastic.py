"""torchrun starts processes again after one was lost, and they go on from the last checkpoint by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import losses, options, run
from trials import Trial, arguments, read_steps, worker_of

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_lost_worker_is_started_again_and_the_run_ends_as_if_it_had_not_been(data, tmp_path):
    """One process, so that the weights can be compared bit for bit with those of an unlaunched run."""
    changes = {"resnet_pretrained": "none", "epochs": 6, "checkpoint_minutes": 0.001}  # every step is saved
    whole = run("mask_swav", data, tmp_path / "whole", **changes)
    args = arguments(options("mask_swav", data, tmp_path / "elastic", **changes))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-conf=last_call_timeout=1"]
    launch += ["-m", "trials", str(tmp_path / "steps"), "mask_swav", *args]
    steps = tmp_path / "steps.0"
    with open(tmp_path / "log.txt", "w") as log:
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        torchrun = subprocess.Popen(launch, cwd=ROOT, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 120
        while len(read_steps(steps)) < 6:
            assert time.monotonic() < until
            assert torchrun.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.02)
        os.kill(worker_of(torchrun), signal.SIGKILL)
        assert torchrun.wait(300) == 0, (tmp_path / "log.txt").read_text()
    finally:
        torchrun.kill()
    said = (tmp_path / "log.txt").read_text()
    assert said.count("continuing at epoch") == 1
    assert losses(tmp_path / "elastic" / "runs" / "mask_swav") == losses(tmp_path / "whole" / "runs" / "mask_swav")
    made = [(tmp_path / name / "weights" / "mask_swav.pth").read_bytes() for name in ("whole", "elastic")]
    assert made[0] == made[1]
    assert whole


def test_a_process_that_does_not_answer_ends_the_others_after_the_time_out(data, tmp_path):
    """As when its machine is cut off or hangs: no connection breaks."""
    args = options("mask_swav", data, tmp_path, resnet_pretrained="none", epochs=1000, batch_size=1)
    trial = Trial("mask_swav", args | {"timeout_minutes": 0.1}, tmp_path / "trial", ranks=2)
    until = time.monotonic() + 120
    while min(trial.steps) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    trial.send(signal.SIGSTOP, [1])
    stopped = time.monotonic()
    trial.processes[0].join(60)
    trial.send(signal.SIGKILL)
    assert trial.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - stopped > 5
    assert "Traceback" in trial.log()
