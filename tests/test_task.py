"""One run for all downstream tasks: stopped anywhere, it ends as if it had not been; it is never mixed with another."""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import save_weights, write_pairs
from torch import Tensor, nn

from datasets.origins import origin, shared
from downstream import segment, task
from downstream.splits import Split, write_split
from downstream.task import Options, Outcome, Task
from models.resnet import GreyResNet
from reporting.runs import read_tables
from training import train
from utils import checkpoint, options
from utils.errors import UserError
from utils.files import read_csv, write_csv
from utils.locks import Lock
from utils.seeding import stream

pytestmark = pytest.mark.usefixtures("one_thread")


@options.constants
class Config(Options):
    data_path = ""
    arch = "resnet18"
    epochs = 3
    steps_per_epoch = 2
    batch_size = 4
    base_lr = 0.1
    device = "cpu"


class Line(Task):
    """Learn a line through noisy points, by a network with dropout and BatchNorm."""

    fingerprint = "points"

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, device)
        self.patients = {f"c{i}": f"p{i // 2}" for i in range(12)}
        self.sources = {case: Path(case) for case in self.patients}

    def build(self) -> nn.Module:
        torch.manual_seed(self.cfg.seed)
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def examine(self) -> None:
        if self.cfg.split_seed == 9:
            raise UserError("a case is broken")

    def describe(self) -> str:
        return f"{len(self.labelled)} points"

    def batch(self, epoch: int, step: int) -> Tensor:
        points = stream(self.cfg.seed, epoch, step, 1).uniform(-1, 1, (self.cfg.batch_size, 1))
        return torch.from_numpy(points).float()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), 2 * batch)

    def validate(self, model: nn.Module) -> dict[str, float]:
        x = torch.linspace(-1, 1, 9)[:, None]
        return {"fit": -float(F.mse_loss(model(x), 2 * x))}

    def test(self, model: nn.Module) -> Outcome:
        rows = [{"case": case, "error": float(model(torch.ones(1, 1)))} for case in self.split.test]
        return Outcome({"error": rows[0]["error"], "undefined": math.nan}, rows)


def line(tmp_path: Path) -> tuple[type[Task], Config]:
    return Line, Config(dump_path=str(tmp_path / "run"))


def balls(tmp_path: Path) -> tuple[type[Task], segment.Config]:
    if not (tmp_path / "balls").exists():
        write_pairs(tmp_path / "balls", 4, (16, 16, 4))
    return segment.Segmentation, segment.Config(
        data_path=str(tmp_path / "balls"), dump_path=str(tmp_path / "run"), arch="resnet18", size=32, epochs=3,
        steps_per_epoch=2, batch_size=4, device="cpu", f_inter=True, d_model=16, inter_slices=2,
        fractions=[0.4, 0.3, 0.3],
    )  # fmt: skip


STOPS = [("batch", 4), ("validate", 1), ("test", 1)]  # the second epoch's second step; what a resumed run does next


