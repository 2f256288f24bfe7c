"""SIGTERM, SIGINT and SIGUSR1 end a run wherever it is: nothing lost, nothing torn, and 128 + signal as exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import losses, options
from trials import Trial, arguments

import mask_swav
import ssl_deepcluster3D
from datasets.store import SliceStore
from objectives import deepcluster
from objectives.deepcluster import DeepClusterV2
from training import weights
from utils import checkpoint, config, signals

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def main(script, args: dict) -> None:
    config.main(script.main, script.Config, None, arguments(args))


def signal_in(owner: object, name: str, monkeypatch: pytest.MonkeyPatch, call: int = 1) -> None:
    """A real SIGTERM to this process in the given call of a function, which then goes on if it may."""
    function: Callable = getattr(owner, name)
    calls = []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize(
    ("owner", "name", "call", "where"),
    [
        (SliceStore, "build", 1, "building the cache"),
        (DeepClusterV2, "remember", 3, "filling the bank"),
        (deepcluster, "kmeans_torch", 3, "k-means of the second epoch"),
        (torch, "save", 1, "writing the first checkpoint"),
        (torch, "save", 3, "writing the weights"),
        (weights, "commit", 1, "after training"),
    ],
)
def test_a_signal_outside_of_steps_loses_and_tears_nothing(
    owner, name, call, where, whole, data, tmp_path, monkeypatch
):
    args = options("ssl_deepcluster3D", data, tmp_path, **RANDOM)
    with monkeypatch.context() as patch:
        signal_in(owner, name, patch, call)
        with pytest.raises(SystemExit) as stopped:
            main(ssl_deepcluster3D, args)
    assert stopped.value.code == 143, where
    assert not list(tmp_path.rglob("*.tmp"))
    for path in (tmp_path / "runs" / "ssl_deepcluster3D").glob("*.pth"):
        checkpoint.read(path)
    main(ssl_deepcluster3D, args)
    written = {p.name: p.read_bytes() for p in (tmp_path / "weights").glob("*.pth")}
    assert written == whole


RANDOM = {"resnet_pretrained": "none", "trans_pretrained": "none", "lambda_intra": 0}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    """The weights of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(ssl_deepcluster3D, options("ssl_deepcluster3D", data, out, **RANDOM))
    torch.set_num_threads(threads)
    return {p.name: p.read_bytes() for p in (out / "weights").glob("*.pth")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=["all processes", "one process"])
def test_all_processes_stop_together_after_the_same_step(number, ranks, data, tmp_path):
    if number == signal.SIGINT and ranks == [1]:
        pytest.skip("Ctrl-C reaches all processes")
    args = options("mask_swav", data, tmp_path, resnet_pretrained="none", epochs=1000, batch_size=1)
    trial = Trial("mask_swav", args, tmp_path / "trial", ranks=2)
    wait_until(lambda: min(trial.steps) >= 5)
    trial.send(number, ranks)
    sent = time.monotonic()
    assert trial.wait(30) == [128 + number] * 2, trial.log(0) + trial.log(1)
    assert time.monotonic() - sent < 30
    state = checkpoint.load(tmp_path / "runs" / "mask_swav")
    steps = state["epoch"] * 4 + state["seen"] // 2
    assert trial.steps == [steps, steps]  # none lost
    assert f"stopped by signal {number} after epoch" in trial.log()


def wait_until(fact: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.02)


def test_torchrun_passes_a_signal_on_and_its_processes_save(data, tmp_path):
    args = options("mask_swav", data, tmp_path, resnet_pretrained="none", epochs=1000, batch_size=1, workers=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "mask_swav.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log.txt", "w") as log:
        torchrun = subprocess.Popen([*launch, *arguments(args)], cwd=ROOT, stdout=log, stderr=log, env=env)
    folder = tmp_path / "runs" / "mask_swav"
    try:
        wait_until(lambda: len(losses(folder)) >= 1 if (folder / "metrics.csv").exists() else False)
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(40)
    finally:
        torchrun.kill()
    said = (tmp_path / "log.txt").read_text()
    assert "stopped by signal 15 after epoch" in said
    assert checkpoint.load(folder)["epoch"] >= 1


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 7), (signal.SIGTERM, -15), (signal.SIGINT, -2)])
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


def test_a_process_that_waits_for_others_who_never_come_dies_of_a_signal_at_once(data, tmp_path):
    trial = Trial("mask_swav", options("mask_swav", data, tmp_path, resnet_pretrained="none"), tmp_path, ranks=2)
    trial.send(signal.SIGKILL, [1])
    trial.processes[1].join(30)
    time.sleep(2)  # the first waits for the second now, in foreign code
    if trial.running:
        trial.send(signal.SIGTERM)
    assert trial.wait(10)[0] in (-signal.SIGTERM, 1)


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

    def broken(_: mask_swav.Config) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        config.main(broken, mask_swav.Config, None, [])


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> "$CALLS"; fi',
    "scancel": 'echo "$@" >> "$CALLS"; kill -TERM "$(cat "$CALLS.pid")"',
    "srun": """echo "$@" >> "$CALLS"; echo $$ > "$CALLS.pid"
        trap 'sleep 0.3; exit 143' TERM
        [ -n "$LASTS" ] || exit 0
        while true; do sleep 0.05; done""",
}


@pytest.mark.parametrize("stopped", [True, False])
def test_the_slurm_script_stops_its_steps_waits_and_queues_itself_again(stopped, tmp_path):
    """With stand-ins for SLURM's commands: what the script asks of them, and when."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"SLURM_GPUS_ON_NODE": "4", "LASTS": "yes" * stopped}
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), "mask_swav.py", "--epochs", "3"]
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    if stopped:
        wait_until(lambda: (tmp_path / "calls.pid").exists() and (tmp_path / "calls.pid").read_text().strip() != "")
        time.sleep(0.2)
        script.send_signal(signal.SIGUSR1)
    said = script.communicate(timeout=30)[0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--nnodes=1:2 --nproc_per_node=4 --max-restarts=3 --rdzv-backend=c10d" in calls[0]
    assert "--rdzv-endpoint=node7:29400" in calls[0]
    assert calls[0].endswith("mask_swav.py --epochs 3")
    assert calls[1:] == (["--signal=TERM 42", "requeue 42"] if stopped else [])
    assert script.returncode == (143 if stopped else 0)
    assert ("queued again" in said) == stopped
