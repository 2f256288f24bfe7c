"""report.py: the page says what the network computes, whatever files are called and whatever is gone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import run, write_data

import report
from datasets.index import scan
from models.transformer import AttentionMaps
from reporting import clusters, embed, figures, page, results
from reporting.runs import read_metrics, read_runs, read_warnings, short_names
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"slices": 20, "volumes": 8, "prototypes": 3, "pictures": 2, "queries": 2, "examples": 1, "map": "pca"}
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Stages 1 to 3 on tiny data of their own, one file of which has a hostile name."""
    out = tmp_path_factory.mktemp("made")
    data = write_data(out / "data")
    # A file name holds no slash.
    (data / "Images" / "image_0.png").rename(data / "Images" / f"{HOSTILE.replace('/', '')}&'.png")
    (data / "Volumes").rename(data / "<b>Volumes")
    for script in ("ssl_swav2D", "mask_swav", "ssl_deepcluster3D"):
        run(script, data, out, epochs=2)
    return out


def folder(made: Path, script: str) -> str:
    return str(made / "runs" / script)


def make(made: Path, output: Path, *scripts: str, **changes) -> str:
    report.main(report.Config([folder(made, s) for s in scripts], str(output), **(SMALL | changes)))
    return output.read_text(encoding="utf-8")


def test_every_prototype_shows_what_has_the_largest_cosine(made):
    (of,) = read_runs([folder(made, "ssl_swav2D")])
    network = embed.build(of)
    samples, store, same = embed.open_data(of, None, None, 1)
    level = embed.embed_slices(of, network, samples, store, 20, 0)
    assert same
    assert len(level.items) == 20
    torch.testing.assert_close(level.z.norm(dim=1), torch.ones(20))
    found, K, unused = clusters.prototypes_of(level, 0, 100, 3)
    assert of.state["learner"]["intra.prototypes.heads.0.weight"].shape[0] == K
    assert unused + len(found) == K
    assert sum(len(p.members) for p in found) == 20
    for p in found:
        cosines = level.z @ level.prototypes[0][p.index]
        assert [i for i, _ in p.nearest] == cosines.argsort(descending=True, stable=True)[:3].tolist()
        assert p.nearest[0][1] == pytest.approx(float(cosines.max()))
        rest = [i for i in p.members if i not in dict(p.nearest)]
        assert all(cosines[i] <= cosines[j] for i, _ in p.farthest for j in rest if j not in dict(p.farthest))


def test_embeddings_are_those_of_the_exported_weights(made):
    from training.weights import load_joint

    (of,) = read_runs([folder(made, "ssl_deepcluster3D")])
    samples, store, _ = embed.open_data(of, None, None, 1)
    level = embed.embed_volumes(of, embed.build(of), samples, store, 8, 0)
    other = load_joint(made / "weights" / "deepcluster3D.pth").eval()
    index, start, stop = level.items[0]
    views = embed.pictures(store, (index, start, stop), (32, 32))[None]
    mask = torch.ones(1, stop - start, dtype=torch.bool)
    with torch.inference_mode():
        z = other.holistic(other.tokens(views, mask)[1], mask)
    torch.testing.assert_close(level.z[:1], z)


def test_neighbours_are_of_other_files_and_nearest_first(made):
    (of,) = read_runs([folder(made, "ssl_swav2D")])
    samples, store, _ = embed.open_data(of, None, None, 1)
    level = embed.embed_slices(of, embed.build(of), samples, store, 20, 0)
    ((query, found),) = clusters.neighbours(level, [0], 4)
    assert query == 0
    assert level.items[0][0] not in {level.items[i][0] for i, _ in found}
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)


def test_items_are_spread_evenly_over_the_data_sets():
    groups = ["a"] * 50 + ["b"] * 3 + ["c"] * 10
    chosen = embed.choose(groups, 15, seed=0)
    counts = [sum(groups[i] == g for i in chosen) for g in "abc"]
    assert counts == [6, 3, 6]
    assert chosen == embed.choose(groups, 15, seed=0) != embed.choose(groups, 15, seed=1)
    assert embed.choose(groups, 1000, seed=0) == list(range(63))


def test_attention_over_slices_divides_a_point_between_its_two_neighbours():
    positions = torch.tensor([[[0.25, 3.0]]])  # one group, two points
    weights = torch.tensor([[[[0.4, 0.6]] * 4]])  # one head, four slices
    over = embed.attention_over_slices(AttentionMaps(positions, weights), 4)
    torch.testing.assert_close(over[0], torch.tensor([0.3, 0.1, 0.0, 0.6]))
    torch.testing.assert_close(over.sum(dim=1), torch.ones(4))


