"""Options: constants < YAML < command line, and every mistake names its field."""

from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import yaml

import mask_swav
import ssl_swav2D
from utils import config
from utils.errors import UserError

SCRIPTS = [f"{kind}" for m in ("swav", "deepcluster") for kind in (f"ssl_{m}2D", f"mask_{m}", f"ssl_{m}3D")]


def test_precedence(tmp_path):
    (tmp_path / "my.yaml").write_text("epochs: 20\nbase_lr: 0.25\ntarget_shape: [32, 96, 96]\n")
    cfg = config.parse(mask_swav.Config, args=["--config", str(tmp_path / "my.yaml"), "--epochs", "30"])
    assert (cfg.epochs, cfg.base_lr, list(cfg.target_shape)) == (30, 0.25, [32, 96, 96])
    assert cfg.batch_size == mask_swav.Config().batch_size


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--epoch", "5"], "--epoch"),
        (["--nonsense", "5"], "nonsense"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "0"], "epochs"),
        (["--mask_ratio", "1"], "mask_ratio"),
        (["--mask_style", "odd"], "mask_style"),
        (["--target_shape", "[32, 32]"], "target_shape"),
        (["--arch", "vgg"], "arch"),
    ],
)
def test_a_wrong_option_is_named(args, names, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.parse(mask_swav.Config, args=args)
    assert stopped.value.code == 2
    assert names in capsys.readouterr().err.split("error:")[1]


def test_a_wrong_yaml_key_is_named(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("epoch: 20\n")
    with pytest.raises(SystemExit):
        config.parse(mask_swav.Config, args=["--config", str(tmp_path / "my.yaml")])
    assert "epoch" in capsys.readouterr().err.split("error:")[1]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs"),
        ({"nmb_crops": [2]}, "nmb_crops"),
        ({"nmb_crops": [1, 6]}, "nmb_crops"),
        ({"min_scale_crops": [0.5, 0.5], "max_scale_crops": [1.0, 0.25]}, "min_scale_crops"),
    ],
)
def test_rules_between_options(changes, names):
    with pytest.raises(UserError, match=names):
        config.check(dataclasses.replace(ssl_swav2D.Config(), **changes))
    config.check(ssl_swav2D.Config())
    with pytest.raises(UserError, match="d_model: 30 must be a multiple of 8"):
        config.check(mask_swav.Config(d_model=30))


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


def test_a_saved_configuration_reads_back_unchanged(tmp_path):
    cfg = config.parse(mask_swav.Config, args=["--epochs", "7", "--cache_path", "x"])
    config.save_yaml(config.to_dict(cfg), tmp_path / "config.yaml")
    assert config.parse(mask_swav.Config, args=["--config", str(tmp_path / "config.yaml")]) == cfg
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["epochs"] == 7


def test_what_a_user_can_put_right_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(config, "parse", lambda *_: SimpleNamespace())
    monkeypatch.setattr(config, "check", lambda _: (_ for _ in ()).throw(UserError("data_path: nothing there")))
    with pytest.raises(SystemExit) as stopped:
        config.main(lambda cfg: None, mask_swav.Config, None)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: data_path: nothing there\n"
