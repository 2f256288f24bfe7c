"""Signals end a run wherever it is: nothing lost, nothing torn; torchrun starts lost processes again, which go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import losses, options, run
from trials import Trial, arguments, count_steps, signalled, worker_of

import mask_swav
import ssl_deepcluster3D
from datasets.store import SliceStore
from objectives import deepcluster
from objectives.deepcluster import DeepClusterV2
from training import weights
from utils import checkpoint, config, locks, signals

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def main(script, args: dict) -> None:
    config.main(script.main, script.Config, None, arguments(args))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call", "where"),
    [
        (SliceStore, "build", 1, "building the cache"),
        (DeepClusterV2, "remember", 3, "filling the bank"),
        (deepcluster, "kmeans_torch", 3, "k-means of the second epoch"),
        (torch, "save", 1, "writing the first checkpoint"),
        (weights, "commit", 1, "after training"),
    ],
)
def test_a_signal_outside_of_steps_loses_and_tears_nothing(
    owner, name, call, where, whole, data, tmp_path, monkeypatch
):
    args = options("ssl_deepcluster3D", data, tmp_path, lambda_intra=0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled(getattr(owner, name), call))
        with pytest.raises(SystemExit) as stopped:
            main(ssl_deepcluster3D, args)
    assert stopped.value.code == 143, where
    assert not list(tmp_path.rglob("*.tmp"))
    for path in (tmp_path / "runs" / "ssl_deepcluster3D").glob("*.pth"):
        checkpoint.read(path)
    main(ssl_deepcluster3D, args)
    written = {p.name: p.read_bytes() for p in (tmp_path / "weights").glob("*.pth")}
    assert written == whole


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    """The weights of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(ssl_deepcluster3D, options("ssl_deepcluster3D", data, out, lambda_intra=0))
    torch.set_num_threads(threads)
    return {p.name: p.read_bytes() for p in (out / "weights").glob("*.pth")}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, [0, 1]), (signal.SIGTERM, [1])])
def test_all_processes_stop_together_after_the_same_step(number, ranks, data, tmp_path):
    args = options("mask_swav", data, tmp_path, epochs=1000, batch_size=1)
    trial = Trial("mask_swav", args, tmp_path / "trial", ranks=2)
    wait_until(lambda: min(trial.steps) >= 5)
    trial.send(number, ranks)
    assert trial.wait(60) == [128 + number] * 2, trial.log(0) + trial.log(1)
    state = checkpoint.load(tmp_path / "runs" / "mask_swav")
    steps = state["epoch"] * 4 + state["seen"] // 2
    assert trial.steps == [steps, steps]  # none lost
    assert f"stopped by signal {number} after epoch" in trial.log()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call"), [("objectives.deepcluster", "kmeans_torch", 3), ("datasets.store", "render", 2)]
)
def test_a_signal_to_one_process_where_nothing_is_saved_ends_all_in_order(owner, name, call, data, tmp_path):
    """In k-means, and while the cache is built: the process that is signalled does not leave alone."""
    changes = {"lambda_intra": 0, "batch_size": 1, "epochs": 1000, "cache_path": str(tmp_path / "cache")}
    args = options("ssl_deepcluster3D", data, tmp_path, **changes)
    trial = Trial("ssl_deepcluster3D", args, tmp_path / "trial", ranks=2, signal_in=(1, owner, name, call))
    assert trial.wait(120) == [143, 143], trial.log(0) + trial.log(1)
    assert "Traceback" not in trial.log(0) + trial.log(1)


def test_two_processes_obey_together_and_only_outside_of_what_must_not_be_torn():
    reached = []

    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        reached.append("not alone")
        with signals.noted():
            signals.obey_together([15, 0])
            reached.append("noted")
        signals.obey_together([0, 15])
        reached.append("obeyed")

    signals.together(True)
    with pytest.raises(SystemExit) as stopped, signals.handled():
        work()
    signals.together(False)
    assert (stopped.value.code, reached) == (143, ["not alone", "noted"])


