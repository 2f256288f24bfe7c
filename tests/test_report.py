"""report.py: the page says what the network computes, whatever files are called and whatever is gone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run, write_data

import report
from models.transformer import AttentionMaps
from reporting import embed
from reporting.embed import Network
from reporting.runs import read_runs, read_tables, read_warnings
from training.weights import load_joint
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"slices": 20, "volumes": 8, "prototypes": 3, "pictures": 2, "queries": 2, "examples": 1, "map": "pca"}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
RUNS = ("ssl_swav2D", "mask_swav", "ssl_deepcluster3D")
HOSTILE = "<script>alert(1)<script>"  # a file name holds no slash


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Stages 1 to 3 on tiny data of their own, with hostile names among them."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("made")
    data = write_data(out / "data", volumes=6)
    (data / "Images" / "image_0.png").rename(data / "Images" / f"{HOSTILE}&'.png")
    (data / "Volumes").rename(data / 'V"o<b>lumes')
    for script in RUNS:
        run(script, data, out, epochs=1)
    return out


@pytest.fixture(scope="module")
def networks(made) -> dict[str, Network]:
    found = {}
    for one in read_runs([folder(made, script) for script in RUNS]):
        found[one.name] = Network(one, embed.open_data(one, None, None, 1))
    return found


@pytest.fixture(scope="module")
def page(made) -> Path:
    """The report of the three runs, whose folders it leaves as they were."""
    before = {path: path.stat().st_mtime_ns for path in (made / "runs").rglob("*")}
    make(made, made / "page.html", *RUNS)
    assert before == {path: path.stat().st_mtime_ns for path in (made / "runs").rglob("*")}
    return made / "page.html"


def folder(made: Path, script: str) -> str:
    return str(made / "runs" / script)


def make(made: Path, output: Path, *scripts: str, **changes) -> str:
    report.main(report.Config([folder(made, s) for s in scripts], str(output), **(SMALL | changes)))
    return output.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_prototype_shows_what_has_the_largest_cosine(networks):
    network = networks["ssl_swav2D"]
    level = network.slices(14)
    assert len(level.items) == 14
    torch.testing.assert_close(level.z.norm(dim=1), torch.ones(14))
    found, K, unused = embed.prototypes_of(level, 0, 100, 3)
    assert network.learner.intra.prototypes.heads[0].out_features == K == unused + len(found)
    assert sum(len(p.members) for p in found) == 14
    for p in found:
        cosines = level.z @ level.prototypes[0][p.index]
        assert [i for i, _ in p.nearest] == cosines.argsort(descending=True, stable=True)[:3].tolist()
        assert p.nearest[0][1] == pytest.approx(float(cosines.max()))
        rest = [i for i in p.members if i not in dict(p.nearest)]
        assert all(cosines[i] <= cosines[j] for i, _ in p.farthest for j in rest if j not in dict(p.farthest))
    # Neighbours are of other files, nearest first.
    neighbours = embed.neighbours(level, 0, 4)
    assert level.items[0].index not in {level.items[i].index for i, _ in neighbours}
    assert [cosine for _, cosine in neighbours] == sorted((cosine for _, cosine in neighbours), reverse=True)


@pytest.mark.slow
def test_embeddings_are_those_of_the_exported_weights(made, networks):
    network = networks["ssl_deepcluster3D"]
    level = network.volumes(1)
    other, pixels = load_joint(made / "weights" / "deepcluster3D.pth").eval(), network.pixels(level.items[0])
    mask = torch.ones(1, len(pixels), dtype=torch.bool)
    with torch.inference_mode():
        torch.testing.assert_close(level.z, other.holistic(other.tokens(pixels.squeeze(1)[None], mask)[1], mask))


def test_items_are_spread_evenly_over_the_data_sets():
    groups = ["a"] * 50 + ["b"] * 3 + ["c"] * 10
    chosen = embed.choose(groups, 15, seed=0)
    assert [sum(groups[i] == g for i in chosen) for g in "abc"] == [6, 3, 6]
    assert chosen == embed.choose(groups, 15, seed=0) != embed.choose(groups, 15, seed=1)


def test_attention_over_slices_divides_a_point_between_its_two_neighbours():
    positions = torch.tensor([[[0.25, 3.0]]])  # one group, two points
    weights = torch.tensor([[[[0.4, 0.6]] * 4]])  # one head, four slices
    over = embed.attention_over_slices(AttentionMaps(positions, weights), 4)
    torch.testing.assert_close(over[0], torch.tensor([0.3, 0.1, 0.0, 0.6]))


@pytest.mark.slow
def test_masked_errors_cover_every_slice_and_interpolation_is_the_known_guess(networks):
    network = networks["mask_swav"]
    ((item, errors),) = network.masked_errors(1)
    assert len(errors) == item.slices == 8
    assert np.isfinite(errors["transformer"]).all()
    tokens = network.tokens(item)[0].detach()
    # Two of eight slices are masked; the first one always takes its nearest visible neighbour's place.
    guesses = [(tokens[0, 0] - tokens[0, k]).square().mean().item() for k in (1, 2)]
    assert min(guesses) * 0.999 <= errors["interpolation"][0] <= max(guesses) * 1.001


@pytest.mark.slow
def test_the_page_of_three_runs(page):
    html = page.read_text(encoding="utf-8")
    assert len(html) < 10_000_000
    assert "default-src 'none'" in html  # whatever plotly.js may want, nothing is loaded
    assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:)', html)
    assert re.search(r'<tr class="differs"><th scope="row">batch_size</th><td>4</td><td>2</td><td>2</td>', html)
    used = set(re.findall(r'data-thumb="(\w+)"', html))
    thumbs = json.loads(re.search(r'id="thumbs">(.*?)</script>', html, re.DOTALL)[1])
    assert used
    assert used <= thumbs.keys()
    assert "ln K" in html
    # Hostile names are text, also to Plotly, which reads tags in its texts.
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "o<b>lumes" not in html
    embedded = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    plots = [plot for plot in map(json.loads, embedded) if "data" in plot]
    names = {trace["name"] for plot in plots for trace in plot["data"] if trace.get("name")}
    assert 'V"o&lt;b&gt;lumes' in names
    assert not any("<" in name for name in names)
    assert not any("<" in text for plot in plots for trace in plot["data"] for text in trace.get("text", []))


@pytest.mark.slow
def test_what_is_gone_is_said(made, tmp_path):
    html = make(made, tmp_path / "p.html", "ssl_swav2D", data_path=str(tmp_path / "gone"))
    assert "The data cannot be read, so there are no pictures" in html
    (tmp_path / "begun").mkdir()
    options = (Path(folder(made, "mask_swav")) / "config.yaml").read_text()  # of a version without dry runs
    (tmp_path / "begun" / "config.yaml").write_text(options.replace("dry_run: 0\n", ""))
    report.main(report.Config([str(tmp_path / "begun")], str(tmp_path / "p.html"), **SMALL))
    html = (tmp_path / "p.html").read_text()
    assert "There is no readable checkpoint" in html


def test_warnings_of_a_run_are_shown(tmp_path):
    (tmp_path / "warnings.csv").write_text("epoch,condition,text\n2,intra_chance,the loss is that of guessing\n")
    (tmp_path / "bad_steps.csv").write_text("epoch,step,reason,files\n0,1,loss,a.npy\n0,2,loss,b.npy\n")
    first, second = read_warnings(tmp_path)
    assert first == "epoch 3: the loss is that of guessing"
    assert second.startswith("2 updates were skipped")


@pytest.mark.slow
def test_what_is_no_run_is_refused_and_runs_are_told_apart(made, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_runs([str(tmp_path)])
    with pytest.raises(UserError, match="each run folder once"):
        read_runs([folder(made, "mask_swav")] * 2)
    with pytest.raises(UserError, match="is not a folder"):
        make(made, tmp_path / "no" / "p.html", "mask_swav")


def test_tables_of_downstream_results(tmp_path):
    (tmp_path / "probe").mkdir()
    metrics = {"knn@1": {"auc": 0.75, "accuracy": None}, "linear@1": {"auc": 0.5}}
    (tmp_path / "probe" / "results.json").write_text(json.dumps({"metrics": metrics, "cases": 7, "history": [{}]}))
    (tmp_path / "compare" / "cells" / "x").mkdir(parents=True)
    (tmp_path / "compare" / "cells" / "x" / "results.json").write_text("{}")
    (tmp_path / "compare" / "summary.csv").write_text("initialisation,labelled,mean\nrandom,10,0.51234\n")
    compare, probe = read_tables([str(tmp_path)])
    assert (compare.columns, compare.rows) == (["initialisation", "labelled", "mean"], [["random", "10", "0.512"]])
    assert probe.columns == ["", "auc", "accuracy"]
    assert probe.rows == [["knn@1", "0.750", "not defined"], ["linear@1", "0.500", ""]]
    assert probe.about.endswith("7 cases")
    (tmp_path / "probe" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"probe/results\.json: is not a results file"):
        read_tables([str(tmp_path / "probe")])


def test_folders_come_before_options_and_data_has_options_of_its_own(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(report.config, "main", lambda main, options, doc, args: asked.append((main, options, args)))
    report.command(["a", "b c", "--map", "pca", "--data_path", "d"])
    report.command(["--epoch", "3", "--data=mask_swav", "--data_path", "d"])
    (runs, _, first), (views, options, second) = asked
    assert (runs, first) == (report.main, ['--runs=["a", "b c"]', "--map", "pca", "--data_path", "d"])
    assert (views, options.stage, second) == (report.views.main, 2, ["--epoch", "3", "--data_path", "d"])


# What a reader does with the page, and what must be so then; `shown` are the elements that can be seen.
IN_THE_BROWSER = """return (async () => {
const shown = (selector) => all(selector).filter((e) => e.offsetParent);
const found = {};
all('details').forEach((d) => (d.open = true));
all('.plot').forEach(draw);
found.drawn = all('.plot .main-svg:first-child').length === all('.plot').length;
await Promise.all([...document.images].map((i) => i.decode()));  // rejects those that are no picture
found.offline = performance.getEntriesByType('resource').every((e) => /^(data|blob):/.test(e.name));

const button = (key, value) => all(`[data-key=${key}]`).find((b) => b.dataset.value === value);
const everything = shown('.prototype').length;
button('dataset', 'Images').click();
found['one data set'] = shown('.prototype .picture').every((p) => p.dataset.dataset === 'Images');
button('dataset', '').click();
button('run', 'ssl_deepcluster3D').click();
found['one run'] = shown('.prototype').length > 0 && shown('.prototype').length < everything;
button('run', '').click();

const dialog = document.getElementById('item');
const map = document.querySelector('.map'), trace = map.data[0];
map.emit('plotly_click', { points: [{ data: trace, customdata: trace.customdata[0] }] });
found['point opens'] = dialog.open && dialog.textContent.includes(trace.customdata[0][1]);
dialog.close();
return Object.keys(found).filter((name) => !found[name]);
})()"""


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
def test_the_page_works_in_a_browser_without_a_network(page, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}"):
        chosen.add_argument(flag)
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(chosen, webdriver.ChromeService(DRIVER)) as browser:
        browser.get(page.as_uri())
        assert browser.execute_script(IN_THE_BROWSER) == []
        browser.execute_script("all('.picture')[0].focus()")
        for key in ("\ue014", "\ue007"):  # arrow to the right, enter
            browser.switch_to.active_element.send_keys(key)
        opened = "return document.querySelector('#item [data-field=label]').textContent"
        assert browser.execute_script(opened) == browser.execute_script("return all('.picture')[1].dataset.label")
        phone = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        browser.get(page.as_uri())
        assert browser.execute_script("all('.plot').forEach(draw); return document.documentElement.scrollWidth") <= 390
        assert browser.get_log("browser") == []
