"use strict";

// Data: what page.py wrote. Everything is drawn from it on demand, so that a page of 5,000 heads opens at once.
const data = JSON.parse(document.getElementById("data").textContent);
const layers = new Map(data.layers.map((layer) => [layer.layer, layer]));
const sparse = data.layers.filter((layer) => layer.cells);
const headsOf = new Map(sparse.map((layer) => [layer.layer, []]));
data.heads.forEach((head) => headsOf.get(head.layer).push(head));

const byId = (id) => document.getElementById(id);
const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const words = (pattern) => pattern.replaceAll("_", "-");
const label = (head) => `Layer ${head.layer}, head ${head.head}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const lowest = (heads) => heads.reduce((worst, head) => (head.recall < worst.recall ? head : worst));

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/* Colours ------------------------------------------------------------------------------------------------------ */

function ramp(...stops) {
  const colours = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return (share) => {
    const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
    const below = Math.min(Math.floor(place), colours.length - 2);
    return colours[below].map((from, i) => Math.round(from + (colours[below + 1][i] - from) * (place - below)));
  };
}
const rgb = (colour) => `rgb(${colour.join(",")})`;
const gradient = (colours) => {
  const stops = Array.from({ length: 13 }, (_, i) => rgb(colours(i / 12)));
  return `background: linear-gradient(90deg, ${stops.join(",")})`;
};
const KEPT = ramp("#e3eaf2", "#8fb8e0", "#1565c0");
const ATTENTION = ramp("#fdf6e8", "#fdd49e", "#fc8d59", "#d7301f", "#7f0000", "#2b0000");
const HEAT = ramp("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725");
const NOTHING = [248, 248, 246];
const colourOf = {
  kept: (level) => KEPT(level / 255),
  attention: (level) => (level ? ATTENTION((level - 1) / 254) : NOTHING),
};
colourOf.missed = colourOf.attention;
const palettes = Object.fromEntries(
  data.kinds.map((kind) => [kind, Array.from({ length: 256 }, (_, level) => colourOf[kind](level))]),
);

/* Maps --------------------------------------------------------------------------------------------------------- */

const unpacked = new Map();

function bytesOf(id) {
  if (!unpacked.has(id)) {
    const packed = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(id, new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)));
  }
  return unpacked.get(id);
}

async function mapOf(head, kind) {
  const { cells } = layers.get(head.layer);
  const size = (cells * (cells + 1)) / 2;
  const at = (headsOf.get(head.layer).indexOf(head) * data.kinds.length + data.kinds.indexOf(kind)) * size;
  return (await bytesOf(`maps-${head.layer}`)).subarray(at, at + size);
}

// Why a cell's block is kept or not, and its share, in the words of reasons.py.
async function reasonsOf(head, row, at, kept) {
  const { cells, reasons } = layers.get(head.layer);
  const size = (cells * (cells + 1)) / 2;
  const bytes = await bytesOf(`reasons-${head.layer}`);
  const lines = [kept ? `kept: ${reasons.clauses[bytes[at]] || data.rule}` : "not kept"];
  if (!reasons.parts.length) return lines;
  const start = (1 + reasons.parts.length * headsOf.get(head.layer).indexOf(head)) * size + at;
  const part = Object.fromEntries(reasons.parts.map((name, i) => [name, bytes[start + i * size]]));
  const level = 256 * part.share + part.share_fine; // ten-thousandths, and 2^15 where it reaches the threshold
  let words = `${part.row === undefined ? "" : "largest "}share ${((level % 32768) / 10000).toFixed(4)} ${reasons.what}`;
  if (part.row !== undefined) words += `, given by query ${(row * data.block_size + part.row).toLocaleString("en")}`;
  if (part.representative) words += ` through representative ${part.representative}`;
  else if (part.representative === 0) words += " through all of its keys";
  lines.push(`${words}: ${level >= 32768 ? "at least" : "below"} ${reasons.threshold} ${reasons.least}`);
  return lines;
}

async function drawMap(canvas, head, kind) {
  const { cells } = layers.get(head.layer);
  const map = await mapOf(head, kind);
  canvas.width = canvas.height = cells;
  const context = canvas.getContext("2d");
  const image = context.createImageData(cells, cells);
  for (let row = 0, at = 0; row < cells; row++) {
    for (let column = 0; column <= row; column++, at++) {
      const [red, green, blue] = palettes[kind][map[at]];
      image.data.set([red, green, blue, 255], 4 * (row * cells + column));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.dataset.drawn = kind;
}

const shareOf = (level) => (level ? 10 ** (data.decades * ((level - 1) / 254 - 1)) : 0);

function said(kind, level) {
  if (kind === "kept") return level === 255 ? "kept" : level === 0 ? "dropped" : `${percent(level / 255)} of blocks kept`;
  const share = shareOf(level);
  if (!share) return `${kind} below 0.001 %`;
  return `${kind} ${Number((100 * share).toPrecision(2))} % of these queries' probability`;
}

function span(cell, group) {
  const first = cell * group * data.block_size;
  const last = Math.min(first + group * data.block_size, data.tokens) - 1;
  return `${first.toLocaleString("en")}–${last.toLocaleString("en")}`;
}

