"""Options: what wins, what is refused and how, what stands in --help and in config.yaml."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from utils import config as options
from utils.config import check, parse, save_yaml, to_dict
from utils.errors import UserError

SCRIPTS = [
    "ssl_swav2D",
    "mask_swav",
    "ssl_swav3D",
    "ssl_deepcluster2D",
    "mask_deepcluster",
    "ssl_deepcluster3D",
]


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def load(name: str) -> type:
    return importlib.import_module(name).Config


def refusal(capsys: pytest.CaptureFixture, config_class: type, *args: str) -> str:
    """What parse prints on stderr before it exits with code 2, without the usage (which lists every option)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse(config_class, args=list(args))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    return message[message.index("error: ") :]


def write_yaml(path: Path, **values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


# ------------------------------------------------------------------------------------------------ which value counts


def test_constants_then_yaml_then_command_line(tmp_path: Path) -> None:
    Config = load("ssl_swav3D")
    file = write_yaml(tmp_path / "my.yaml", epochs=7, base_lr=0.5, target_shape=[16, 64, 64])
    config = parse(Config, args=["--config", file, "--epochs", "3", "--target_shape", "[8,32,40]"])
    assert config.epochs == 3  # command line
    assert config.target_shape == [8, 32, 40]
    assert config.base_lr == 0.5  # file
    assert to_dict(config) == to_dict(Config()) | {"epochs": 3, "base_lr": 0.5, "target_shape": [8, 32, 40]}


def test_command_line_wins_even_before_the_file_and_of_two_files_the_later_one(tmp_path: Path) -> None:
    first, second = write_yaml(tmp_path / "1.yaml", epochs=7, seed=1), write_yaml(tmp_path / "2.yaml", epochs=9)
    config = parse(load("ssl_swav2D"), args=["--config", first, "--config", second])
    assert (config.epochs, config.seed) == (9, 1)
    config = parse(load("ssl_swav2D"), args=["--config", first, "--epochs=3"])
    assert config.epochs == 3


def test_without_arguments_the_constants_count(script: ModuleType) -> None:
    assert to_dict(parse(script.Config, args=[])) == to_dict(script.Config())


def test_edited_constants_are_the_defaults() -> None:
    """People edit the top of a script; those values are then what the command line overrides."""

    @dataclasses.dataclass
    class Config(load("ssl_swav2D")):
        epochs: int = 5
        batch_size: int = 6

    config = parse(Config, args=["--batch_size", "2"])
    assert (config.epochs, config.batch_size, config.feat_dim) == (5, 2, 128)


@pytest.mark.parametrize(
    ("given", "wanted"), [("12", 12), ("[3,4]", [3, 4]), ("0", 0)], ids=["number", "list", "automatic"]
)
def test_prototypes_are_a_number_or_a_list(given: str, wanted: int | list[int]) -> None:
    assert parse(load("ssl_swav3D"), args=["--nmb_prototypes", given]).nmb_prototypes == wanted
    assert parse(load("ssl_deepcluster3D"), args=["--nmb_prototypes_intra", given]).nmb_prototypes_intra == wanted


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("argument", ["--bogus", "--epoch", "--base-lr", "--EPOCHS"])
def test_unknown_and_shortened_options_are_refused(script: ModuleType, argument: str, capsys) -> None:
    assert argument in refusal(capsys, script.Config, argument, "5")


def test_a_stray_word_is_refused(capsys) -> None:
    assert "Training_Data" in refusal(capsys, load("ssl_swav2D"), "Training_Data")


@pytest.mark.parametrize(
    ("name", "field", "value", "why"),
    [
        ("ssl_swav2D", "epochs", "many", "many"),
        ("ssl_swav2D", "epochs", "1.5", "1.5"),
        ("ssl_swav2D", "epochs", "0", "v>0"),
        ("ssl_swav2D", "batch_size", "-4", "v>0"),
        ("ssl_swav2D", "workers", "-1", "v>=0"),
        ("ssl_swav2D", "queue_length", "-2", "v>=-1"),
        ("ssl_swav2D", "temperature", "0", "v>0"),
        ("ssl_swav2D", "temperature", "nan", "v>0"),
        ("ssl_swav2D", "wd", "-1e-6", "v>=0"),
        ("ssl_swav2D", "base_lr", "fast", "fast"),
        ("ssl_swav2D", "arch", "vgg16", "resnet50"),
        ("ssl_swav2D", "precision", "fp8", "bf16"),
        ("ssl_swav2D", "on_bad", "ignore", "skip"),
        ("ssl_swav2D", "size_crops", "224", "224"),
        ("ssl_swav2D", "size_crops", "[224,0]", "v>0"),
        ("ssl_swav2D", "nmb_prototypes", "-3", "-3"),
        ("ssl_swav2D", "nmb_prototypes", "[3,-3]", "-3"),
        ("mask_swav", "mask_ratio", "0", "v>0"),
        ("mask_swav", "mask_ratio", "1", "v<1"),
        ("mask_swav", "mask_style", "checkerboard", "span"),
        ("mask_swav", "dropout", "1.5", "v<=1"),
        ("ssl_swav3D", "target_shape", "[32,64]", "3 elements"),
        ("ssl_swav3D", "target_shape", "[32,64,64,1]", "3 elements"),
        ("ssl_swav3D", "target_shape", "64", "64"),
        ("ssl_swav3D", "target_shape", "[32,64,0]", "v>0"),
        ("ssl_swav3D", "lambda_inter", "-1", "v>=0"),
        ("ssl_deepcluster3D", "kmeans_backend", "sklearn", "faiss"),
        ("ssl_deepcluster3D", "kmeans_iterations", "0", "v>0"),
    ],
)
def test_a_wrong_value_is_refused_and_the_message_names_option_and_reason(
    name: str, field: str, value: str, why: str, capsys, tmp_path: Path
) -> None:
    message = refusal(capsys, load(name), f"--{field}={value}")
    assert f'"{field}"' in message
    assert why in message
    file = tmp_path / "my.yaml"
    file.write_text(f"{field}: {value}\n")
    message = refusal(capsys, load(name), "--config", str(file))
    assert field in message


def test_an_unknown_key_in_the_file_is_refused(script: ModuleType, tmp_path: Path, capsys) -> None:
    file = write_yaml(tmp_path / "my.yaml", epochs=3, learning_rate=0.1)
    assert "learning_rate" in refusal(capsys, script.Config, "--config", file)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path, capsys) -> None:
    assert "nowhere.yaml" in refusal(capsys, load("ssl_swav2D"), "--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "broken.yaml").write_text("epochs: [3\n")
    assert "config" in refusal(capsys, load("ssl_swav2D"), "--config", str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("ssl_swav2D", {"epochs": 10, "warmup_epochs": 10}, ["warmup_epochs", "epochs: 10", "--warmup_epochs 1"]),
        ("mask_swav", {"epochs": 5}, ["warmup_epochs", "epochs: 5", "--warmup_epochs 0"]),
        ("ssl_swav2D", {"size_crops": [224]}, ["size_crops", "nmb_crops", "min_scale_crops", "max_scale_crops"]),
        ("ssl_deepcluster2D", {"max_scale_crops": [1.0]}, ["max_scale_crops"]),
        (
            "ssl_swav2D",
            {"size_crops": [], "nmb_crops": [], "min_scale_crops": [], "max_scale_crops": []},
            ["size_crops"],
        ),
        ("ssl_swav2D", {"nmb_crops": [1, 6]}, ["nmb_crops", "at least 2"]),
        ("ssl_swav2D", {"min_scale_crops": [0.25, 0.5]}, ["min_scale_crops", "max_scale_crops", "0.5", "0.25"]),
        ("ssl_deepcluster2D", {"max_scale_crops": [1.5, 0.25]}, ["max_scale_crops", "1.5"]),
        ("ssl_swav3D", {"lambda_inter": 0.0, "lambda_intra": 0.0}, ["lambda_intra", "lambda_inter", "lambda_mask"]),
        ("mask_swav", {"target_shape": (1, 64, 64)}, ["target_shape", "2 slices"]),
        # Widths that the attention's 8 heads cannot share, and a view of a 2D image larger than the image:
        ("mask_swav", {"d_model": 30}, ["d_model", "8"]),
        ("ssl_deepcluster3D", {"d_model": 30}, ["d_model", "8"]),
        ("ssl_swav3D", {"min_scale_images": 1.5}, ["min_scale_images", "1.5"]),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(
    name: str, values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        check(load(name)(**values))
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ssl_swav2D", {"epochs": 1, "warmup_epochs": 0}),
        ("ssl_swav2D", {"nmb_crops": [2, 1], "min_scale_crops": [1.0, 0.25]}),
        ("ssl_swav3D", {"lambda_inter": 0.0, "lambda_intra": 0.0, "lambda_mask": 1.0}),
        ("mask_swav", {"target_shape": (2, 32, 32), "d_model": 8}),
    ],
)
def test_the_limits_themselves_are_allowed(name: str, values: dict[str, Any]) -> None:
    check(load(name)(**values))


def test_the_constants_of_every_script_pass_the_checks(script: ModuleType) -> None:
    check(script.Config())


def test_main_prints_one_line_and_exits_with_code_2(capsys) -> None:
    ran = []
    with pytest.raises(SystemExit) as stop:
        options.main(ran.append, load("mask_swav"), None, ["--epochs", "3"])
    assert stop.value.code == 2
    assert not ran  # refused before anything is built
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: warmup_epochs: ")
    assert err.count("\n") == 1


def test_main_shows_a_defect_as_a_traceback_and_not_as_the_users_mistake() -> None:
    def script(config: Any) -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        options.main(script, load("mask_swav"), None, [])


def test_main_hands_over_the_parsed_options() -> None:
    got = []
    options.main(got.append, load("mask_swav"), None, ["--epochs", "30", "--arch", "resnet18"])
    assert (got[0].epochs, got[0].arch, got[0].batch_size) == (30, "resnet18", 4)


# ------------------------------------------------------------------------------------------------ help


def docstrings(script: ModuleType) -> dict[str, str]:
    """Field -> the string under it in the source."""
    body = next(
        node.body
        for node in ast.parse(Path(script.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    found = {}
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            found[field.target.id] = below.value.value if documented else ""
    return found


def test_every_option_is_documented_and_its_default_shown(
    script: ModuleType, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = docstrings(script)
    assert set(texts) == {f.name for f in dataclasses.fields(script.Config)}
    assert [name for name, text in texts.items() if len(text) < 10] == []
    monkeypatch.setenv("COLUMNS", "300")  # one line per option
    with pytest.raises(SystemExit) as stop:
        options.main(script.main, script.Config, script.__doc__, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    assert script.__doc__.split("\n")[0] in flat
    shown_defaults = to_dict(script.Config())
    for name, text in texts.items():
        default = shown_defaults[name]
        default = "null" if default is None else default
        entry = re.search(rf"--{name}(,| )[^\n]*?{re.escape(' '.join(text.split()))} \(type: [^\n]*", shown)
        assert entry, f"--{name} is not described in --help"
        assert f"default: {default})" in entry[0].replace("(64, 128, 128)", "[64, 128, 128]"), entry[0]


def test_names_that_users_of_swav_know(script: ModuleType) -> None:
    fields = {f.name for f in dataclasses.fields(script.Config)}
    everywhere = "data_path epochs batch_size base_lr final_lr wd warmup_epochs start_warmup workers seed dump_path"
    everywhere += " checkpoint_freq checkpoint_minutes arch pretrained_path resnet_pretrained checkpoint_name precision"
    assert set(everywhere.split()) <= fields
    name = script.__name__
    if "mask" in name or "3D" in name:
        assert {"target_shape", "mask_ratio", "d_model"} <= fields
    if "mask" not in name:
        assert {"temperature", "nmb_prototypes"} <= fields
    if name.startswith("ssl_swav"):
        assert {"epsilon", "sinkhorn_iterations", "queue_length", "epoch_queue_starts"} <= fields
        assert "freeze_prototypes_niters" in fields
    assert ("trans_pretrained" in fields) == ("3D" in name)


def test_results_and_inputs_of_the_stages_fit_together() -> None:
    for method in ("swav", "deepcluster"):
        one, two, three = (load(f"{a}_{method}{b}")() for a, b in (("ssl", "2D"), ("mask", ""), ("ssl", "3D")))
        assert one.checkpoint_name == f"resnet_{method}2D.pth" == two.resnet_pretrained == three.resnet_pretrained
        assert two.checkpoint_name == f"mask_{method}.pth" == three.trans_pretrained
        assert three.checkpoint_name == f"{method}3D.pth"
        assert one.arch == two.arch == three.arch == "resnet50"
        assert (two.d_model, two.layers, two.target_shape) == (three.d_model, three.layers, three.target_shape)
        assert len({one.dump_path, two.dump_path, three.dump_path}) == 3


# ------------------------------------------------------------------------------------------------ plain values


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str)


def test_to_dict_is_plain_values_in_the_order_of_the_fields(script: ModuleType) -> None:
    config = parse(script.Config, args=["--base_lr", "1", "--workers", "2"])
    values = to_dict(config)
    assert plain(values)
    assert list(values) == [f.name for f in dataclasses.fields(script.Config)]
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_to_dict_turns_paths_and_tuples_into_plain_values_and_refuses_objects() -> None:
    @dataclasses.dataclass
    class Config:
        value: Any

    assert to_dict(Config((Path("a/b"), {"x": (True, 1.5)}))) == {"value": ["a/b", {"x": [True, 1.5]}]}
    assert to_dict(Config(True))["value"] is True
    with pytest.raises(TypeError, match="set"):
        to_dict(Config({1, 2}))


def test_the_saved_configuration_fed_back_changes_nothing(script: ModuleType, tmp_path: Path) -> None:
    args = ["--epochs", "12", "--base_lr", "1e-3", "--nmb_prototypes", "[3,4]", "--target_shape", "[8,32,32]"]
    args += ["--size_crops", "[32,16]", "--cache_path", str(tmp_path / "a b"), "--wd", "1e-7"]
    known = {f.name for f in dataclasses.fields(script.Config)}
    pairs = zip(args[::2], args[1::2], strict=True)
    config = parse(script.Config, args=[x for k, v in pairs if k[2:] in known for x in (k, v)])
    assert config.epochs == 12
    file = tmp_path / "config.yaml"
    save_yaml(to_dict(config), file)
    again = parse(script.Config, args=["--config", str(file)])
    assert to_dict(again) == to_dict(config)
    assert plain(to_dict(again))


def test_importing_a_script_parses_nothing(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--bogus"])
    importlib.reload(script)