def stopping(kind: type[Task], at: str, when: int) -> type[Task]:
    """The same task, to which SIGTERM comes while it does `at` for the n-th time."""
    calls = []

    def stopped(self: Task, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return getattr(kind, at)(self, *args)

    return type(kind.__name__, (kind,), {at: stopped})


@pytest.mark.parametrize(("make", "stops"), [(line, STOPS), pytest.param(balls, STOPS[:1], marks=pytest.mark.slow)])
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(make, stops, tmp_path):
    """make: (task, configuration of three epochs of two steps) in a folder."""
    kind, cfg = make(tmp_path)
    whole = task.run(kind, replace(cfg, dump_path=str(tmp_path / "whole")))
    for at, when in stops:
        with pytest.raises(SystemExit) as stop:
            task.run(stopping(kind, at, when), cfg)
        assert stop.value.code == 128 + signal.SIGTERM
    result = task.run(kind, cfg)
    assert (tmp_path / "run/best.pth").read_bytes() == (tmp_path / "whole/best.pth").read_bytes()
    assert (tmp_path / "run/cases.csv").read_bytes() == (tmp_path / "whole/cases.csv").read_bytes()
    for name in ("history", "best_epoch", "labelled"):
        assert result[name] == whole[name]
    assert json.dumps(result["metrics"]) == json.dumps(whole["metrics"])  # in which nan equals nan
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best.pth", "cases.csv", "config.yaml", "results.json", "split.json"} <= written
    assert not {checkpoint.LATEST, checkpoint.PREVIOUS} & written


def test_a_checkpoint_that_was_gone_on_from_leaves_the_memory(tmp_path, monkeypatch):
    kind, cfg = line(tmp_path)
    with pytest.raises(SystemExit):
        task.run(stopping(kind, *STOPS[0]), cfg)
    loaded, load = [], checkpoint.load

    def spied(folder: Path) -> Any:
        state = load(folder)
        loaded.extend(weakref.ref(value) for value in state["learner"].values())
        return state

    def test(self: Task, *args: Any) -> Any:
        gc.collect()
        assert loaded
        assert not any(value() is not None for value in loaded)
        return kind.test(self, *args)

    monkeypatch.setattr(checkpoint, "load", spied)
    task.run(type(kind.__name__, (kind,), {"test": test}), cfg)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_folder_with_another_run_is_refused_and_a_finished_one_read(tmp_path, monkeypatch, stopped):
    split = tmp_path / "split.json"
    split.write_text('{"train": ["c0", "c2"], "validation": ["c4"], "test": ["c6"]}')
    kind, cfg = line(tmp_path)
    cfg = replace(cfg, split=str(split))
    if stopped:
        with pytest.raises(SystemExit):
            task.run(stopping(kind, "batch", 3), cfg)
    else:
        first = task.run(kind, cfg)
        monkeypatch.setattr(Line, "batch", lambda *_: pytest.fail("trained again"))
        again = task.run(kind, cfg)["metrics"]
        assert (again["error"], math.isnan(again["undefined"])) == (first["metrics"]["error"], True)
    with pytest.raises(UserError, match=r"other options \(base_lr: 0.1 -> 0.2; seed: 0 -> 1\)"):
        task.check(kind, replace(cfg, base_lr=0.2, seed=1))
    with pytest.raises(UserError, match="the files below data_path"):
        task.check(type("Line", (Line,), {"fingerprint": "other"}), cfg)
    task.check(kind, replace(cfg, device="auto", data_path="moved"))  # these may change
    split.write_text('{"train": ["c0"], "validation": ["c4"], "test": ["c6"]}')
    with pytest.raises(UserError, match="the content of split"):
        task.check(kind, cfg)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("moves", range(6))
def test_what_a_run_leaves_takes_its_place_together(moves, tmp_path, monkeypatch):
    """Stopped after so many moves: the same command makes it whole, one with other options is refused."""
    kind, cfg = line(tmp_path)
    folder, move, done = tmp_path / "run", os.replace, []

    def test(self: Task, model: nn.Module) -> Outcome:
        assert done or contents(Path(self.cfg.dump_path)).keys() == {".lock"}
        return replace(Line.test(self, model), files={"more.png": b"picture"})

    def stopped(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(move(source, target))

    kind = type("Line", (Line,), {"test": test})
    whole = task.run(kind, replace(cfg, dump_path=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            task.run(kind, cfg)
    assert len(contents(folder)) == moves if moves else not folder.exists()
    assert not (folder / "results.json").exists()
    if moves:
        with pytest.raises(UserError, match=r"other options \(seed: 0 -> 1\)"):
            task.run(kind, replace(cfg, seed=1))
    assert json.dumps(task.run(kind, cfg)["metrics"]) == json.dumps(whole["metrics"])
    now, expected = contents(folder), contents(tmp_path / "whole")
    assert now.keys() == expected.keys()
    assert now["best.pth"] == expected["best.pth"]


@pytest.mark.parametrize("room", [50, 400, 2000, 3000])
def test_a_full_disk_is_named_and_leaves_nothing_that_is_half(tmp_path, room):
    """room: bytes that a file may have; of the lock, of checkpoint and tables, of best.pth."""
    kind, cfg = line(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"run/.*: cannot be written \(File too large\)"):
            task.run(kind, cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run").exists()
    task.run(kind, cfg)


def test_a_folder_has_one_user_and_one_kind_of_run(tmp_path):
    kind, cfg = line(tmp_path)
    with (
        Lock(tmp_path / "run/.lock", "trains").held(),
        pytest.raises(UserError, match=r"process \d+ on .* trains since"),
    ):
        task.run(kind, cfg)
    task.run(kind, cfg)
    trains = SimpleNamespace(dump_path=cfg.dump_path, pretrained_path=str(tmp_path), checkpoint_name="w.pth")
    with pytest.raises(UserError, match="holds results of a downstream task"):
        train.require_free(SimpleNamespace(**vars(trains), dry_run=False, fit_batch=0))
    (tmp_path / "run/results.json").unlink()
    (tmp_path / "run/config.yaml").write_text("data_path: x\nd_model: 8\n")  # of a training script
    with pytest.raises(UserError, match="of another script"):
        task.run(kind, cfg)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/.*: cannot be written \(Not a directory\)"):
        task.run(kind, replace(cfg, dump_path=str(tmp_path / "file/run")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": 50}, "50 cases were asked for"),
        ({"split_seed": 9}, "a case is broken"),
        ({"base_lr": math.inf}, "base_lr: inf is not a finite number"),
    ],
)
def test_everything_is_checked_before_the_first_step(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(Line, "batch", lambda *_: pytest.fail("training began"))
    kind, cfg = line(tmp_path)
    for ask in (task.check, task.run):
        with pytest.raises(UserError, match=message):
            ask(kind, replace(cfg, **changes))
    assert not (tmp_path / "run").exists()


def test_the_last_of_the_best_epochs_is_kept(tmp_path, monkeypatch):
    scores, seen = iter([0.1, math.nan, 0.7, 0.7, 0.3]), []

    def validate(self: Task, model: nn.Module) -> dict[str, float]:
        seen.append(model[0].weight.detach().clone())
        return {"fit": next(scores)}

    monkeypatch.setattr(Line, "validate", validate)
    kind, cfg = line(tmp_path)
    assert task.run(kind, replace(cfg, epochs=5))["best_epoch"] == 4
    assert torch.equal(torch.load(tmp_path / "run/best.pth", weights_only=True)["0.weight"], seen[3])


def test_learning_rates_and_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    rates = []

    class Noting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            rates.append([group["lr"] for group in self.param_groups])

    def loss(self: Task, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum() * (math.nan if len(rates) == 5 else 1)

    def groups(self: Task, model: nn.Module) -> list[dict[str, Any]]:
        first, last = ({"params": model[i].parameters(), "start": 0} for i in (0, 3))
        return [first | {"share": 10.0}, last | {"share": 1.0}]

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    monkeypatch.setattr(Line, "loss", loss)
    monkeypatch.setattr(Line, "groups", groups)
    kind, cfg = line(tmp_path)
    with pytest.raises(UserError, match="the loss is nan in epoch 3, step 2"):
        task.run(kind, cfg)
    cosine = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(5)]  # a tenth of six steps: no warm-up
    assert rates == [[pytest.approx(10 * lr), pytest.approx(lr)] for lr in cosine]


def test_test_cases_that_were_pre_trained_on_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By content, by name, by patient; a file of the same name with another content is another file."""
    root = write_pairs(tmp_path / "balls")
    rows = [
        row | {"file": f"{row['id']}.npy", "sha256": f"{row['id']:z<64}"} for row in read_csv(root / "cases.csv", "")
    ]
    write_csv(rows, root / "cases.csv")
    origins = {path.stem: origin(path) for path in root.glob("*.npy")}
    assert origins["c6"].patient == origins["c7"].patient == "balls/p6"
    files = {case: root / f"{case}.npy" for case in origins}
    seen = [
        ("elsewhere/a.npy", origins["c1"].content, ""),
        ("balls/c2.npy", "", ""),
        ("balls/c3.npy", "0" * 16, ""),
        ("balls/x.npy", "", "balls/p6"),
    ]
    assert sorted(shared(files, seen)) == ["c1", "c2", "c6", "c7"]
    (tmp_path / "cases.csv").write_text("of, another\nprogram")
    assert origin(tmp_path / "a.npy") == (f"{tmp_path.name}/a.npy", "", "")

    encoder, weights = GreyResNet("resnet18"), tmp_path / "w.pth"
    save_weights(encoder, weights, {"config": {"arch": "resnet18"}, "data": {"files": seen}})
    write_split(Split(["c0", "c4", "c5"], ["c3"], ["c1", "c6"]), tmp_path / "split.json")
    cfg = segment.Config(
        data_path=str(root), dump_path=str(tmp_path / "run"), split=str(tmp_path / "split.json"), weights=str(weights),
        size=32, epochs=1, steps_per_epoch=1, batch_size=4, device="cpu", precision="fp32",
    )  # fmt: skip
    assert segment.run(cfg)["pretrained_on"] == ["c1", "c6"]
    assert "warning: 2 of 2 test cases (c1, c6) or their patients were pre-trained on" in capsys.readouterr().out
    write_split(Split(["c0", "c4"], ["c3"], ["c1", "c2"]), tmp_path / "split.json")
    segment.run(replace(cfg, dump_path=str(tmp_path / "other")))
    first, second = read_tables([str(tmp_path / "run"), str(tmp_path / "other")])
    assert "WARNING: 2 of 2 test cases (c1, c6)" in first.about
    assert "WARNING: its test cases are not those of other" in first.about
    assert "not those of run" in second.about
