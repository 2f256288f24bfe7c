"""Runs that are killed, stopped and cut off: do they end as those that are not? Prints a table.

    python -m benchmarks.resilience                                  # about 20 minutes on two quiet cores
    python -m benchmarks.resilience --kills 6 --terms 3 --nodes false --fuzz 500

Kills: SIGKILL at a random moment, or while a checkpoint or the weights are being written; the same command again must
end with the same bytes in weights/ and the same losses as a run that was never stopped. Terms: SIGTERM, SIGINT or
SIGUSR1 at a random moment. Nodes: see benchmarks/nodes.py. Fuzz: see benchmarks/fuzz.py.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from benchmarks import fuzz, nodes, timing
from benchmarks.trials import SCRIPTS, STAGES, Trial
from tests.tiny import losses, options, write_data
from utils import checkpoint
from utils import config as configuration
from utils.errors import UserError


@dataclass
class Config:
    kills: NonNegativeInt = 50
    """SIGKILLs of runs of one process, over all six scripts"""
    kills_of_two: NonNegativeInt = 6
    """SIGKILLs of one of two processes, over all six scripts"""
    terms: NonNegativeInt = 20
    """requests to stop, every third to two processes"""
    nodes: bool = True
    """lose a worker and a node of two (needs root and Linux's network namespaces)"""
    fuzz: NonNegativeInt = 20_000
    """mutated inputs, over all readers"""
    seed: NonNegativeInt = 0
    """of the moments and the mutations"""


STEPS = {"2D": 5, "mask": 4, "3D": 4}  # an epoch: 20 images and slices by 4, 8 volumes by 2


class Bench:
    """The runs that were never stopped, and trials to compare with them."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw, self.count = root, random.Random(seed), 0
        self.data = write_data(root / "data")
        self.whole: dict[tuple[str, int], tuple[dict[str, bytes], list, float]] = {}

    def options(self, script: str, out: Path, ranks: int) -> dict[str, Any]:
        """Two epochs from the weights of the stages before; a checkpoint about every second step, own cache."""
        method = "swav" if "swav" in script else "deepcluster"
        chosen = {"checkpoint_minutes": 0.002, "checkpoint_freq": 1, "cache_path": str(out / "cache")}
        chosen |= {"timeout_minutes": 0.5}  # a process that died before they met is missed by nobody but torchrun
        chosen |= {"resnet_pretrained": "none" if "2D" in script else f"resnet_{method}2D.pth"}
        if "3D" in script:
            chosen |= {"trans_pretrained": f"mask_{method}.pth"}
        chosen |= {"batch_size": (4 if "2D" in script else 2) // ranks, "epoch_queue_starts": 0}
        if not ("swav" in script and "mask" not in script):
            del chosen["epoch_queue_starts"]
        return options(script, self.data, out, **chosen)

    def start(self, script: str, out: Path, ranks: int) -> Trial:
        if not (out / "weights").exists():
            (out / "weights").mkdir(parents=True)
            for earlier in self.earlier(script):
                made, _, _ = self.reference(earlier, 1)
                for name, content in made.items():
                    (out / "weights" / name).write_bytes(content)
        return Trial(script, self.options(script, out, ranks), out / "trial", ranks)

    @staticmethod
    def earlier(script: str) -> list[str]:
        method = "swav" if "swav" in script else "deepcluster"
        stages = [stage.format(method) for stage in STAGES]
        return stages[: stages.index(script)]

    def reference(self, script: str, ranks: int) -> tuple[dict[str, bytes], list, float]:
        """Weights, losses and seconds of a run that nothing stopped."""
        if (script, ranks) not in self.whole:
            out = self.root / f"whole_{script}_{ranks}"
            trial = self.start(script, out, ranks)
            codes = trial.wait()
            if any(codes):
                raise RuntimeError(f"{script} ended with {codes}: {trial.log()}")
            self.whole[script, ranks] = (*self.results(script, out), time.monotonic() - trial.began)
        return self.whole[script, ranks]

    def results(self, script: str, out: Path) -> tuple[dict[str, bytes], list]:
        """(weights that this script wrote, losses of its epochs)"""
        others = {name for earlier in self.earlier(script) for name in self.whole[earlier, 1][0]}
        made = {p.name: p.read_bytes() for p in (out / "weights").glob("*.pth") if p.name not in others}
        return made, losses(out / "runs" / script)

    def folder(self, name: str) -> Path:
        self.count += 1
        return self.root / f"{name}_{self.count}"


def unreadable(folder: Path) -> int:
    """How many checkpoints of a run cannot be read."""
    bad = 0
    for path in folder.glob("checkpoint*.pth"):
        try:
            checkpoint.read(path)
        except UserError as error:
            print(error)
            bad += 1
    return bad


def wait_for_writing(trial: Trial, folder: Path, nth: int) -> None:
    """Until the nth temporary file of a .pth is being written in this folder, or the run has ended."""
    seen: set[tuple[str, int]] = set()
    while trial.running:
        for path in folder.glob(".*.pth.*.tmp") if folder.exists() else ():
            try:
                seen.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
        if len(seen) >= nth:
            return
        time.sleep(0.0005)


def kills(bench: Bench, number: int, ranks: int) -> dict[str, Any]:
    found: Counter[str] = Counter()
    alone = []  # seconds that the other process took to end
    while found["killed"] < number:
        i = found["killed"]
        script = SCRIPTS[i % len(SCRIPTS)]
        weights, rows, seconds = bench.reference(script, ranks)
        out = bench.folder("kill")
        trial = bench.start(script, out, ranks)
        when = ("at random", "at random", "writing a checkpoint", "at random", "writing weights")[i // len(SCRIPTS) % 5]
        if when == "at random":
            time.sleep(bench.draw.uniform(0.0, 1.0) * seconds)
        elif when == "writing a checkpoint":
            wait_for_writing(trial, out / "runs" / script, bench.draw.randint(1, 6))
        else:
            wait_for_writing(trial, out / "weights", 1)
        victim = bench.draw.randrange(ranks)
        trial.send(signal.SIGKILL, [victim])
        killed = time.monotonic()
        codes = trial.wait()
        if codes[victim] != -signal.SIGKILL:  # it had ended before: not counted
            found["ended before the kill"] += 1
            shutil.rmtree(out)
            continue
        if ranks > 1:
            alone.append(time.monotonic() - killed)
        found["killed"] += 1
        found[f"of them {when}"] += 1
        found["unreadable checkpoints"] += unreadable(out / "runs" / script)
        again = bench.start(script, out, ranks)
        codes = again.wait()
        found["went on from a checkpoint"] += "continuing at epoch" in again.log().split("starting at epoch")[-1]
        if codes == [0] * ranks and bench.results(script, out) == (weights, rows):
            found["bit-equal"] += 1
            shutil.rmtree(out)
        else:
            print(f"{script}: killed {when}, ended with {codes} and not as the whole run; {out}\n{again.log()}")
    record: dict[str, Any] = dict(found)
    if alone:
        record["longest_wait_of_the_other_process_s"] = round(max(alone), 1)
    return record


def terms(bench: Bench, number: int) -> dict[str, Any]:
    found: Counter[str] = Counter()
    longest = 0.0
    while found["stopped"] < number:
        i = found["stopped"]
        script, ranks = SCRIPTS[i % len(SCRIPTS)], 2 if i % 3 == 2 else 1
        weights, rows, seconds = bench.reference(script, ranks)
        out = bench.folder("term")
        trial = bench.start(script, out, ranks)
        time.sleep(bench.draw.uniform(0.1, 0.9) * seconds)
        asked = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[i % 4]
        trial.send(asked)
        sent = time.monotonic()
        codes = trial.wait(120)
        if codes == [0] * ranks:  # it had ended before: not counted
            found["ended before the signal"] += 1
            shutil.rmtree(out)
            continue
        found["stopped"] += 1
        longest = max(longest, time.monotonic() - sent)
        found["with the documented code"] += codes == [128 + asked] * ranks
        if codes != [128 + asked] * ranks:
            print(f"{script}: {codes}\n{trial.log()}")
        kept = saved_steps(script, out / "runs" / script)
        found["no step lost"] += trial.steps == [kept] * ranks
        found["of them after the first step"] += kept > 0
        found["unreadable checkpoints"] += unreadable(out / "runs" / script)
        again = bench.start(script, out, ranks)
        found["bit-equal"] += again.wait() == [0] * ranks and bench.results(script, out) == (weights, rows)
        shutil.rmtree(out)
    return {**found, "longest_s": round(longest, 1)}


def saved_steps(script: str, folder: Path) -> int:
    """Steps of one process that lie before the newest checkpoint; 0 without one."""
    if not (folder / checkpoint.LATEST).exists():
        return 0
    state, _ = checkpoint.read(folder / checkpoint.LATEST)
    kind = next(kind for kind in STEPS if kind in script)
    return state["epoch"] * STEPS[kind] + state["seen"] // (4 if kind == "2D" else 2)


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    for part, figures in results.items():
        yield f"{part}"
        for name, value in figures.items():
            yield f"  {name:<45}{value}"


def main(config: Config) -> None:
    results: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), config.seed)
        for script in SCRIPTS:  # stage after stage: each needs the weights of the one before
            bench.reference(script, 1)
        parts = {
            "SIGKILL": lambda: kills(bench, config.kills, 1),
            "SIGKILL of one of two processes": lambda: kills(bench, config.kills_of_two, 2),
            "requests to stop": lambda: terms(bench, config.terms),
            "two nodes": (lambda: nodes.lose(bench.data, Path(folder) / "nodes")) if config.nodes else dict,
            "fuzzing": (lambda: fuzz.all_readers(config.fuzz, config.seed)) if config.fuzz else dict,
        }
        for name, part in parts.items():
            start = time.monotonic()
            results[name] = part()
            results[name]["seconds"] = round(time.monotonic() - start)
            print("\n".join(table({name: results[name]})), flush=True)
            path = timing.write("resilience", results)
    print(f"wrote {path} after {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main(configuration.parse(Config, __doc__))