def test_a_wait_for_data_that_never_come_ends_after_a_signal():
    def wait() -> None:
        with signals.patient(0.2):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(20)

    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped, signals.handled(), signals.noted():
        wait()
    assert stopped.value.code == 143
    assert time.monotonic() - began < 10


ORPHAN = """
import multiprocessing, os, subprocess, sys, time
from utils import signals
def child():
    signals.PARENT_SECONDS = 0.1
    signals.end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    if sys.argv[1] == "child":
        child()
    if sys.argv[1] == "popen":
        subprocess.Popen([sys.executable, __file__, "child"])
    else:
        multiprocessing.get_context(sys.argv[1]).Process(target=child).start()
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["popen", "forkserver", "spawn"])
def test_what_a_launcher_started_ends_when_the_launcher_is_killed(how, tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "orphan.py"), how]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not locks.process(child)[0], 20)


def torchrun(out: Path, args: dict, *how: str, script: str = "mask_swav") -> subprocess.Popen:
    """Two processes, with restarts; log.txt, and steps.<rank> of what they applied."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3", *how]
    command += ["-m", "trials", str(out / "steps"), script, *arguments(args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with open(out / "log.txt", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


ELASTIC = "--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-conf=last_call_timeout=1"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_two_processes_go_on_when_one_was_killed_or_stopped(number, data, tmp_path):
    """The store of torchrun still knows the addresses of the first start."""
    changes = {"epochs": 3, "batch_size": 1, "checkpoint_minutes": 0.001, "timeout_minutes": 0.25}
    launched = torchrun(tmp_path, options("mask_swav", data, tmp_path, **changes), *ELASTIC)
    try:
        wait_until(lambda: count_steps(tmp_path / "steps.0") >= 5)
        os.kill(worker_of(launched), number)
        assert launched.wait(300) == 0, (tmp_path / "log.txt").read_text()
    finally:
        launched.kill()
    assert (tmp_path / "log.txt").read_text().count("continuing at epoch") == 1
    assert [row["epoch"] for row in losses(tmp_path / "runs" / "mask_swav")] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_wrong_option_is_tried_once_and_a_killed_torchrun_leaves_nobody(data, tmp_path):
    args = options("mask_swav", data, tmp_path, epochs=1000, batch_size=1)
    launched = torchrun(tmp_path, args | {"layers": 0}, "--standalone")
    assert launched.wait(120) == 1
    assert (tmp_path / "log.txt").read_text().count("error: layers: must be PositiveInt") <= 2  # one for each process
    launched = torchrun(tmp_path, args | {"d_model": 30}, "--standalone")
    assert launched.wait(120) == 1
    assert 1 <= (tmp_path / "log.txt").read_text().count("error: d_model: 30 must be a multiple") <= 2
    launched = torchrun(tmp_path, args, "--standalone")
    wait_until(lambda: count_steps(tmp_path / "steps.0") >= 2)
    worker = worker_of(launched)
    launched.kill()
    launched.wait()
    wait_until(lambda: not locks.process(worker)[0], 60)
    again = Trial("mask_swav", args | {"epochs": 1}, tmp_path / "again")  # the lock is free
    assert "epochs: " in again.log() if again.wait() == [2] else again.wait() == [0], again.log()


def wait_until(fact: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_lost_worker_is_started_again_and_the_run_ends_as_if_it_had_not_been(data, tmp_path):
    """One process, so that the weights can be compared bit for bit with those of an unlaunched run."""
    changes = {"epochs": 6, "checkpoint_minutes": 0.001}  # every step is saved
    run("mask_swav", data, tmp_path / "whole", **changes)
    elastic = tmp_path / "elastic"
    elastic.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-conf=last_call_timeout=1"]
    command += ["-m", "trials", str(elastic / "steps"), "mask_swav"]  # notes its applied steps in steps.0
    command += arguments(options("mask_swav", data, elastic, **changes))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with open(elastic / "log.txt", "w") as log:
        torchrun = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: count_steps(elastic / "steps.0") >= 6)
        os.kill(worker_of(torchrun), signal.SIGKILL)
        assert torchrun.wait(300) == 0, (elastic / "log.txt").read_text()
    finally:
        torchrun.kill()
    assert (elastic / "log.txt").read_text().count("continuing at epoch") == 1
    assert losses(elastic / "runs" / "mask_swav") == losses(tmp_path / "whole" / "runs" / "mask_swav")
    made = [(tmp_path / name / "weights" / "mask_swav.pth").read_bytes() for name in ("whole", "elastic")]
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_others_after_the_time_out(data, tmp_path):
    """As when its machine is cut off or hangs: no connection breaks."""
    args = options("mask_swav", data, tmp_path, epochs=1000, batch_size=1)
    trial = Trial("mask_swav", args | {"timeout_minutes": 0.1}, tmp_path / "trial", ranks=2)
    wait_until(lambda: min(trial.steps) >= 2)
    trial.send(signal.SIGSTOP, [1])
    trial.processes[0].join(60)
    trial.send(signal.SIGKILL)
    assert trial.wait() == [1, -signal.SIGKILL]
    assert "Traceback" in trial.log()


def test_a_signal_waits_for_the_end_of_what_must_not_be_torn():
    reached = []

    def write() -> None:
        with signals.handled(), signals.noted():
            with signals.noted():
                signal.raise_signal(signal.SIGUSR1)
            reached.append(1)
            with pytest.raises(SystemExit), signals.obeyed():
                reached.append(2)

    with pytest.raises(SystemExit) as stopped:
        write()
    assert reached == [1]
    assert stopped.value.code == 138


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 7), (signal.SIGTERM, -15)])
def test_a_forked_child_does_not_save_and_the_handlers_are_restored(number, code):
    """Pools end their children by SIGTERM: it must do what it usually does."""
    before = [signal.getsignal(stop) for stop in signals.STOPS]
    with signals.handled():
        child = os.fork()
        if not child:
            signal.raise_signal(number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        assert signals.caught() == 0
    assert [signal.getsignal(stop) for stop in signals.STOPS] == before


def test_an_error_after_a_signal_is_the_signal(capsys):
    """Of two processes the one that obeyed first takes its connections along."""

    def script(_: mask_swav.Config) -> None:
        with signals.noted():
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(SystemExit) as stopped:
        config.main(script, mask_swav.Config, None, [])
    assert stopped.value.code == 143
    said = capsys.readouterr().err
    assert "RuntimeError: Connection closed by peer" in said  # it may have been a failure of its own
    assert "stopped by signal 15; this step was not saved" in said


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> "$CALLS"; fi',
    "scancel": 'echo "$@" >> "$CALLS"; kill -TERM "$(cat "$CALLS.pid")"',
    "srun": """echo "$@" >> "$CALLS"; echo $$ > "$CALLS.pid"
        trap 'sleep 0.3; exit 143' TERM
        while true; do sleep 0.05; done""",
}


def test_the_slurm_script_stops_its_steps_waits_and_queues_itself_again(tmp_path):
    """With stand-ins for SLURM's commands: what the script asks of them, and when."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), "mask_swav.py", "--epochs", "3"]
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "calls.pid").exists() and (tmp_path / "calls.pid").read_text().strip() != "")
    time.sleep(0.2)
    script.send_signal(signal.SIGUSR1)
    said = script.communicate(timeout=30)[0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--nnodes=1:2 --nproc_per_node=4 --max-restarts=3 --rdzv-backend=c10d" in calls[0]
    assert "--rdzv-endpoint=node7:29400" in calls[0]
    assert re.search(r" --rdzv-id=[0-9a-f]{32} ", calls[0])
    assert calls[0].endswith("mask_swav.py --epochs 3")
    assert calls[1:] == ["--signal=TERM 42", "requeue 42"]
    assert script.returncode == 143
    assert "queued again" in said
