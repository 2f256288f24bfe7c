"""Everybody's weights: each known layout by its true names, the right one of several networks, or a refusal by name."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import struct
import sys
import types
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from models.resnet import GreyResNet, fold_grey
from training import layouts, loading
from utils import checkpoint, tensors
from utils.errors import UserError
from utils.tensors import Inert, Stored

timm = pytest.importorskip("timm")
State = dict[str, Any]
STEM = "conv1.weight"
MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)


def stored(state: dict[str, torch.Tensor]) -> State:
    """A state dict as it is seen in a file."""
    return {name: Stored(tuple(value.shape), lambda value=value: value) for name, value in state.items()}


@pytest.fixture(scope="module")
def pair(weights) -> tuple[State, State]:
    """Two networks: one that is to be taken, and another."""
    return stored(weights), stored(weights)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


def under(prefix: str, state: State, fc: bool = False) -> State:
    return {prefix + name: value for name, value in state.items() if fc or not name.startswith("fc.")}


def numbered(state: State) -> State:
    """nn.Sequential(*resnet.children())."""
    order = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc"  # of the children
    place = {name: str(k) for k, name in enumerate(order.split())}
    return {".".join([place[(part := name.split("."))[0]], *part[1:]]): value for name, value in state.items()}


def hugging_face(state: State) -> State:
    """transformers.ResNetModel."""
    names = {}
    for name, value in under("", state).items():
        stage, *rest = name.split(".")
        kind = "convolution" if "conv" in name or "downsample.0" in name else "normalization"
        if not stage.startswith("layer"):
            names[f"embedder.embedder.{kind}.{rest[-1]}"] = value
            continue
        part = "shortcut" if rest[1] == "downsample" else f"layer.{int(rest[1][-1]) - 1}"
        names[f"encoder.stages.{int(stage[-1]) - 1}.layers.{rest[0]}.{part}.{kind}.{rest[-1]}"] = value
    assert {"embedder.embedder.convolution.weight", "encoder.stages.1.layers.0.shortcut.convolution.weight"} <= set(
        names
    )
    assert "encoder.stages.3.layers.1.layer.1.normalization.running_mean" in names
    return names


def wrapped(state: State) -> State:
    """torch.compile around FSDP around a network whose blocks are checkpointed."""
    inner = {name.replace(".0.", ".0._checkpoint_wrapped_module.", 1): value for name, value in state.items()}
    return under("_orig_mod._fsdp_wrapped_module.", inner)


HEAD = Stored((4, 4), lambda: torch.ones(4, 4))
OPTIMIZER = {"state": {0: {"momentum_buffer": HEAD, "step": 3}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
Rows = dict[str, Callable[[State, State], State]]
ONE: Rows = {
    "torchvision": lambda a, b: a,
    "DINO's published ResNet, Barlow Twins, VICReg": lambda a, b: under("", a),
    "grey": lambda a, b: a | {STEM: Stored((64, 1, 7, 7), a[STEM].read)},
    "SwAV": lambda a, b: (
        under("module.", a) | {"module.projection_head.0.weight": HEAD, "module.prototypes.weight": HEAD}
    ),
    "DeepCluster-v2": lambda a, b: {
        "epoch": 800,
        "state_dict": under("module.", a) | {"module.prototypes.prototypes0.weight": HEAD},
        "optimizer": OPTIMIZER,
    },
    "VISSL": lambda a, b: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", a), "heads": {"0.clf.weight": HEAD}}}
        }
    },
    "Barlow Twins": lambda a, b: {
        "epoch": 1,
        "model": under("module.backbone.", a) | {"module.projector.0.weight": HEAD},
    },
    "SimSiam": lambda a, b: {"state_dict": under("module.encoder.", a) | {"module.predictor.0.weight": HEAD}},
    "SimCLR": lambda a, b: {"state_dict": under("backbone.", a) | {"backbone.fc.0.weight": HEAD}},
    "RadImageNet": lambda a, b: under("backbone.", numbered(under("", a))),
    "fastai": lambda a, b: {"model": under("0.", numbered(under("", a))) | {"1.8.weight": HEAD}, "opt": OPTIMIZER},
    "numbered": lambda a, b: numbered(under("", a)),
    "stem in layer0": lambda a, b: {
        name.replace("conv1", "layer0.0", 1).replace("bn1", "layer0.1", 1) if name[0] in "cb" else name: value
        for name, value in under("", a).items()
    },
    "Hugging Face": lambda a, b: under("resnet.", hugging_face(a)) | {"classifier.1.weight": HEAD},
    "Hugging Face's model without a head": lambda a, b: hugging_face(a),
    "Lightning with OmegaConf": lambda a, b: {
        "state_dict": under("model.", a),
        "hyper_parameters": Inert("omegaconf"),
        "callbacks": {Inert(): {"best": HEAD}},
        "optimizer_states": [OPTIMIZER],
    },
    "MMPretrain, MMEngine": lambda a, b: {
        "meta": {"cfg": "..."},
        "state_dict": under("backbone.", a) | {"head.fc.weight": HEAD},
        "message_hub": Inert(),
        "optimizer": OPTIMIZER,
    },
    "compiled, sharded, checkpointed": lambda a, b: {"model": wrapped(a)},
    "torchvision's detectors": lambda a, b: under("backbone.body.", a) | {"rpn.head.cls_logits.weight": HEAD},
    "GLoRIA": lambda a, b: {"state_dict": under("gloria.img_encoder.model.", a) | {"gloria.text_encoder.x": HEAD}},
    "MONAI": lambda a, b: {"net": a, "optim": OPTIMIZER},
    "this project's checkpoint": lambda a, b: {"learner": under("encoder.", a) | {"head.0.weight": HEAD}, "epoch": 3},
    "this project's stage 3": lambda a, b: under("encoder.", a) | {"projection.weight": HEAD},
    "numbers as keys": lambda a, b: {0: a, 1: {2: HEAD}},
} | {
    wrapper: lambda a, b, wrapper=wrapper: {wrapper: a}
    for wrapper in (
        *("net", "network", "weights", "encoder", "backbone", "teacher", "student", "module", "params"),
        *("ema_state_dict", "online_network_state_dict", "model_state_dict", "state_dict_ema", "model_ema"),
    )
}
SEVERAL: Rows = {
    "MoCo": lambda a, b: {
        "arch": "resnet50",
        "state_dict": under("module.encoder_q.", a, fc=True)
        | under("module.encoder_k.", b, fc=True)
        | {"module.queue": HEAD},
    },
    "MoCo v3": lambda a, b: {"state_dict": under("module.base_encoder.", a) | under("module.momentum_encoder.", b)},
    "MoCo of MMSelfSup": lambda a, b: {
        "state_dict": under("backbone.", a) | under("encoder_q.0.", a) | under("encoder_k.module.0.", b)
    },
    "DINO": lambda a, b: {
        "student": under("module.backbone.", b) | {"module.head.mlp.0.weight": HEAD},
        "teacher": under("backbone.", a) | {"head.mlp.0.weight": HEAD},
        "optimizer": OPTIMIZER,
        "args": Inert(),
        "dino_loss": {"center": HEAD},
    },
    "DINO of lightly": lambda a, b: {"state_dict": under("student_backbone.", b) | under("teacher_backbone.", a)},
    "DINO of lightly's benchmarks": lambda a, b: {"state_dict": under("backbone.", a) | under("student_backbone.", b)},
    "BYOL": lambda a, b: {
        "online_network_state_dict": under("encoder.", numbered(under("", a))) | {"projetion.net.0.weight": HEAD},
        "target_network_state_dict": under("encoder.", numbered(under("", b))),
        "optimizer_state_dict": OPTIMIZER,
    },
    "BYOL of lucidrains": lambda a, b: (
        under("net.", a) | under("online_encoder.net.", a) | under("target_encoder.net.", b)
    ),
    "BYOL of MMSelfSup": lambda a, b: {"state_dict": under("backbone.", a) | under("target_net.module.0.", b)},
    "PixPro": lambda a, b: {"model": under("module.encoder.", a) | under("module.encoder_k.", b)},
    "solo-learn": lambda a, b: {
        "state_dict": under("backbone.", a) | under("momentum_backbone.", b) | {"projector.0.weight": HEAD},
        "hyper_parameters": Inert(),
    },
    "lightly's MoCo": lambda a, b: under("backbone.", numbered(a)) | under("backbone_momentum.", numbered(b)),
    "timm's train.py": lambda a, b: {
        "arch": "resnet18",
        "state_dict": b,
        "state_dict_ema": a,
        "args": Inert(),
        "optimizer": OPTIMIZER,
    },
    "torchvision's reference": lambda a, b: {
        "model": b,
        "model_ema": under("module.", a, fc=True) | {"n_averaged": HEAD},
        "optimizer": OPTIMIZER,
        "args": Inert(),
    },
    "MMEngine's average": lambda a, b: {
        "state_dict": under("backbone.", a),
        "ema_state_dict": under("module.backbone.", b),
    },
}


def turned(value: Any) -> Any:
    """The same with every dictionary in the opposite order."""
    return {key: turned(part) for key, part in reversed(value.items())} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_the_right_network_is_found_whatever_the_order_and_the_format(name, pair):
    content = (ONE | SEVERAL)[name](*pair)
    flat = tensors.flat(content)
    for state in (flat, tensors.flat(turned(content)), dict(reversed(flat.items()))):  # the last: in safetensors
        network, said = loading.network_in(state, Path("x"), "resnet18")
        grey = name == "grey"  # its stem is another tensor
        assert all(network[key] is value for key, value in under("", pair[0]).items() if not (grey and key == STEM))
        assert ("taken: " in said) == ("also there: " in said) == (name in SEVERAL)
    if name == "MoCo":
        assert said == "; taken: state_dict.module.encoder_q, also there: state_dict.module.encoder_k"


def meta(make: Callable[..., nn.Module], *args: Any, **options: Any) -> State:
    with torch.device("meta"):
        return stored(make(*args, **options).state_dict())


zoo = torchvision.models
KINDS: dict[str, tuple[Callable[[], State], str]] = {
    "another depth": (lambda: meta(zoo.resnet18), "holds a resnet18, to be loaded as a resnet50; add --arch resnet18"),
    "ViT of Hugging Face": (lambda: {"vit.embeddings.cls_token": HEAD}, "vision transformer"),
    "deeper": (lambda: meta(zoo.resnet101), "--arch resnet101"),
    "wide": (lambda: meta(zoo.wide_resnet50_2), "--arch wide_resnet50_2"),
    "ResNeXt": (lambda: meta(zoo.resnext50_32x4d), r"a ResNeXt \(32 groups\)"),
    "3D": (lambda: meta(zoo.video.r3d_18) | {"layer1.0.conv1.weight": HEAD}, "3D convolutions"),
    "deep stem": (lambda: meta(timm.create_model, "resnet50d"), "stem of several convolutions"),
    "SE": (lambda: meta(timm.create_model, "seresnet50"), "attention in its blocks"),
    "CIFAR": (lambda: meta(zoo.resnet50) | {"conv1.weight": Stored((64, 3, 3, 3), HEAD.read)}, "3 x 3 pixels"),
    "cut": (lambda: {k: v for k, v in meta(zoo.resnet50).items() if "layer4" not in k}, r"3 \+ 4 \+ 6 \+ 0 blocks"),
    "twice as wide": (lambda: meta(timm.create_model, "resnet50", base_width=256), "a wide ResNet-50"),
    "GroupNorm": (lambda: meta(timm.create_model, "resnet50_gn"), "running_mean is missing"),
    "ViT": (lambda: meta(zoo.vit_b_16), "vision transformer"),
    "ViT of timm": (lambda: meta(timm.create_model, "vit_tiny_patch16_224"), "vision transformer"),
    "Swin": (lambda: meta(zoo.swin_t), "Swin"),
    "ConvNeXt": (lambda: meta(timm.create_model, "convnext_nano"), "ConvNeXt"),
    "DenseNet": (lambda: meta(zoo.densenet121), "DenseNet"),
    "EfficientNet": (lambda: meta(timm.create_model, "efficientnet_b0"), "EfficientNet"),
    "VGG": (lambda: meta(zoo.vgg11), "VGG"),
    "RegNet": (lambda: {"trunk_output.block1.block1-0.proj.0.weight": HEAD}, "RegNet"),
    "BiT": (lambda: meta(timm.create_model, "resnetv2_50"), "ResNet-v2"),
    "detectron2": (lambda: {"backbone.bottom_up.stem.conv1.norm.weight": HEAD}, "detectron2"),
    "something": (lambda: {"a": HEAD}, r"no ResNet that is known here \(a\)"),
}


def load(state: State, arch: str) -> None:
    network, _ = loading.network_in(state, Path("x"), arch)
    with torch.device("meta"):
        resnet = GreyResNet(arch)
    loading.require_fit(resnet, loading.in_grey(resnet, network), Path("x"))


@pytest.mark.parametrize("kind", KINDS)
def test_another_network_is_refused_by_name(kind):
    make, says = KINDS[kind]
    with pytest.raises(UserError, match=says):
        load(make(), "resnet50")


# ---- files


class Settings:
    """A class that nobody else has."""


@pytest.mark.parametrize("fmt", ["zip", "older", "safetensors"])
def test_a_file_with_foreign_objects_or_a_whole_module_loads(fmt, weights, tmp_path, monkeypatch):
    module = types.ModuleType("gone")
    module.Settings, Settings.__module__ = Settings, "gone"
    monkeypatch.setitem(sys.modules, "gone", module)
    resnet, path = GreyResNet("resnet18"), tmp_path / "x.ckpt"
    net = torchvision.models.resnet18()
    net.load_state_dict(weights)
    net.config = config = Settings()
    config.listed, config.by_name = [np.ones(3), {1}, Path("a")], Namespace(lr=np.float64(0.1))
    for content in ({"cfg": config, "state_dict": weights}, nn.DataParallel(net), {"model": net, 3: config}):
        if fmt == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(weights, path)
        else:
            torch.save(content, path, _use_new_zipfile_serialization=fmt == "zip")
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "gone")
            loading.load_resnet(resnet, path)
        assert torch.equal(resnet.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    content = path.read_bytes()
    for end in (len(content) - 1, len(content) // 2, 40):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"x\.ckpt: .*(damaged or cut short: copy|interrupted)"):
            loading.load_resnet(resnet, path)


def test_views_and_every_type_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
        torch.bool,
    )
    state = {str(kind): base.to(kind) for kind in kinds} | {"scalar": torch.tensor(3), "empty": torch.empty(0, 4)}
    state |= {
        "view": base[1:, ::2],
        "turned": base.T,
        "parameter": nn.Parameter(base),
        "fp8": base.to(torch.float8_e4m3fn),
    }
    for zipped in (True, False):
        torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        with tensors.opened(tmp_path / "x") as content:
            found = {name: value.read() for name, value in tensors.flat(content).items()}
        assert found.keys() == state.keys()
        for name, value in found.items():
            assert (value.dtype, value.shape) == (state[name].dtype, state[name].shape)
            assert torch.equal(value.float(), state[name].float()), name


def archive(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return data.getvalue()


def npz() -> bytes:
    np.savez(data := io.BytesIO(), a=np.ones(3))
    return data.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "LFS pointer.*git lfs pull"),
    "page.pth": (b"\n<!DOCTYPE html><html>", "a web page.*download"),
    "error.pth": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "server's error message"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5.*PyTorch file"),
    "net.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.6.0", "an ONNX graph"),
    "saved_model.pb": (b"\x08\x01\x12\xd4\x01", "TensorFlow"),
    "x.pth.gz": (gzip.compress(b"a"), "compressed, not weights; unpack it"),
    "x.tar": (b"a" * 257 + b"ustar" + bytes(250), "tar archive"),
    "detectron.pkl": (pickle.dumps({"model": {"a": np.ones(3)}}), "plain pickle.*detectron2"),
    "model.safetensors.index.json": (b'{"weight_map": {}}', "a JSON text, such as an index"),
    "a.npy": (b"\x93NUMPY\x01\x00" + bytes(99), "NumPy array"),
    "a.npz": (npz(), "NumPy arrays"),
    "download.zip": (archive({"net/ResNet50.pt": b"a"}), "holds net/ResNet50.pt; unpack"),
    "other.zip": (archive({"a.docx": b"a"}), "zip archive of other things"),
    "script.pt": (archive({"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/a.py": b""}), r"TorchScript.*'new\.pth'"),
    "program.pt2": (archive({"m/archive_format": b"pt2", "m/data/weights/w": b""}), r"torch\.export"),
    "squeezed.pth": (archive({"m/data.pkl": bytes(9)}, zipfile.ZIP_DEFLATED), "compressed, which torch.save never"),
    "big.pth": (archive({"m/data.pkl": b"N.", "m/byteorder": b"big"}), "big-endian"),
    "notes.txt": (b"hello", "is a text"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\x00", "of no kind that is known"),
    "zeros.pth": (bytes(999), "zeros, as an interrupted download"),
    "nothing.pth": (b"", "is empty"),
    "none.pth": (archive({"m/data.pkl": b"N."}), "holds no tensors"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_weights_file_is_named_and_left_alone(name, tmp_path):
    content, says = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s){name}: .*{says}"):
        loading.load_resnet(GreyResNet("resnet18"), tmp_path / name)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_and_the_remedy_for_it(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    net = torchvision.models.resnet18().eval()
    net.load_state_dict(weights)
    torch.jit.save(torch.jit.trace(net, torch.ones(1, 3, 32, 32)), "net.pt")
    with pytest.raises(UserError) as error:
        loading.load_resnet(GreyResNet("resnet18"), Path("net.pt"))
    exec(str(error.value).split("source: ")[1], {"torch": torch})
    loading.load_resnet(resnet := GreyResNet("resnet18"), Path("new.pth"))
    assert torch.equal(resnet.bn1.weight, weights["bn1.weight"])


def test_folders_pipes_and_what_is_not_there_are_named(tmp_path):
    (tmp_path / "model.safetensors").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, r"name the file in it \(model\.safetensors\)"),
        (tmp_path / "pipe", "a pipe or device"),
    ):
        with pytest.raises(UserError, match=says):
            loading.load_resnet(GreyResNet("resnet18"), path)
    with pytest.raises(UserError, match="no such weights file; look elsewhere"):
        loading.load_resnet(GreyResNet("resnet18"), tmp_path / "no", "look elsewhere")


# ---- attacks


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def storage(count: int, key: str = "0") -> bytes:
    return b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    hooks = named("collections", "OrderedDict") + b")R"
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage(count)
        + number(0)
        + b"".join(sizes)
        + b"\x89"
        + hooks
        + b"tR"
    )


TOUCH = text("touch ran")
CALL = b"(" + TOUCH + b"t"
RUN = {  # each leaves the file `ran` behind if anything in it is called
    "reduce": named("os", "system") + CALL + b"R",
    "eval": named("builtins", "eval") + b"(" + text("open('ran', 'w')") + b"tR",
    "exec": named("builtins", "exec") + b"(" + text("open('ran', 'w')") + b"tR",
    "open": named("io", "open") + b"(" + text("ran") + text("w") + b"tR",
    "class": named("subprocess", "Popen") + b"((" + text("touch") + text("ran") + b"ltR",
    "new": named("subprocess", "Popen") + b"((" + text("touch") + text("ran") + b"lt\x81",
    "new with names": named("pathlib", "Path") + b"(" + text("ran") + b"t}\x92" + text("touch") + b"b",
    "inst": b"(" + TOUCH + b"ios\nsystem\n",
    "obj": b"(" + named("os", "system") + TOUCH + b"o",
    "dotted": text("torch") + text("serialization.os.system") + b"\x93" + CALL + b"R",
    "getattr": named("builtins", "getattr") + b"(" + named("torch.hub", "os") + text("system") + b"tR" + CALL + b"R",
    "torch.hub": named("torch.hub", "load") + b"(" + text(".") + text("ran") + b"tR",
    "torch.load": named("torch.serialization", "load") + b"(" + text("ran") + b"tR",
    "numpy": named("numpy.testing._private.utils", "runstring") + b"(" + text("open('ran','w')") + b"}tR",
    "through torch": named("torch._tensor", "_rebuild_from_type_v2")
    + b"("
    + named("os", "system")
    + b"N"
    + CALL
    + b"NtR",
    "state of a function": named("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__code__") + b"Ns\x86b",
    "state of a class": named("collections", "OrderedDict") + b"}" + text("__init__") + named("os", "system") + b"sb",
    "setitem": named("os", "environ") + text("ran") + text("1") + b"s",
    "hooks": named("torch._utils", "_rebuild_parameter") + b"(N\x89" + named("os", "system") + CALL + b"RtR",
    "storage": b"(" + text("storage") + named("os", "system") + CALL + b"R" + text("0") + text("cpu") + b"K\x01tQ",
    "extension": b"\x82\x01",
}
HUGE = 2**31
CLAIM = {  # each claims gigabytes, in a few hundred bytes
    "storage": tensor((HUGE,), (1,), HUGE),
    "tensor": tensor((HUGE,), (1,), 4),
    "stem": b"}" + text(STEM) + tensor((HUGE // 8, 3, 1, 1), (3, 1, 1, 1), HUGE) + b"s",
    "stem of one number": b"}" + text(STEM) + tensor((HUGE // 8, 3, 1, 1), (0, 0, 0, 0), 4) + b"s",
    "shape": tensor((2**15, 2**15, 2**15), (0, 0, 0), 4),
    "overlapping": tensor((2**15, 2**16), (1, 1), 4),
    "negative": tensor((-4,), (-1,), 4),
    "bytes": b"\x8e" + struct.pack("<Q", HUGE),
    "bytearray": b"\x96" + struct.pack("<Q", HUGE),
    "string": b"\x8d" + struct.pack("<Q", HUGE),
    "memo": b"Nr" + struct.pack("<I", HUGE),
    "frame": b"\x95" + struct.pack("<Q", HUGE),
    "number": b"\x8b" + struct.pack("<i", HUGE - 1),
}
heard: list[str] = []
listening = False


def _listen(event: str, arguments: tuple) -> None:
    if listening and event in ("os.system", "subprocess.Popen", "exec", "compile", "import"):
        heard.append(f"{event} {arguments[:1]}")


def legacy(content: bytes, keys: int = 0) -> bytes:
    order = pickle.dumps([str(k) for k in range(keys)], 2)
    head = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    content = content.replace(b"tQ", b"NtQ")  # its storages have one more entry
    return head + b"\x80\x02" + content + b"." + order + struct.pack("<q", HUGE) * keys + bytes(16)


@pytest.mark.parametrize("attack", [*(f"run {name}" for name in RUN), *(f"claim {name}" for name in CLAIM)])
def test_nothing_in_a_file_runs_and_no_claim_is_believed(attack, tmp_path, monkeypatch):
    global listening
    kind, name = attack.split(" ", 1)
    content = (RUN if kind == "run" else CLAIM)[name]
    monkeypatch.chdir(tmp_path)
    zipfile.ZipFile(io.BytesIO(archive({"m": b""}))).namelist()  # its own imports come now
    if _listen not in HOOKS:
        sys.addaudithook(_listen)
        HOOKS.append(_listen)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    has_storage = b"FloatStorage" in content
    zipped = archive({"m/data.pkl": b"\x80\x04" + content + b".", "m/data/0": bytes(16), "m/version": b"3\n"})
    for data in (zipped, legacy(content, keys=has_storage)):
        Path("x.pth").write_bytes(data)
        assert len(data) < 1000
        heard.clear()
        listening = True
        try:
            with tensors.opened(Path("x.pth")) as opened:
                found = {key: value.read() for key, value in tensors.flat(opened).items()}
        except UserError:
            found = {}
        finally:
            listening = False
        assert not found
        assert not Path("ran").exists()
        assert heard == []
        assert "ran" not in os.environ
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    legal = tensors.Unpickler(io.BytesIO(b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"."))
    assert legal.load().__func__.__code__ is tensors.Unpickler._tensor.__code__


HOOKS: list[Any] = []


def test_a_checkpoint_that_claims_gigabytes_or_is_a_pipe_is_refused(tmp_path):
    """The seal is right: whoever makes such a file can compute it."""
    path = tmp_path / checkpoint.LATEST
    data = archive({"m/data.pkl": b"\x80\x02" + CLAIM["tensor"] + b".", "m/data/0": bytes(16)})
    path.write_bytes(data + checkpoint.SEAL + hashlib.sha256(data).hexdigest().encode())
    with pytest.raises(UserError, match=r"checkpoint\.pth: .*claims 8589934592 bytes, of which 16 are there"):
        checkpoint.read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe or device"):
        checkpoint.read(path)


def test_no_nesting_multiplies_what_is_read():
    laugh: Any = {"a": HEAD}
    for _ in range(60):
        laugh = {"l": laugh, "r": laugh}
    assert len(tensors.flat(laugh)) == 1
    deep: Any = HEAD
    for _ in range(10**5):
        deep = [deep]
    assert tensors.flat(deep) == {}
    with pytest.raises(ValueError, match=r"two tensors are called a\.b"):
        tensors.flat({"a": {"b": HEAD}, "a.b": HEAD})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e39])
def test_weights_that_are_not_finite_are_refused_by_name(value, pair):
    state = dict(pair[0])
    bad = torch.ones(64, dtype=torch.float64)
    bad[3] = value
    state["layer1.0.bn1.running_var"] = Stored((64,), lambda: bad)
    with pytest.raises(UserError, match=r"layer1\.0\.bn1\.running_var hold NaN or Inf"):
        loading.load(GreyResNet("resnet18"), loading.in_grey(GreyResNet("resnet18"), state), Path("x"))
    state["layer1.0.bn1.running_var"] = Stored((64,), lambda: torch.ones(64, dtype=torch.int8))
    with pytest.raises(UserError, match=r"torch\.int8, a quantised network"):
        loading.load(GreyResNet("resnet18"), loading.in_grey(GreyResNet("resnet18"), state), Path("x"))


def test_a_stem_for_grey_without_a_record_is_warned_of(weights, tmp_path, recwarn):
    torch.save(weights | {"conv1.weight": fold_grey(weights["conv1.weight"])}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match=r"x\.pth: its stem takes one channel.*0\.449"):
        loading.load_resnet(GreyResNet("resnet18"), tmp_path / "x.pth")
    (tmp_path / "x.json").write_text(json.dumps({"config": {"arch": "resnet18"}}))
    loading.load_resnet(GreyResNet("resnet18"), tmp_path / "x.pth")
    assert not recwarn.list


def test_each_layout_has_its_first_block_where_it_says():
    for layout in layouts.LAYOUTS.values():
        assert layouts._renamed(layout.first, layout) == layouts.FIRST
