// Figures: drawn when they come near the screen, so that a long page opens at once.
const figures = new Map(all(".plot").map((e) => [e, JSON.parse(e.nextElementSibling.textContent)]));
const drawn = new Set();
function colours() {
  const style = getComputedStyle(root);
  const of = (name) => style.getPropertyValue(name).trim();
  return { fg: of("--fg"), muted: of("--muted"), line: of("--line"), card: of("--card") };
}
function template() {  // what Plotly takes where a figure says nothing
  const c = colours();
  const axis = { gridcolor: c.line, linecolor: c.line, zerolinecolor: c.line, automargin: true,
    title: { standoff: 8, font: { size: 12, color: c.muted } } };
  return { layout: {
    margin: { l: 8, r: 8, t: 8, b: 8 },
    dragmode: false,
    legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0, font: { size: 11 } },
    xaxis: axis,
    yaxis: axis,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: c.fg },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: c.muted, activecolor: c.fg },
    hoverlabel: { bgcolor: c.card, bordercolor: c.line, font: { color: c.fg } },
  } };
}
function draw(element) {
  if (drawn.has(element)) return;
  drawn.add(element);
  const figure = figures.get(element);
  const isMap = element.classList.contains("map");
  // Plotly offers to upload a chart with the names of its files to a server: never here.
  const config = { responsive: true, displaylogo: false, displayModeBar: isMap, scrollZoom: false,
    plotlyServerURL: "", showSendToCloud: false, showEditInChartStudio: false,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]] };
  Plotly.newPlot(element, figure.data, { ...figure.layout, template: template() }, config);
  if (isMap) {
    filterMap(element);
    element.on("plotly_click", (event) => {
      const [thumb, label] = event.points[0].customdata;
      show({ thumb, label, dataset: event.points[0].data.meta });
    });
  }
}
const near = new IntersectionObserver(
  (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => draw(e.target)), { rootMargin: "400px" });
all(".plot").forEach((element) => near.observe(element));
onTheme = () => drawn.forEach((element) => Plotly.relayout(element, { template: template() }));

// Filters: one run, one level, one prototype or all of them; any of the data sets.
const chosen = { run: "", level: "", prototype: "", dataset: new Set() };
function matches(element) {
  const d = element.dataset;
  return ["run", "level", "prototype"].every((key) => !chosen[key] || d[key] === undefined || d[key] === chosen[key])
    && (!chosen.dataset.size || d.dataset === undefined || chosen.dataset.has(d.dataset));
}
const filtered = all("[data-filtered]");
function filterMap(element) {
  const visible = figures.get(element).data
    .map((trace) => !chosen.dataset.size || chosen.dataset.has(trace.meta));
  Plotly.restyle(element, { visible: visible.map((yes) => (yes ? true : "legendonly")) });
}
function apply() {
  for (const element of filtered) element.hidden = !matches(element);
  // A row of pictures of which none is left says so, and one picture of each row can be reached with Tab.
  for (const row of all(".pictures")) {
    const shown = all(".picture", row).filter((p) => !p.hidden);
    all(".picture", row).forEach((p) => (p.tabIndex = p === shown[0] ? 0 : -1));
    const none = row.querySelector(".none");
    if (none) none.hidden = shown.length > 0;
  }
  all(".filters button").forEach((b) => {
    const { key, value } = b.dataset;
    const on = key === "dataset" ? (value ? chosen.dataset.has(value) : !chosen.dataset.size) : chosen[key] === value;
    b.setAttribute("aria-pressed", String(on));
  });
  all("button.only").forEach((b) => b.setAttribute("aria-pressed", String(chosen.prototype === b.dataset.value)));
  all("select[data-key]").forEach((s) => (s.value = chosen[s.dataset.key]));
  drawn.forEach((element) => {
    if (element.classList.contains("map")) filterMap(element);
    if (!element.closest("[hidden]")) Plotly.Plots.resize(element);
  });
  const count = all(".prototype").filter((p) => !p.hidden && !p.closest("[hidden]")).length;
  const status = document.getElementById("status");
  if (status) status.textContent = `${count} prototype${count === 1 ? "" : "s"} shown`;
}
function choose(key, value) {
  if (key !== "dataset") chosen[key] = value;
  else if (!value) chosen.dataset.clear();
  else if (!chosen.dataset.delete(value)) chosen.dataset.add(value);
  apply();
}
all(".filters button").forEach((b) => b.addEventListener("click", () => choose(b.dataset.key, b.dataset.value)));
all("button.only").forEach((b) => b.addEventListener("click", () =>
  choose("prototype", chosen.prototype === b.dataset.value ? "" : b.dataset.value)));
all("select[data-key]").forEach((s) => s.addEventListener("change", () => choose(s.dataset.key, s.value)));
const differences = document.getElementById("differences");
function showOptions() {
  all(".options tbody tr").forEach((row) => (row.hidden = differences.checked && !row.classList.contains("differs")));
}
if (differences) {
  differences.addEventListener("change", showOptions);
  showOptions();
}

// A picture opens with its whole name; the arrow keys go from picture to picture and from row to row.
const dialog = document.getElementById("item");
function show({ thumb, label, dataset, cosine }) {
  const image = dialog.querySelector("img");
  image.src = thumbs[thumb];
  image.alt = label;
  dialog.querySelector("[data-field=label]").textContent = label;
  dialog.querySelector("[data-field=dataset]").textContent = dataset;
  dialog.querySelector("[data-field=cosine]").textContent = cosine || "–";
  dialog.showModal();
}
document.addEventListener("click", (event) => {
  const picture = event.target.closest(".picture");
  if (picture) show({ ...picture.dataset, label: picture.dataset.label });
  if (event.target === dialog) dialog.close();
});
document.addEventListener("keydown", (event) => {
  const here = event.target.closest && event.target.closest(".picture");
  if (!here) return;
  const visible = (inside) => all(".picture", inside).filter((p) => p.offsetParent);
  const row = visible(here.closest(".pictures"));
  const rows = all(".pictures").filter((r) => visible(r).length);
  const place = row.indexOf(here), line = rows.indexOf(here.closest(".pictures"));
  const next = { ArrowRight: () => row[place + 1], ArrowLeft: () => row[place - 1], Home: () => row[0],
    End: () => row[row.length - 1],
    ArrowDown: () => rows[line + 1] && visible(rows[line + 1])[Math.min(place, visible(rows[line + 1]).length - 1)],
    ArrowUp: () => rows[line - 1] && visible(rows[line - 1])[Math.min(place, visible(rows[line - 1]).length - 1)],
  }[event.key];
  if (!next) return;
  event.preventDefault();
  const target = next();
  if (!target) return;
  all(".picture", target.closest(".pictures")).forEach((p) => (p.tabIndex = p === target ? 0 : -1));
  target.focus();
});
apply();
