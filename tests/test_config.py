"""Options: constants < YAML < command line, and every mistake names its field."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import subprocess
import sys

import pytest

import mask_swav
import ssl_swav2D
import ssl_swav3D
from training.scripts import SCRIPTS
from utils import checkpoint, config, distributed, files
from utils.errors import UserError


def test_precedence_and_a_saved_configuration_reads_back_unchanged(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("epochs: 20\nbase_lr: 0.25\ntarget_shape: [32, 96, 96]\n")
    cfg = config.parse(mask_swav.Config, args=["--config", str(file), "--epochs", "30", "--cache_path", "x"])
    assert (cfg.epochs, cfg.base_lr, list(cfg.target_shape)) == (30, 0.25, [32, 96, 96])
    assert cfg.batch_size == mask_swav.Config().batch_size
    config.save_yaml(config.to_dict(cfg), file)
    assert config.parse(mask_swav.Config, args=["--config", str(file)]) == cfg


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--epoch", "5"], "did you mean --epochs?"),
        (["--epochs", "0"], "epochs: must be PositiveInt"),
        (["--mask_style", "odd"], "mask_style: must be Literal['random', 'span']"),
        ("seed: 3\nepochs: null", "epochs: null is not PositiveInt"),
        ("epochs: [1", "--config"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(given, says, tmp_path, capsys):
    if isinstance(given, str):
        (tmp_path / "my.yaml").write_text(given)
        given = ["--config", str(tmp_path / "my.yaml")]
    with pytest.raises(SystemExit) as stopped:
        config.main(print, mask_swav.Config, None, given)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line.removeprefix("error: ")


def test_rules_between_options():
    for changes in ({"warmup_epochs": 5, "epochs": 5}, {"nmb_crops": [1, 6]}, {"base_lr": float("inf")}):
        with pytest.raises(UserError, match=next(iter(changes))):
            config.check(dataclasses.replace(ssl_swav2D.Config(), **changes))
    with pytest.raises(UserError, match="d_model: 30 must be a multiple of 8"):
        config.check(mask_swav.Config(d_model=30))
    one_slice = {"target_shape": (1, 64, 64)}
    config.check(ssl_swav3D.Config(**one_slice))  # masks none: lambda_mask is 0
    with pytest.raises(UserError, match="target_shape: masking"):
        config.check(mask_swav.Config(**one_slice))


READERS = [config.read_yaml, checkpoint.read, lambda path: files.read_csv(path, "labels"), files.read_json]


@pytest.mark.parametrize("read", READERS)
def test_a_pipe_or_folder_where_a_file_belongs_is_refused(read, tmp_path):
    """To open a pipe into which nobody writes would wait for ever."""
    os.mkfifo(tmp_path / "x")
    for path, says in ((tmp_path / "x", "x: is a pipe or device"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=says):
            read(path)


@pytest.mark.parametrize(("content", "says"), [(None, "is a pipe"), ("epochs: &a 3\nseed: *a", "aliases")])
def test_a_config_that_is_no_plain_file_is_one_line(content, says, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    os.mkfifo(path) if content is None else path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        config.main(print, mask_swav.Config, None, ["--config", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_run_goes_on_where_its_output_cannot_be_written():
    code = "from utils import config; import mask_swav; config.main(print, mask_swav.Config, None, [])"
    done = subprocess.run(f"{sys.executable} -c '{code}' > /dev/full", shell=True, capture_output=True, text=True)
    assert done.returncode == 0
    assert "warning: output is lost (No space left on device)" in done.stderr


def test_half_a_group_in_the_environment_is_said(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"RANK: is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not.*unset RANK"):
        distributed.start("cpu")


DEEP = {"flow": "[" * 100_000, "map": "{a: " * 100_000, "block": "- " * 100_000}


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x", "a: " + "9" * 2**20, *DEEP.values()], ids=["alias", "large", *DEEP]
)
def test_yaml_that_could_stand_for_gigabytes_or_take_minutes_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml: .*aliases"):
        config.read_yaml(tmp_path / "x.yaml")


def test_depth_that_files_have_is_read_and_json_of_any_depth_is_no_crash(tmp_path):
    (tmp_path / "x").write_text("a:\n- b: [1, {c: 2}]\n- d:\n  - e\n" + "".join(f"k{i}: [1]\n" for i in range(99)))
    assert config.read_yaml(tmp_path / "x")["a"] == [{"b": [1, {"c": 2}]}, {"d": ["e"]}]
    (tmp_path / "x").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="too deeply"):
        files.read_json(tmp_path / "x")


@pytest.mark.parametrize("name", ["x" * 300, "loop/a"])
def test_a_path_that_cannot_be_is_one_line(name, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SystemExit) as stopped:
        config.main(lambda cfg: os.stat(cfg.data_path), mask_swav.Config, None, ["--data_path", str(tmp_path / name)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: " in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_field(script, capsys):
    module = importlib.import_module(script)
    config.check(module.Config())
    with pytest.raises(SystemExit):
        config.parse(module.Config, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(module.Config):
        start = text.index(f"--{field.name} ", text.index("options:"))
        about = text[start:].split("\n  --")[0]
        assert "default:" in about
        assert len(about.split("(type:")[0].split()) > 3, f"{field.name} has no explanation"


def test_names_that_a_spreadsheet_would_calculate_are_texts_in_csv_and_come_back(tmp_path):
    names = ["=cmd|' /C calc'!A0", "@SUM(1)", "+a", "-b", "'=c", "-1.5 0 2", "plain", "'quoted'"]
    files.write_csv(
        [{"name": name, "value": value} for name, value in zip(names, range(8), strict=True)], tmp_path / "a.csv"
    )
    with open(tmp_path / "a.csv", newline="") as file:
        cells = [line[0] for line in csv.reader(file)][1:]
    assert [cell.startswith("'") for cell in cells] == [True] * 5 + [False, False, True]
    assert [row["name"] for row in files.read_csv(tmp_path / "a.csv", "x")] == names