async function tipFor(event, head) {
  const { cells, group, reasons } = layers.get(head.layer);
  const box = event.target.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const [column, row] = [Math.floor((x / box.width) * cells), Math.floor((y / box.height) * cells)];
  const found = await Promise.all(data.kinds.map((kind) => mapOf(head, kind)));
  if (column > row || row >= cells || column < 0) return hideTip();
  const at = (row * (row + 1)) / 2 + column;
  const lines = [`queries ${span(row, group)}, keys ${span(column, group)}`];
  data.kinds.forEach((kind, i) => {
    if (kind === "kept" ? !reasons : kind !== "missed" || found[i][at]) lines.push(said(kind, found[i][at]));
  });
  if (reasons) lines.splice(1, 0, ...(await reasonsOf(head, row, at, found[0][at])));
  showTip(event, lines);
}

function showTip(event, lines) {
  const tip = byId("tip");
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.cssText = `left: ${left}px; top: ${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}
const hideTip = () => (byId("tip").hidden = true);

/* One head ----------------------------------------------------------------------------------------------------- */

const TITLES = {
  kept: ["Kept blocks", "what this head computes"],
  attention: ["True attention", "exact, summed by block"],
  missed: ["Missed attention", "the part of it in dropped blocks"],
};
let chosen = null;

function choose(head, scroll = false) {
  chosen = head;
  byId("heads").querySelector(".chosen")?.classList.remove("chosen");
  const row = rowOf.get(head);
  row.classList.add("chosen");
  const view = byId("rows");
  if (row.offsetTop < view.scrollTop + 40 || row.offsetTop + row.offsetHeight > view.scrollTop + view.clientHeight) {
    view.scrollTop = row.offsetTop - view.clientHeight / 2;
  }
  byId("detail-title").textContent = label(head);
  const distance = head.js_distance === null ? "" : `JS distance ${number(head.js_distance)} · `;
  byId("detail-numbers").textContent =
    `${words(head.pattern)} · ${distance}density ${number(head.density)} · recall ${number(head.recall)}`;
  const maps = data.kinds.map((kind) => {
    const canvas = make("canvas", { onmousemove: (event) => tipFor(event, head), onmouseleave: hideTip });
    canvas.setAttribute("aria-label", `${TITLES[kind][0]} of ${label(head)}`);
    drawMap(canvas, head, kind).catch(report);
    const end = data.tokens.toLocaleString("en");
    return make("figure", {},
      make("figcaption", {}, make("b", {}, TITLES[kind][0]), " ", make("span", {}, TITLES[kind][1])),
      make("div", { class: "map" }, make("div", { class: "axis left" }, make("span", {}, "queries ↓")), canvas,
        make("div", { class: "axis" }, make("span", {}, "0"), make("span", {}, "keys →"), make("span", {}, end))));
  });
  byId("detail-maps").replaceChildren(...maps, legend(layers.get(head.layer).group));
  drawHeat();
  if (scroll) byId("detail").scrollIntoView({ block: "nearest" });
}

function legend(group) {
  const swatch = (colour) => make("i", { class: "swatch", style: `background: ${rgb(colour)}` });
  const side = group * data.block_size;
  const cell = group === 1 ? `A cell is one block of ${side} x ${side} tokens.`
    : `A cell pools ${group} x ${group} blocks of ${data.block_size} tokens: their kept share, the sum of their attention.`;
  const between = group === 1 ? [] : [make("span", {}, swatch(KEPT(0.5)), "in part ")];
  return make("div", { class: "legend" },
    make("div", {}, make("strong", {}, "Blocks: "), swatch(KEPT(1)), "kept ", ...between, swatch(KEPT(0)), "dropped"),
    make("div", {}, make("strong", {}, "Share of a row of cells' probability"),
      make("div", { class: "ramp" }, `${100 * 10 ** -data.decades} %`, make("i", { style: gradient(ATTENTION) }), "100 %")),
    make("div", {}, cell, " White is after the query: never seen."));
}

/* All heads ---------------------------------------------------------------------------------------------------- */

const COLUMNS = [["layer", "Layer"], ["head", "Head"], ["pattern", "Pattern"], ["js_distance", "JS dist"],
  ["density", "Density"], ["recall", "Recall"]];
const WHOLE = new Set(["layer", "head"]);
const TEXT = { class: "text" };
const rowOf = new Map();
let sorted = { key: null, up: true };

function buildTable() {
  byId("columns").append(...COLUMNS.map(([key, title]) =>
    make("th", { scope: "col", "data-key": key, ...(key === "pattern" ? TEXT : {}) },
      make("button", { onclick: () => sortBy(key) }, title))));
  for (const head of data.heads) {
    const cells = COLUMNS.map(([key]) => (key === "pattern" ? make("td", TEXT, words(head.pattern))
      : make("td", {}, WHOLE.has(key) ? head[key] : number(head[key]))));
    const row = make("tr", {}, ...cells);
    row.head = head;
    rowOf.set(head, row);
  }
  byId("heads").addEventListener("click", (event) => choose(event.target.closest("tr").head));
  byId("rows").addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = rowOf.get(chosen)[step];
    if (next) choose(next.head);
  });
}

function sortBy(key) {
  sorted = { key, up: sorted.key === key ? !sorted.up : true };
  const sign = sorted.up ? 1 : -1;
  const order = data.heads.slice().sort((a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null);
    return sign * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0);
  });
  byId("heads").append(...order.map((head) => rowOf.get(head)));
  for (const column of byId("columns").children) {
    if (column.dataset.key === key) column.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
    else column.removeAttribute("aria-sort");
  }
  byId("rows").scrollTop = 0;
}
