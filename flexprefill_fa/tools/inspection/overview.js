/* The page around the heads: header, overview, layers, notes ---------------------------------------------------- */

const FIELDS = [["recall", "Recall"], ["density", "Density"], ["js_distance", "JS distance"]];
const testedHeads = data.heads.filter((head) => head.js_distance !== null);
let shown = "recall";
const heat = { cell: 0, line: 0, left: 30, top: 16 };

function buildHeader() {
  byId("facts").append(...Object.entries(data.about).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  const worst = lowest(data.heads);
  const aware = data.heads.filter((head) => head.pattern === "query_aware").length;
  const tiles = [
    [data.tokens.toLocaleString("en"), "tokens in the prompt"],
    [percent(data.density), "density: kept / causal blocks"],
    [percent(data.recall), "recall: attention in kept blocks"],
    [percent(worst.recall), `lowest recall: layer ${worst.layer}, head ${worst.head}`],
    [`${sparse.length} of ${data.layers.length}`, "layers run sparse"],
    [testedHeads.length ? `${aware} of ${data.heads.length}` : data.heads.length,
      testedHeads.length ? "heads are query-aware" : "sparse heads"],
  ];
  byId("tiles").append(...tiles.map(([value, text]) => make("div", { class: "tile" }, make("b", {}, value),
    make("span", {}, text))));
  document.title = `${data.about.model}: sparse prefill of ${plural(data.tokens, "token")}`;
}

function buildOverview() {
  const fields = FIELDS.filter(([key]) => key !== "js_distance" || testedHeads.length);
  byId("fields").append(...fields.map(([key, title]) => make("button", { "data-field": key, onclick: () => {
    shown = key;
    drawHeat();
  } }, title)));
  const order = data.heads.slice().sort((a, b) => a.recall - b.recall).slice(0, 10);
  byId("worst-heads").append(...order.map((head) => make("li", {}, make("button", { onclick: () => choose(head, true) },
    label(head),
    make("span", { class: "bar" }, make("i", { style: `width: ${(100 * (1 - head.recall)) / (1 - order[0].recall || 1)}%` })),
    make("b", {}, number(head.recall))))));
  const canvas = byId("heat");
  canvas.addEventListener("click", (event) => headAt(event) && choose(headAt(event), true));
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("mousemove", (event) => {
    const head = headAt(event);
    if (!head) return hideTip();
    const distance = head.js_distance === null ? [] : [`JS distance ${number(head.js_distance)}`];
    showTip(event, [`${label(head)}: ${words(head.pattern)}`, `recall ${number(head.recall)}`,
      `density ${number(head.density)}`, ...distance]);
  });
}

function headAt(event) {
  const row = Math.floor((event.offsetY - heat.top) / heat.line);
  const column = Math.floor((event.offsetX - heat.left) / heat.cell);
  return sparse[row] && headsOf.get(sparse[row].layer)[column];
}

function drawHeat() {
  const columns = Math.max(...sparse.map((layer) => headsOf.get(layer.layer).length));
  const known = data.heads.map((head) => head[shown]).filter((value) => value !== null);
  const [low, high] = [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))];
  heat.cell = Math.max(7, Math.min(120, Math.floor((byId("overview").clientWidth - 28 - heat.left) / columns)));
  heat.line = Math.max(5, Math.min(34, Math.floor(400 / sparse.length)));
  const [width, height] = [heat.left + columns * heat.cell + 2, heat.top + sparse.length * heat.line + 2];
  const canvas = byId("heat");
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  canvas.style.cssText = `width: ${width}px; height: ${height}px`;
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const gap = heat.line > 9 ? 1 : 0;
  sparse.forEach((layer, row) => {
    const y = heat.top + row * heat.line;
    headsOf.get(layer.layer).forEach((head, column) => {
      const value = head[shown];
      context.fillStyle = value === null ? "#e4e8ec" : rgb(HEAT(high > low ? (value - low) / (high - low) : 1));
      context.fillRect(heat.left + column * heat.cell, y, heat.cell - gap, heat.line - gap);
    });
    if (row % Math.ceil(13 / heat.line) === 0) mark(context, layer.layer, heat.left - 6, y + heat.line / 2, "right");
  });
  for (let column = 0; column < columns; column += Math.ceil(20 / heat.cell)) {
    mark(context, column, heat.left + (column + 0.5) * heat.cell, 8, "center");
  }
  if (chosen) {
    const row = sparse.findIndex((layer) => layer.layer === chosen.layer);
    const column = headsOf.get(chosen.layer).indexOf(chosen);
    context.strokeStyle = "#e3170a";
    context.lineWidth = 2;
    context.strokeRect(heat.left + column * heat.cell, heat.top + row * heat.line, heat.cell - gap, heat.line - gap);
  }
  byId("heat-ramp").replaceChildren(number(low), make("i", { style: gradient(HEAT) }), number(high),
    make("span", {}, "layers down, heads across"));
  for (const button of byId("fields").children) button.setAttribute("aria-pressed", button.dataset.field === shown);
}

function mark(context, text, x, y, align) {
  context.fillStyle = "#5b6b7b";
  context.textAlign = align;
  context.fillText(text, x, y);
}

function buildLayers() {
  byId("layers").append(...data.layers.map((layer) => {
    const start = [make("span", {}, `Layer ${layer.layer}`), make("span", {}, layer.runs)];
    if (!layer.cells) return make("div", { class: "dense" }, ...start, make("span", { class: "why" }, layer.why));
    const heads = headsOf.get(layer.layer);
    const worst = lowest(heads);
    const details = make("details", { "data-layer": layer.layer }, make("summary", {}, ...start,
      make("span", {}, `density ${number(mean(heads.map((head) => head.density)))}`),
      make("span", {}, `recall ${number(mean(heads.map((head) => head.recall)))}`),
      make("span", {}, `lowest ${number(worst.recall)} in head ${worst.head}; ${layer.why}`)));
    details.addEventListener("toggle", () => {
      if (details.open) details.append(make("div", { class: "thumbs" }, ...heads.map(thumb)));
      else details.lastChild.remove(); // canvases of closed layers would fill the memory
    });
    return details;
  }));
}

function thumb(head) {
  const canvases = ["kept", "attention"].map((kind) => {
    const canvas = make("canvas", { "aria-label": TITLES[kind][0] });
    drawMap(canvas, head, kind).catch(report);
    return canvas;
  });
  return make("button", { class: "thumb", onclick: () => choose(head, true) },
    `Head ${head.head}, ${words(head.pattern)}`,
    make("small", {}, `density ${number(head.density)}, recall ${number(head.recall)}`),
    make("div", {}, ...canvases));
}

function buildNotes() {
  byId("notes").append(...[
    "Density is kept blocks / causal blocks. Recall is the share of the exact attention probability that falls in kept "
      + "blocks, the mean over all rows. The exact attention is that of the queries and keys which each layer sees in "
      + "this sparse prefill, in fp32.",
    "A FlexPrefill head is query-aware when its Jensen-Shannon distance is below tau: pooled attention decides. "
      + "Otherwise it is vertical-slash: columns and diagonals decide. Other selectors have one pattern, and no distance.",
    "Density, recall and query-aware heads are those of sparse layers; overall numbers are means over their heads.",
  ].map((text) => make("p", {}, text)));
}

function report(error) {
  byId("problem").textContent = `The maps cannot be drawn: ${error.message}`;
  byId("problem").hidden = false;
}

buildHeader();
buildTable();
sortBy("layer");
buildOverview();
buildLayers();
buildNotes();
choose(lowest(data.heads));
addEventListener("resize", drawHeat);
