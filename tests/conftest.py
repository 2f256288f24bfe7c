"""What tests share: the developers' data, which lie beside the repository and not in it."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the developers' data in {SHARED}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the developers' data; a test that asks for it is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the developers' data in {SHARED}")
    return SHARED