def test_masked_errors_cover_every_slice_and_interpolation_is_the_known_guess(made):
    (of,) = read_runs([folder(made, "mask_swav")])
    network = embed.build(of)
    samples, store, _ = embed.open_data(of, None, None, 1)
    (error,) = embed.masked_errors(of, network, samples, store, 1, 0)
    D = error.item[2] - error.item[1]
    assert error.model.shape == error.interpolation.shape == (D,) == (8,)
    assert np.isfinite(error.model).all()
    tokens = network.joint.slices(embed.pictures(store, error.item, (32, 32)).unsqueeze(1))[1].detach()
    # Two of eight slices are hidden; the first one always takes its nearest visible neighbour's place.
    guesses = [(tokens[0] - tokens[k]).square().mean().item() for k in (1, 2)]
    assert min(guesses) * 0.999 <= error.interpolation[0] <= max(guesses) * 1.001


def test_the_page_of_three_runs(made, tmp_path):
    html = make(made, tmp_path / "page.html", "ssl_swav2D", "mask_swav", "ssl_deepcluster3D")
    assert len(html) < 10_000_000
    assert "default-src 'none'" in html  # whatever plotly.js may want, nothing is loaded
    assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:)', html)
    for name in ("ssl_swav2D", "mask_swav", "ssl_deepcluster3D"):
        assert f'<th scope="col">{name}</th>' in html
    assert re.search(r'<tr class="differs"><th scope="row">batch_size</th><td>4</td><td>2</td><td>2</td>', html)
    assert re.search(r'<tr><th scope="row">seed</th><td>31</td>', html)
    used = set(re.findall(r'data-thumb="(\w+)"', html))
    thumbs = json.loads(re.search(r'id="thumbs">(.*?)</script>', html, re.DOTALL)[1])
    assert used
    assert used <= thumbs.keys()
    assert "ln K" in html


def test_hostile_names_are_text(made, tmp_path):
    html = make(made, tmp_path / "page.html", "ssl_swav2D")
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "<b>Volumes" not in html
    embedded = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    texts = "".join(str(json.loads(part).get("data", "")) for part in embedded)
    assert "&lt;b&gt;Volumes" in texts  # Plotly would read tags in its texts


