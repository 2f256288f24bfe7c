"""What a result was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

CODE = (":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)docs/results")


def commit() -> str:
    """The repository's commit, `unknown` outside git; `+changes` when files that git knows differ from it.

    Files of results do not count: who measures twice has changed them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", "--", *CODE) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
