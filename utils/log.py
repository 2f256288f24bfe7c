"""What a run says of itself: a progress bar for people, metrics.csv for plots."""

from __future__ import annotations

import csv
import io
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils import checkpoint, distributed
from utils.config import save_yaml, to_dict
from utils.distributed import Run
from utils.errors import UserError


class Log:
    """Progress for people and metrics.csv for plots; silent on all processes but the first."""

    def __init__(self, folder: Path, config: Any, run: Run, first_epoch: int) -> None:
        self.run, self.config, self.path = run, config, folder / "metrics.csv"
        distributed.on_main(lambda: self._start(folder, first_epoch))

    def _start(self, folder: Path, first_epoch: int) -> None:
        config = self.config
        try:
            Path(config.pretrained_path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"pretrained_path: {config.pretrained_path} cannot be written ({error.strerror})") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_yaml(to_dict(config), folder / "config.yaml")
            rows = self._rows()
            if rows:  # drop what a run wrote after its last checkpoint
                self._write([row for row in rows if int(row["epoch"]) < first_epoch])
        except OSError as error:
            raise UserError(f"dump_path: {folder} cannot be written ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{self.path}: is not this run's table ({error}); move it away") from None

    def say(self, text: str) -> None:
        if self.run.is_main:
            print(text, flush=True)

    def bar(self, epoch: int, steps: int, first_step: int) -> tqdm:
        return tqdm(
            total=steps,
            initial=first_step,
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            disable=not (self.run.is_main and sys.stderr.isatty()),
            leave=False,
        )

    def row(
        self,
        epoch: int,
        means: dict[str, float],
        lr: float,
        seconds: float,
        waited: float,
        samples: int,
        bad_steps: int,
    ) -> None:
        """A line of metrics.csv; all processes call it together. Raises UserError when it cannot be written."""
        row = {
            "epoch": epoch,
            **{name: f"{value:.6g}" for name, value in means.items()},
            "lr": f"{lr:.6g}",
            "seconds": f"{seconds:.2f}",
            "samples_per_second": f"{samples / seconds:.2f}",
            "data_wait": f"{waited / seconds:.3f}",
            "peak_memory_mib": f"{peak_memory_mib(self.run.device):.0f}",
            "bad_steps": bad_steps,
        }
        distributed.on_main(lambda: self._write([*self._rows(), row]))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"epoch {epoch + 1:3d}/{self.config.epochs}  {shown}  lr {lr:.4g}  {seconds:.1f} s")

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        checkpoint.write_text(text.getvalue(), self.path)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has used so far: on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
