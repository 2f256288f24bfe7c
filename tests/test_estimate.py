"""The cost model counts what can be counted: operations, bytes, steps; time follows from constants."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torchvision
from tiny import options, run, write_data

import estimate
from benchmarks.check_estimate import collection
from datasets.index import scan
from datasets.loaders import canvas_size
from datasets.store import prepare
from objectives.bank import MemoryBank
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

CONSTANTS = {
    "bytes_per_value": 4,
    "overlaps": False,
    "chunk_bytes": 1e8,
    "train_flops": {"resnet18": {"32": 1e10, "128": 3e10}, "resnet50": {"128": 2e10}},
    "forward_flops": {"resnet18": {"32": 2e10}, "resnet50": {"128": 4e10}},
    "transformer_flops": {"64": 1e9, "640": 1e10},
    "dense_flops": 5e10,
    "augment_volumes": [1e-3, 1e-7],
    "augment_crops": [1e-3, 1e-7],
    "kmeans": {"30": 1e9, "3000": 1e10},
    "kmeans_head": 0.01,
    "sinkhorn": 1e-8,
    "optimiser": 1e-9,
    "cache_voxel": 1e-8,
    "cache_file": 1e-3,
    "read_byte": 1e-10,
    "read_sample": 1e-5,
    "checkpoint": 1e8,
    "all_reduce": 1e9,
    "step": 0.01,
    "start": 5.0,
    "process_bytes": 5e8,
    "memory_slack": 1.2,
}
MACHINE = estimate.Machine(CONSTANTS)
DATA = estimate.Data(1000, (512, 512, 200), 500, (512, 512))


def predict(stage: int, method: str = "swav", data: estimate.Data = DATA, processes: int = 1, **changes):
    return estimate.predict(stage, method, estimate.stage_config(stage, method, changes), data, MACHINE, processes)


def test_resnet50_has_the_operations_that_torchvision_documents():
    documented = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["_ops"]  # 4.089 giga multiply-adds at 224
    with torch.device("meta"):
        net, image = torchvision.models.resnet50(), torch.empty(1, 3, 224, 224)
    assert estimate.flops(lambda: net.eval()(image)) / 2e9 == pytest.approx(documented, abs=0.001)
    stem, classifier = 2 * 2 * 64 * 49 * 112 * 112, 2 * 2048 * 1000  # two colours less, no classifier
    grey = estimate.resnet_flops("resnet50", 224, 224, False)
    assert grey + stem + classifier == estimate.flops(lambda: net.eval()(image))


def test_backward_is_twice_forward_without_the_gradient_of_the_image():
    forward = estimate.resnet_flops("resnet18", 64, 64, False)
    stem = 2 * 64 * 49 * 32 * 32
    assert estimate.resnet_flops("resnet18", 64, 64, True) == 3 * forward - stem


def test_banks_hold_a_number_per_crop_sample_and_feature():
    cfg = estimate.stage_config(3, "deepcluster", {})
    learner = estimate.build(3, "deepcluster", cfg, DATA)
    slices = 1000 * 200 + 500
    assert estimate.bank_bytes(learner) == 2 * 4 * (1000 * 640 + slices * 128) + 1000 + slices
    assert estimate.bank_bytes(estimate.build(3, "swav", estimate.stage_config(3, "swav", {}), DATA)) == 0


def test_saving_needs_the_whole_bank_on_every_process(tmp_path, capsys):
    slices = 1000 * 200 + 500
    whole = 2 * 4 * (1000 * 640 + slices * 128) + 1000 + slices  # crops * bytes * (N * d), a byte of `seen` per sample
    small = {"arch": "resnet18", "target_shape": [16, 32, 32]}
    assert [predict(3, "deepcluster", processes=n, **small).saving for n in (1, 4)] == [whole, whole]
    assert predict(3, "swav", processes=4, **small).saving == 0
    bank = MemoryBank(1000, 2, 8)
    state = bank.state()  # a copy, even of one process
    assert state["embeddings"].data_ptr() != bank.embeddings.data_ptr()
    assert estimate.nbytes(state.values()) == 2 * 4 * 1000 * 8 + 1000

    path = tmp_path / "constants.json"
    path.write_text(json.dumps({"environment": {"device": "A GPU"}, "results": CONSTANTS}))
    shape = {"volumes": 1000, "volume_shape": DATA.volume_shape, "images": 500, "image_shape": DATA.image_shape}
    of = {"method": "deepcluster", "stage1": {"arch": "resnet18"}, "stage2": small, "stage3": small}
    estimate.main(estimate.Config(**shape, **of, processes=4, constants=str(path)))
    said = capsys.readouterr().out
    assert f"{whole / 1e9:.2f} GB of each process (the whole bank), {4 * whole / 1e9:.2f} GB where all 4" in said


def test_the_queue_is_twice_the_prototypes_less_the_batch():
    cfg = estimate.stage_config(1, "swav", {"nmb_prototypes": 300, "batch_size": 100})
    assert estimate.build(1, "swav", cfg, DATA).intra.queue.shape == (2, 500, 128)


def test_all_reduced_bytes_are_the_trainable_parameters():
    net = torchvision.models.resnet18()
    backbone = sum(p.numel() for p in net.parameters()) - 513_000 - 2 * 64 * 49
    K, hidden = 40, 32
    head = 512 * hidden + hidden + 2 * hidden + hidden * 16 + 16
    cfg = estimate.stage_config(1, "swav", {"arch": "resnet18", "hidden_mlp": hidden, "feat_dim": 16,
                                            "nmb_prototypes": K})  # fmt: skip
    assert estimate.gradient_bytes(estimate.build(1, "swav", cfg, DATA)) == 4 * (backbone + head + K * 16)


@pytest.mark.parametrize("script", ["ssl_swav2D", "mask_swav", "ssl_deepcluster3D"])
def test_checkpoint_cache_and_steps_are_those_of_a_real_run(script, tmp_path):
    root = write_data(tmp_path / "data")
    run(script, root, tmp_path, epochs=1)
    stage = 2 if "mask" in script else int(script[-2]) if "3D" in script else 1
    method = "deepcluster" if "deepcluster" in script else "swav"
    cfg = estimate.stage_config(stage, method, options(script, root, tmp_path, epochs=1))
    cost = estimate.predict(stage, method, cfg, collection(scan(root)), MACHINE)
    saved = (tmp_path / "runs" / script / "checkpoint.pth").stat().st_size
    assert cost.checkpoint == pytest.approx(saved, rel=0.02)
    files = list((root / ".cache").rglob("*.npy"))
    assert cost.cache == sum(f.stat().st_size for f in files)
    assert cost.files == len(files)


def test_a_cache_file_is_counted_to_the_byte(tmp_path):
    root = write_data(tmp_path / "data")
    store = prepare(root, canvas_size(32), progress=False)[1]
    volume = next(i for i, s in enumerate(store.samples) if s.kind == "volume")
    assert (
        store.files[volume].stat().st_size
        == estimate.cache_bytes((24, 24), 12, canvas_size(32))
        == 128 + 2 * 12 * 40**2
    )


def test_a_ring_sends_nothing_alone_and_nearly_twice_the_payload_at_most():
    assert estimate.ring(100, 1) == 0
    assert estimate.ring(100, 2) == 100
    assert estimate.ring(100, 8) == 175


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_costs_more(stage):
    small = predict(stage, arch="resnet18")
    assert predict(stage, arch="resnet18", epochs=200).total > 1.9 * small.total
    more = predict(stage, data=estimate.Data(10_000, (512, 512, 200), 5000, (512, 512)), arch="resnet18")
    assert more.total > 5 * small.total
    assert more.cache == 10 * small.cache
    batch = 8 * estimate.stage_config(stage, "swav", {}).batch_size
    assert predict(stage, arch="resnet18", batch_size=batch).memory > small.memory
    together = predict(stage, processes=4, arch="resnet18")
    assert together.total < small.total
    assert together.traffic > 0 == small.traffic
    assert predict(stage).total > small.total  # ResNet-50


def test_recomputation_takes_time_and_saves_memory():
    plain, again = predict(3), predict(3, recompute=True)
    assert again.memory < 0.8 * plain.memory
    assert again.seconds["f_intra"] == pytest.approx(plain.seconds["f_intra"] * 4 / 3)


def test_cached_views_are_encoded_once():
    plain, cached = predict(2, epochs=100), predict(2, epochs=100, cached_views=5)
    assert cached.seconds["f_intra"] == pytest.approx(plain.seconds["f_intra"] / 20)
    assert cached.cache - plain.cache == 1000 * 5 * (128 + 64 * 2 * 640 * 4 + 4)


def test_principal_components_need_memory_that_a_small_step_does_not():
    small = {"arch": "resnet18", "target_shape": [16, 32, 32], "batch_size": 1}
    pca, orthogonal = (predict(2, projection_init=start, **small).memory for start in ("pca", "orthogonal"))
    features = 64 + 128 + 256 + 512
    needed = (
        4096 * features * 4 * 9 + 40 * features**2
    )  # nine times the features in float32, and what grows with d squared
    step = orthogonal - predict(2, projection_init="orthogonal", **small | {"batch_size": 2}).memory  # minus one volume
    assert 0 < pca - orthogonal < needed
    assert pca - orthogonal == pytest.approx(needed - 1.2 * 1e8 + step, rel=1e-6)  # the maps of a chunk and one volume


def test_switched_off_branches_cost_nothing():
    off = predict(3, lambda_inter=0.0)
    assert off.seconds.get("f_inter", 0) == 0
    assert off.seconds["f_intra"] < predict(3).seconds["f_intra"] / 4


def test_kmeans_grows_with_samples_times_prototypes():
    def kmeans(volumes: int) -> float:
        return predict(1, "deepcluster", estimate.Data(volumes, (64, 64, 32)), nmb_prototypes=[30]).seconds["k-means"]

    fixed = 100 * CONSTANTS["kmeans_head"]
    assert kmeans(4000) - fixed == pytest.approx(4 * (kmeans(1000) - fixed))


def test_rates_are_interpolated_between_measured_sizes_and_held_beyond():
    assert MACHINE.rate("train_flops", 64, "resnet18") == pytest.approx(2e10)
    assert MACHINE.rate("train_flops", 8, "resnet18") == 1e10
    assert MACHINE.rate("train_flops", 999, "resnet18") == 3e10
    assert MACHINE.rate("train_flops", 64, "resnet152") == 2e10


def test_kmeans_rates_are_interpolated_between_dimensions_and_older_files_have_one_for_all():
    old = {"30": 1e9, "3000": 1e10}
    now = {"128": old, "640": {"30": 2e9, "3000": 3e10}}
    rates = estimate.Machine(CONSTANTS | {"kmeans": now})
    assert [rates.kmeans_rate(3000, d) for d in (16, 128, 640, 999)] == [1e10, 1e10, 3e10, 3e10]
    assert rates.kmeans_rate(30, 128 * math.sqrt(5)) == pytest.approx(1.5e9)  # half way from 128 to 640
    assert rates.kmeans_rate(300, 640) == pytest.approx(1.6e10)
    assert [MACHINE.kmeans_rate(3000, d) for d in (128, 640)] == [1e10, 1e10]
    for path in ("benchmarks/assumed/h200.json", "benchmarks/results/constants_cpu.json"):
        assert estimate.Machine.read(path).kmeans_rate(3000, 640) > 1e10


def test_activations_are_those_that_autograd_keeps():
    conv_and_norm_inputs = estimate.resnet_activations("resnet50", 224, 224)
    assert 75e6 < conv_and_norm_inputs < 110e6  # about 22 million values in float32
    assert estimate.resnet_activations("resnet50", 448, 448) == pytest.approx(4 * conv_and_norm_inputs, rel=0.01)
    assert estimate.resnet_activations("resnet50", 224, 224, True) < 0.6 * conv_and_norm_inputs


def test_the_command_says_it_all_and_what_is_assumed(tmp_path, capsys):
    path = tmp_path / "constants.json"
    path.write_text(json.dumps({"environment": {"device": "A GPU"}, "results": CONSTANTS, "assumed": ["train_flops"]}))
    estimate.main(estimate.Config(volumes=100, images=100, processes=2, constants=str(path)))
    said = capsys.readouterr().out
    assert "ASSUMED, not measured: train_flops" in said
    assert all(f"stage {stage}" in said for stage in (1, 2, 3))
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_constants_and_options_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json does not exist; run python -m benchmarks\.constants"):
        estimate.Machine.read(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json is no file of"):
        estimate.Machine.read(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"stage2: mask_swav\.py has no option batchsize"):
        estimate.stage_config(2, "swav", {"batchsize": 3})
    with pytest.raises(UserError, match=r"stage3: a joint batch of 4 needs as many samples, the data have 3"):
        predict(3, data=estimate.Data(3, (64, 64, 64)))


def test_a_joint_batch_is_dealt_in_as_few_steps_as_hold_it():
    assert predict(3, batch_size=4, processes=3).steps == math.ceil(1000 / 12)
