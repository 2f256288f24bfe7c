"""What a run says of itself: a bar for people, tables for plots, TensorBoard and W&B where they are asked for."""

from __future__ import annotations

import csv
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from datasets.batch import Batch
from training.memory import peak_memory
from utils import distributed, files
from utils.config import save_yaml, to_dict
from utils.distributed import Run
from utils.errors import UserError

METRICS, WARNINGS, WANDB_ID = "metrics.csv", "warnings.csv", "wandb_id"
IMAGES_EVERY = 10  # epochs between pictures of augmented views
IMAGES_SHOWN = 8  # samples of a batch, two views of each


class Log:
    """Progress for people, metrics.csv and warnings.csv; silent on all processes but the first.

    chance: what guessing scores, per loss that has such a level.  Raises UserError where TensorBoard or W&B were asked
    for and are not installed.
    """

    def __init__(
        self, folder: Path, config: Any, run: Run, first_epoch: int, chance: dict[str, float] | None = None
    ) -> None:
        self.run, self.config, self.folder = run, config, folder
        self.path, self.warnings_path = folder / METRICS, folder / WARNINGS
        self.chance = chance or {}
        self._tensorboard = self._wandb = self._views = None
        distributed.on_main(lambda: self._start(folder, first_epoch))

    def _start(self, folder: Path, first_epoch: int) -> None:
        config = self.config
        try:
            Path(config.pretrained_path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"pretrained_path: {config.pretrained_path} cannot be written ({error.strerror})") from None
        # Asked for before anything is written: what is missing must not leave half a run.
        tensorboard = _tensorboard() if config.tensorboard else None
        wandb = _wandb() if config.wandb_project else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_yaml(to_dict(config), folder / "config.yaml")
            for path in (self.path, self.warnings_path):
                rows = _rows(path)
                if rows:  # drop what a run wrote after its last checkpoint
                    _write([row for row in rows if int(row["epoch"]) < first_epoch], path)
            if tensorboard:
                self._tensorboard = tensorboard(str(folder / "tensorboard"), purge_step=first_epoch)
            if wandb:
                self._wandb = self._start_wandb(wandb)
        except OSError as error:
            raise UserError(f"dump_path: {folder} cannot be written ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: is not this run's table ({error}); move it away") from None

    def _start_wandb(self, wandb: Any) -> Any:
        """A run of W&B that goes on where the interrupted one was: its id lies beside the checkpoints."""
        file = self.folder / WANDB_ID
        if not file.exists():
            files.write_text(secrets.token_hex(8), file)
        try:
            return wandb.init(
                project=self.config.wandb_project,
                name=self.folder.name,
                id=file.read_text().strip(),
                resume="allow",
                dir=str(self.folder),
                config=to_dict(self.config),
            )
        except Exception as error:  # no account, no network: its own classes, which differ between versions
            raise UserError(
                f"wandb_project: W&B does not start ({error}); wandb login, or WANDB_MODE=offline to send it later"
            ) from None

    def say(self, text: str) -> None:
        if self.run.is_main:
            print(text, flush=True)

    def bar(self, epoch: int, steps: int, first_step: int) -> Bar:
        return Bar(self, epoch, steps, first_step)

    @property
    def wants_views(self) -> bool:
        return self._tensorboard is not None

    def views(self, epoch: int, batch: Batch) -> None:
        """Remember, on the device, what an epoch's first batch looks like; `row` shows it every IMAGES_EVERY epochs."""
        if self.wants_views and epoch % IMAGES_EVERY == 0:
            self._views = some_views(batch)

    def row(
        self,
        epoch: int,
        means: dict[str, float],
        lr: float,
        seconds: float,
        waited: float,
        samples: int,
        bad_steps: int,
        figures: dict[str, float] | None = None,
    ) -> None:
        """A line of metrics.csv; all processes call it together. Raises UserError when it cannot be written.

        figures: further columns, e.g. of the diagnostics.
        """
        values = {
            **means,
            "lr": lr,
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "data_wait": waited / seconds,
            "peak_memory_mib": peak_memory(self.run.device)[0] / 2**20,
            "bad_steps": bad_steps,
            **(figures or {}),
        }
        shapes = {"seconds": ".2f", "samples_per_second": ".2f", "data_wait": ".3f", "peak_memory_mib": ".0f"}
        row = {"epoch": epoch, **{name: format(value, shapes.get(name, ".6g")) for name, value in values.items()}}
        distributed.on_main(lambda: _write([*_rows(self.path), row], self.path))
        self._publish(epoch, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"epoch {epoch + 1:3d}/{self.config.epochs}  {shown}  lr {lr:.4g}  {seconds:.1f} s")

    def _publish(self, epoch: int, values: dict[str, float]) -> None:
        defined = {name: value for name, value in values.items() if value == value}  # neither of them plots nan
        if self._tensorboard:
            for name, value in defined.items():
                self._tensorboard.add_scalar(name, value, epoch)
            if self._views is not None:
                self._tensorboard.add_image("views", contact_sheet(self._views.cpu().float()), epoch)
                self._views = None
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(defined, step=epoch)

    def warn(self, epoch: int, found: list[tuple[str, str]]) -> None:
        """(condition, text) of what became wrong: printed, and kept in warnings.csv. All processes call it together."""
        for _, text in found:
            self.say(f"warning: epoch {epoch + 1}: {text}")
        rows = [{"epoch": epoch, "condition": condition, "text": text} for condition, text in found]
        # Also without rows: on other hardware a figure may differ in its last bit and be no warning there.
        distributed.on_main(lambda: _write([*_rows(self.warnings_path), *rows], self.warnings_path))

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class Bar:
    """One epoch on the terminal; nothing where there is none and on all processes but the first."""

    def __init__(self, log: Log, epoch: int, steps: int, first_step: int) -> None:
        self.log, self.first_step = log, first_step
        self.left = (log.config.epochs - epoch) * steps - first_step  # steps of the run
        self.done, self.samples, self.began = 0, 0, time.monotonic()
        self.tqdm = tqdm(
            total=steps,
            initial=first_step,
            desc=f"epoch {epoch + 1}/{log.config.epochs}",
            disable=not (log.run.is_main and sys.stderr.isatty()),
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt}{postfix}",
        )

    def advance(self, steps: int, means: dict[str, float], lr: float, samples: int, waited: float) -> None:
        """After an update: its steps, losses, rate and samples; seconds that this epoch has waited for data."""
        if self.tqdm.disable:
            return
        self.done += steps
        self.samples += samples
        seconds = time.monotonic() - self.began
        remaining = tqdm.format_interval(seconds / self.done * (self.left - self.done))
        losses = " ".join(f"{name} {value:.4g}{self._baseline(name)}" for name, value in means.items())
        self.tqdm.set_postfix_str(
            f"{losses}, lr {lr:.3g}, {self.samples / seconds:.3g} samples/s, data {waited / seconds:.0%}, "
            f"run ends in {remaining}",
            refresh=False,
        )
        self.tqdm.update(steps)

    def _baseline(self, name: str) -> str:
        return f" (ln K {self.log.chance[name]:.4g})" if name in self.log.chance else ""

    def close(self) -> None:
        self.tqdm.close()


def some_views(batch: Batch) -> Tensor | None:
    """Two views [2, n, H, W] of the first samples of a training batch, of a volume its middle slice; None: no pictures.

    Stays on the device, and does not wait for it.
    """
    if batch.crops is not None:
        views = batch.crops[0][:2, :IMAGES_SHOWN]
    elif batch.views is not None:
        views = batch.views[:2, :IMAGES_SHOWN, batch.views.shape[2] // 2]
    else:
        return None
    return views.detach().clone()


def contact_sheet(views: Tensor) -> Tensor:
    """[V, n, H, W] -> [1, V * H, n * W] in 0..1: a row per view, a column per sample."""
    low, high = views.amin(dim=(2, 3), keepdim=True), views.amax(dim=(2, 3), keepdim=True)
    scaled = (views - low) / (high - low).clamp(min=1e-6)
    V, n, H, W = views.shape
    return scaled.permute(0, 2, 1, 3).reshape(1, V * H, n * W)


def _tensorboard() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: is not installed; pip install tensorboard, or --tensorboard false") from None
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_project: wandb is not installed; pip install wandb, or leave the option out") from None
    return wandb


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    if rows:
        files.write_csv(rows, path)
    else:
        path.unlink(missing_ok=True)
