"""What a run says of itself: a bar for people, tables for plots, TensorBoard and W&B where they are asked for."""

from __future__ import annotations

import csv
import importlib
import secrets
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.cost import peak_memory
from utils import distributed, files
from utils.config import save_yaml, to_dict
from utils.distributed import Run
from utils.errors import UserError

METRICS, WARNINGS, WANDB_ID = "metrics.csv", "warnings.csv", "wandb_id"
FORMATS = {"seconds": ".2f", "samples_per_second": ".2f", "data_wait": ".3f", "peak_memory_mib": ".0f"}


class Log:
    """Progress for people, metrics.csv and warnings.csv; silent on all processes but the first.

    Raises UserError where TensorBoard or W&B were asked for and are not installed.
    """

    def __init__(self, folder: Path, config: Any, run: Run, first_epoch: int) -> None:
        self.run, self.config, self.folder = run, config, folder
        self._tensorboard = self._wandb = None
        distributed.on_main(lambda: self._start(first_epoch))

    def _start(self, first_epoch: int) -> None:
        config, folder = self.config, self.folder
        # Asked for before anything is written: what is missing must not leave half a run.
        tensorboard = _package("torch.utils.tensorboard", "tensorboard") if config.tensorboard else None
        wandb = _package("wandb", "wandb_project") if config.wandb_project else None
        try:
            Path(config.pretrained_path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"pretrained_path: {config.pretrained_path} cannot be made ({error.strerror})") from None
        save_yaml(to_dict(config), folder / "config.yaml")
        for name in (METRICS, WARNINGS):  # without what a run wrote after its last checkpoint
            if rows := self._rows(name):
                self._write(name, [row for row in rows if int(row["epoch"]) < first_epoch])
        if tensorboard:
            self._tensorboard = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
        if wandb:
            self._wandb = self._start_wandb(wandb)

    def _start_wandb(self, wandb: Any) -> Any:
        """A run of W&B that goes on where the interrupted one was: its id lies beside the checkpoints."""
        file = self.folder / WANDB_ID
        if not file.exists():
            files.write_text(secrets.token_hex(8), file)
        about = {"project": self.config.wandb_project, "name": self.folder.name, "config": to_dict(self.config)}
        return wandb.init(**about, id=file.read_text().strip(), resume="allow", dir=str(self.folder))

    def say(self, text: str) -> None:
        if self.run.is_main:
            print(text, flush=True)

    def bar(self, epoch: int, steps: int, first_step: int) -> tqdm:
        """The run on the terminal, from a step of an epoch on; nothing where there is none."""
        return tqdm(
            total=self.config.epochs * steps,
            initial=epoch * steps + first_step,
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            unit=" steps",
            disable=not (self.run.is_main and sys.stderr.isatty()),
            leave=False,
            bar_format="{desc} {percentage:.0f}%|{bar:9}| {n_fmt}/{total_fmt} {rate_fmt}, ends in {remaining}{postfix}",
        )

    def advance(self, bar: tqdm, steps: int, means: dict[str, float], lr: float, waited: float) -> None:
        """After an update: its steps, losses and rate; seconds that the bar's epoch has waited for data."""
        if bar.disable:
            return
        losses = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        share = waited / bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{losses}, lr {lr:.3g}, data {share:.0%}", refresh=False)
        bar.update(steps)

    def row(
        self, epoch: int, means: dict[str, float], values: dict[str, float], seconds: float, waited: float, samples: int
    ) -> None:
        """A line of metrics.csv: losses, speed, and further `values`, `lr` among them.

        All processes call it together. Raises UserError when it cannot be written.
        """
        speed = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "data_wait": waited / seconds,
            "peak_memory_mib": peak_memory(self.run.device) / 2**20,
        }
        values = {**means, "lr": values["lr"], **speed, **values}
        row = {"epoch": epoch, **{name: format(value, FORMATS.get(name, ".6g")) for name, value in values.items()}}
        distributed.on_main(lambda: self._write(METRICS, [*self._rows(METRICS), row]))
        self._publish(epoch, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"epoch {epoch + 1:3d}/{self.config.epochs}  {shown}  lr {values['lr']:.4g}  {seconds:.1f} s")

    def _publish(self, epoch: int, values: dict[str, float]) -> None:
        defined = {name: value for name, value in values.items() if value == value}  # neither of them plots nan
        if self._tensorboard:
            for name, value in defined.items():
                self._tensorboard.add_scalar(name, value, epoch)
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(defined, step=epoch)

    def warn(self, epoch: int, found: list[tuple[str, str]]) -> None:
        """(condition, text) of what became wrong: printed, and kept in warnings.csv. All processes call it together."""
        for _, text in found:
            self.say(f"warning: epoch {epoch + 1}: {text}")
        rows = [{"epoch": epoch, "condition": condition, "text": text} for condition, text in found]
        # Also without rows: on other hardware a figure may differ in its last bit and be no warning there.
        distributed.on_main(lambda: self._write(WARNINGS, [*self._rows(WARNINGS), *rows]))

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            files.write_csv(rows, self.folder / name)
        else:
            (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _package(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[-1]
        raise UserError(f"{option}: {name} is not installed; pip install {name}, or leave the option out") from None