def test_without_data_there_are_curves_and_the_reason(made, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(folder(made, "ssl_swav2D"), moved)
    report.main(report.Config([str(moved)], str(tmp_path / "p.html"), data_path=str(tmp_path / "gone"), **SMALL))
    html = (tmp_path / "p.html").read_text()
    assert "The data cannot be read, so there are no pictures" in html
    assert "Loss · stage 1" in html
    assert 'class="picture' not in html


def test_other_data_than_the_run_was_trained_on_are_named(made, data, tmp_path):
    html = make(made, tmp_path / "p.html", "ssl_swav2D", data_path=str(data))
    assert "does not hold the data that the run was trained on" in html


def test_without_a_checkpoint_or_an_epoch_there_is_a_page(made, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(Path(folder(made, "mask_swav")) / "config.yaml", begun)
    report.main(report.Config([str(begun)], str(tmp_path / "p.html"), **SMALL))
    html = (tmp_path / "p.html").read_text()
    assert "There is no readable checkpoint" in html
    assert "No run has finished an epoch yet" in html


BROKEN = {
    "cut off": ("epoch,loss\n0,1.5\n1", "line 3 has not as many cells"),
    "words": ("epoch,loss\n0,low\n", "could not convert"),
    "another table": ("name,value\na,1\n", "epoch among them"),
    "a name twice": ("epoch,loss,loss\n0,1,1\n", "every column once"),
    "binary": ("\x00\x01\x02", "epoch among them"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_table_is_named(what, made, tmp_path):
    text, says = BROKEN[what]
    copy = tmp_path / "run"
    shutil.copytree(folder(made, "mask_swav"), copy)
    (copy / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=rf"run/metrics\.csv: is not a table of metrics.*{says}"):
        report.main(report.Config([str(copy)], str(tmp_path / "p.html")))


def test_metrics_may_lack_values_and_have_new_columns(tmp_path):
    (tmp_path / "m.csv").write_text("epoch,loss,intra_new\n0,2.5,nan\n1,2.25,\n")
    metrics = read_metrics(tmp_path / "m.csv")
    assert metrics["loss"] == [2.5, 2.25]
    assert np.isnan(metrics["intra_new"]).all()


def test_columns_become_charts(made):
    (of,) = read_runs([folder(made, "ssl_deepcluster3D")])
    of.metrics = {"epoch": [0.0, 1.0], "loss": [3.0, 2.0], "inter": [1.5, 1.0], "inter_new": [0.1, 0.2]} | {
        "intra_new": [0.3, float("nan")],
        "lr": [1.0, 0.5],
    }
    groups = dict(figures.curves([of]))
    assert [f["title"] for f in groups["Losses"]] == ["Loss · stage 3", "Loss of volumes · stage 3"]
    (new,) = groups["Diagnostics"]
    assert {trace["name"]: trace["y"] for trace in new["data"]} == {
        "ssl_deepcluster3D · inter": [0.1, 0.2],
        "ssl_deepcluster3D · intra": [0.3, None],
    }
    K = len(of.state["learner"]["inter.prototypes.heads.0.weight"])
    assert groups["Losses"][1]["data"][1]["y"] == [pytest.approx(np.log(K), rel=1e-4)] * 2


def test_warnings_of_a_run_are_shown(made, tmp_path):
    (tmp_path / "warnings.csv").write_text("epoch,condition,text\n2,intra_chance,the loss is that of guessing\n")
    (tmp_path / "bad_steps.csv").write_text("epoch,step,reason,files\n0,1,loss,a.npy\n0,2,loss,b.npy\n")
    first, second = read_warnings(tmp_path)
    assert first == "epoch 3: the loss is that of guessing"
    assert second.startswith("2 steps were not applied")
    (tmp_path / "warnings.csv").write_text("what,ever\n1,2\n")
    with pytest.raises(UserError, match=r"warnings\.csv: is not a run's table"):
        read_warnings(tmp_path)


def test_what_is_no_run_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        report.main(report.Config([str(tmp_path)]))
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml: is not the configuration"):
        report.main(report.Config([str(tmp_path)]))
    with pytest.raises(UserError, match="each run folder once"):
        report.main(report.Config([folder(made, "mask_swav")] * 2))
    with pytest.raises(UserError, match="is not a folder"):
        report.main(report.Config([folder(made, "mask_swav")], str(tmp_path / "no" / "p.html")))
    with pytest.raises(UserError, match=r"head: .* has 1 head"):
        make(made, tmp_path / "p.html", "ssl_swav2D", head=1)


def test_a_checkpoint_that_does_not_fit_is_named(made, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder(made, "ssl_swav2D"), copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("feat_dim: 16", "feat_dim: 8"))
    with pytest.raises(UserError, match=r"run: the checkpoint does not fit config\.yaml"):
        report.main(report.Config([str(copy)], str(tmp_path / "p.html"), **SMALL))


def test_runs_are_told_apart_by_as_many_folders_as_needed():
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/a/one"), Path("/x/b/two")]) == ["one", "two"]


def test_folders_come_before_options():
    assert report.arguments(["a", "b c", "--map", "pca"]) == ['--runs=["a", "b c"]', "--map", "pca"]
    assert report.arguments(["--runs", "[a]"]) == ["--runs", "[a]"]


def test_tables_of_downstream_results(tmp_path):
    (tmp_path / "probe").mkdir()
    metrics = {"knn@1": {"auc": 0.75, "accuracy": None}, "linear@1": {"auc": 0.5}}
    (tmp_path / "probe" / "results.json").write_text(json.dumps({"metrics": metrics, "cases": 7, "history": [{}]}))
    (tmp_path / "compare" / "cells" / "x").mkdir(parents=True)
    (tmp_path / "compare" / "cells" / "x" / "results.json").write_text("{}")
    (tmp_path / "compare" / "summary.csv").write_text("initialisation,labelled,mean\nrandom,10,0.51234\n")
    compare, probe = results.read_tables([str(tmp_path)])
    assert (compare.columns, compare.rows) == (["initialisation", "labelled", "mean"], [["random", "10", "0.512"]])
    assert probe.columns == ["", "auc", "accuracy"]
    assert probe.rows == [["knn@1", "0.750", "not defined"], ["linear@1", "0.500", ""]]
    assert probe.about.endswith("7 cases")
    with pytest.raises(UserError, match=r"downstream: .* does not exist"):
        results.read_tables([str(tmp_path / "no")])
    (tmp_path / "probe" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"probe/results\.json: is not a results file"):
        results.read_tables([str(tmp_path / "probe")])


def test_the_page_is_the_same_again(made, tmp_path):
    first = make(made, tmp_path / "a.html", "ssl_swav2D", map="tsne")
    second = make(made, tmp_path / "b.html", "ssl_swav2D", map="tsne")
    clock = r"made \d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.sub(clock, "", first) == re.sub(clock, "", second)


def test_the_run_folder_is_left_as_it_was(made, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in sorted(Path(folder(made, "ssl_swav2D")).rglob("*"))}
    make(made, tmp_path / "p.html", "ssl_swav2D")
    assert before == {p: p.stat().st_mtime_ns for p in sorted(Path(folder(made, "ssl_swav2D")).rglob("*"))}


def test_a_thumbnail_is_kept_once_and_shows_its_slice(data):
    from datasets.store import SliceStore

    store = SliceStore(scan(data), 40)
    store.build(progress=False)
    volume = next(i for i, s in enumerate(store.samples) if s.kind == "volume")
    thumbs = page.Thumbnails()
    assert thumbs.add(store, (volume, 5, 6)) == thumbs.add(store, (volume, 5, 6)) != thumbs.add(store, (volume, 6, 7))
    assert len(thumbs.uris) == 2
