"""What tests share: the developers' data, which lie beside the repository and not in it, and a tiny tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_weights, write_data

from models.encoder import JointEncoder

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the developers' data in {SHARED}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the developers' data; a test that asks for it is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the developers' data in {SHARED}")
    return SHARED


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, most of all where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tree of `tiny.write_data`; tests must not change it."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def joint(tmp_path_factory: pytest.TempPathFactory) -> tuple[JointEncoder, str]:
    """A small joint encoder whose BatchNorm has statistics of its own, and the stage 3 file of it."""
    torch.manual_seed(3)
    made = JointEncoder("resnet18", 32, 1)
    for module in made.resnet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "joint.pth"
    save_weights(made, path, {"config": {"arch": "resnet18", "d_model": 32, "layers": 1}})
    return made.eval(), str(path)
