"""Whatever stands in a file, it is read or refused. Short form of benchmarks/fuzz.py."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import mask_swav
from benchmarks.fuzz import READERS, Refused, Volumes, all_readers, attempt
from datasets.index import inspect_tree, npy_header
from utils import checkpoint, config
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_mutated_inputs_are_read_or_refused():
    counts = all_readers(400, seed=1)
    assert counts["crashes"] == 0
    for kind in READERS:
        tried, refused = counts[f"{kind.__name__}: tried"], counts[f"{kind.__name__}: refused"]
        assert tried == refused + counts.get(f"{kind.__name__}: accepted", 0)
        assert 0 < refused < tried  # it is no reader that refuses or accepts everything
    assert counts["memory_grown_by_mib"] < 300


def test_the_fuzzer_sees_crashes(tmp_path):
    """A reader that fails, hangs or runs its input must not pass."""
    reader = Volumes(tmp_path / "x")

    def fail(_: bytes) -> None:
        raise IndexError

    def run(_: bytes) -> None:
        Path("planted").touch()

    reader.read = fail
    with pytest.raises(IndexError):
        attempt(reader, b"")
    reader.read = run
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(RuntimeError, match="executed"):
            attempt(reader, b"")


@pytest.mark.parametrize("version", [1, 2])
def test_a_hundred_bytes_that_claim_a_trillion_voxels_are_refused_at_once(version, tmp_path):
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000, 10000, 10000), }\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    (tmp_path / "Set").mkdir()
    (tmp_path / "Set" / "case.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text)
    assert (tmp_path / "Set" / "case.npy").stat().st_size < 100
    tracemalloc.start()
    began = time.monotonic()
    samples, (problem,) = inspect_tree(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples == []
    assert "is truncated" in problem
    assert "10000 x 10000 x 10000 float64 needs 80000000" in problem
    assert time.monotonic() - began < 1
    assert peak < 2**20


@few
@given(
    arrays.arrays(
        st.sampled_from(["<f4", ">f4", "<i2", ">u2", "|u1", "|i1", "<f8", "<f2", "<u4", ">i8"]),
        st.tuples(*[st.integers(1, 5)] * 3),
    ),
    st.booleans(),
)
def test_the_header_of_any_array_that_numpy_writes_is_read(tmp_path, array, fortran):
    path = tmp_path / "x.npy"
    np.save(path, np.asfortranarray(array) if fortran else array)
    shape, dtype, offset = npy_header(path)
    assert (shape, dtype) == (array.shape, array.dtype)
    assert offset + array.nbytes == path.stat().st_size


@few
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00v\x00\x00\x00{'descr': "])
)
def test_any_bytes_are_an_array_or_a_value_error(tmp_path, data, start):
    path = tmp_path / "x.npy"
    path.write_bytes(start + data)
    try:
        shape, dtype, offset = npy_header(path)
    except ValueError as error:
        assert len(str(error)) > 10  # noqa: PT017 - most inputs are refused, and all may be
    else:
        assert isinstance(dtype, np.dtype)
        assert 0 < offset <= len(start + data)
        assert all(isinstance(n, int) for n in shape)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@few
@given(plain)
def test_plain_yaml_reads_back(tmp_path, value):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    assert repr(config.read_yaml(path)) == repr(yaml.safe_load(path.read_text(encoding="utf-8")))


NAMES = list(config.to_dict(mask_swav.Config()))


@few
@given(st.dictionaries(st.sampled_from([*NAMES, "epoch", "x"]), plain, min_size=1, max_size=3))
def test_any_options_are_taken_or_refused(tmp_path, capsys, values):
    """What is taken has the type that it should have."""
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        found = config.parse(mask_swav.Config, None, ["--config", str(path)])
    except UserError:
        return
    except SystemExit as stopped:
        assert stopped.code == 2  # noqa: PT017
        return
    kinds = {name: type(value) for name, value in config.to_dict(mask_swav.Config()).items() if name != "cache_path"}
    assert {name: type(value) for name, value in config.to_dict(found).items() if name != "cache_path"} == kinds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("[" * 200, "nested|YAML"),
        ("a: !!python/name:os.system", "YAML"),
        ("a: [1", "YAML"),
        ("x: " + "y" * 200_000, "larger than"),
        ("- 1", "mapping of options"),
    ],
)
def test_yaml_that_is_refused(text, says, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"my\.yaml: .*({says})"):
        config.parse(mask_swav.Config, None, [f"--config={path}"])


def test_an_option_without_a_value_is_refused(tmp_path, capsys):
    path = tmp_path / "my.yaml"
    path.write_text("batch_size: 2\nepochs:\ncache_path:\n")
    with pytest.raises(SystemExit):
        config.parse(mask_swav.Config, None, ["--config", str(path)])
    assert "epochs: null is not a value of PositiveInt" in capsys.readouterr().err


@few
@given(
    st.dictionaries(st.text(max_size=8), st.integers() | st.floats(allow_nan=False) | st.text(max_size=8), max_size=4),
    arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 4)), elements=st.floats(width=32)),
)
def test_any_state_reads_back(tmp_path, values, array):
    state = {"learner": {"w": torch.from_numpy(array)}, "values": values, "epoch": 0, "seen": 3}
    checkpoint.save(state, tmp_path)
    found, _ = checkpoint.read(tmp_path / checkpoint.LATEST)
    assert repr(found) == repr(state)


def test_refused_is_what_the_fuzzer_calls_refused(tmp_path):
    reader = Volumes(tmp_path / "x")
    assert attempt(reader, reader.seeds[0]) == "accepted"
    assert attempt(reader, b"\x93NUMPY") == "refused"
    with pytest.raises(Refused):
        reader.read(b"")
