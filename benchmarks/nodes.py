"""Two nodes on one machine, as network namespaces joined by a virtual cable: lose a worker, then lose a node.

    python -m benchmarks.nodes      # needs root

Both run `torchrun --nnodes=1:2 --max-restarts=3 --rdzv-backend=c10d` on one script and one shared disk. First one of
the two training processes is killed, then the cable of the second node is pulled. What is measured is the time from
there to the next training step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.trials import arguments, read_steps
from tests.tiny import losses, options, write_data

ROOT = Path(__file__).parents[1]
NODES = {"jointssl-a": "10.213.7.1", "jointssl-b": "10.213.7.2"}
TIMEOUT_MINUTES = 0.25  # that processes wait for one which does not answer
LAST_CALL_S = 5  # that torchrun waits for more nodes than the fewest it needs


def available() -> str:
    """Why there can be no two nodes on this machine; empty when there can."""
    if os.geteuid():
        return "network namespaces need root"
    try:
        done = subprocess.run(["ip", "netns", "add", "jointssl-try"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no ip command (package iproute2)"
    if done.returncode:
        return f"ip netns add was refused ({done.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", "jointssl-try"], check=True)
    return ""


@contextlib.contextmanager
def two_nodes() -> Iterator[None]:
    """The namespaces of NODES, joined; a node's end of the cable is called `cable`."""
    (a, ip_a), (b, ip_b) = NODES.items()
    remove()
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for node, address in ((a, ip_a), (b, ip_b)):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", node, "link", "set", device, "up")
        yield
    finally:
        remove()


def remove() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def torchrun(node: str, script: str, args: list[str], folder: Path) -> subprocess.Popen:
    """One node's launcher; its processes note their steps in folder/<node>.<rank>."""
    first = next(iter(NODES.values()))
    launch = ["ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run"]
    launch += ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    launch += [f"--rdzv-endpoint={first}:29400", "--rdzv-id=trial"]
    # Which node holds the rendezvous, torchrun finds out by the host's name, which namespaces share.
    holds = str(NODES[node] == first).lower()
    launch += [f"--rdzv-conf=last_call_timeout={LAST_CALL_S},is_host={holds}"]
    launch += [f"--local-addr={NODES[node]}", "-m", "benchmarks.trials", str(folder / node), script, *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    with open(folder / f"{node}.log", "w") as log:
        return subprocess.Popen(launch, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)


def steps(folder: Path, processes: int, since: float) -> list[float]:
    """Times of the steps that so many processes took together after `since`, of any process."""
    found = [step for path in folder.glob("jointssl-?.[01]") for step in read_steps(path)]
    return sorted(when for when, world in found if world == processes and when > since)


def first_step(folder: Path, processes: int, since: float, launchers: list[subprocess.Popen]) -> float:
    """The time of the first such step, awaited."""
    wait_until(lambda: bool(steps(folder, processes, since)), launchers)
    return steps(folder, processes, since)[0]


def wait_until(fact: Callable[[], bool], launchers: list[subprocess.Popen], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > until or launchers[0].poll() is not None:
            raise RuntimeError(f"not reached; the first launcher's exit code is {launchers[0].poll()}")
        time.sleep(0.1)


def worker_of(launcher: subprocess.Popen) -> int:
    """Process id of the training process that a launcher has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid), "-f", "benchmarks.trials"], capture_output=True, text=True
    )
    return int(found.stdout.split()[0])


def lose(data: Path, folder: Path) -> dict[str, Any]:
    """Kill one worker, then cut one node off, and wait for the end of the training: what happened and how long."""
    reason = available()
    if reason:
        return {"skipped": reason}
    folder.mkdir(parents=True, exist_ok=True)
    epochs = 60
    args = options("mask_swav", data, folder, resnet_pretrained="none", epochs=epochs, batch_size=1)
    args |= {"checkpoint_minutes": 0.02, "timeout_minutes": TIMEOUT_MINUTES, "checkpoint_freq": 1000}
    with two_nodes():
        launchers = [torchrun(node, "mask_swav", arguments(args), folder) for node in NODES]
        try:
            start = time.time()
            first_step(folder, 2, start, launchers)
            time.sleep(2)
            killed = time.time()
            os.kill(worker_of(launchers[1]), signal.SIGKILL)
            after_worker = first_step(folder, 2, killed + 1, launchers)
            time.sleep(2)
            second = list(NODES)[1]
            cut = time.time()
            ip("-n", second, "link", "set", "cable", "down")
            after_node = first_step(folder, 1, cut, launchers)
            code = launchers[0].wait(300)
        except Exception:
            for node in NODES:
                print(f"--- {node}\n{(folder / f'{node}.log').read_text()[-4000:]}", flush=True)
            raise
        finally:
            for launcher in launchers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
    said = "".join((folder / f"{node}.log").read_text() for node in NODES)
    rows = losses(folder / "runs" / "mask_swav")
    return {
        "worker killed: seconds to the next step": round(after_worker - killed, 1),
        "node cut off: seconds to the next step": round(after_node - cut, 1),
        "of them waiting for an answer (timeout_minutes)": TIMEOUT_MINUTES * 60,
        "went on with one process": "processes: 2 -> 1" in said,
        "finished": code == 0 and (folder / "weights" / "mask_swav.pth").exists(),
        "every epoch logged once": [row["epoch"] for row in rows] == [str(e) for e in range(epochs)],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(lose(write_data(Path(place) / "data"), Path(place) / "nodes"))
