"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const WIDTH = 340, HEIGHT = 150, LEFT = 44, RIGHT = 6, TOP = 8, BOTTOM = 20;
const COLOURS = ["--blue", "--orange", "--green", "--purple"];

// Numbers as people read them; NaN and infinities come as strings.
const short = (x) => {
  if (typeof x === "string" || x === null || x === undefined) return x ?? "";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1).replace("e+", "e");
  return String(Number(x.toPrecision(3)));
};
const percent = (x) => short(100 * x) + " %";
const number = (x) => (typeof x === "number" ? x : NaN);

// An element, or an SVG one inside a drawing; text never becomes markup.
const make = (tag, attributes = {}, ...inside) => {
  const svg = ["svg", "path", "rect", "line", "text", "g", "polyline", "polygon", "title", "circle"].includes(tag) || attributes.svg;
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (name !== "svg" && value !== null) element.setAttribute(name, value);
  element.append(...inside.filter((part) => part !== null));
  return element;
};
// The layer of that name; a block, or a module that calls attention, is shown by its first layer.
const shownBy = (name) => data.layers.find((layer) => layer.name === name)
  || data.layers.find((layer) => name && layer.name.startsWith(name + "."));
const target = (layer) => "#layer=" + encodeURIComponent(layer.name);
const figure = (title, caption, ...inside) =>
  make("figure", {}, make("h3", {}, title), make("figcaption", {}, caption), ...inside);

// A scale from values to pixels; logarithmic where asked for, with zeros at the bottom.
const scale = (values, log, zero) => {
  const finite = values.map(number).filter((v) => Number.isFinite(v) && (!log || v > 0));
  let low = Math.min(...finite), high = Math.max(...finite);
  if (!finite.length) [low, high] = log ? [0.1, 1] : [0, 1];
  if (zero && !log) low = Math.min(0, low);
  if (low === high) [low, high] = log ? [low / 10, high * 10] : [low - (zero ? 0 : 0.5), high + 0.5];
  if (log) { low = Math.floor(Math.log10(low)); high = Math.ceil(Math.log10(high)); }
  const place = (v) => (log ? (v > 0 ? Math.log10(v) : low) : v);
  const y = (v) => HEIGHT - BOTTOM - ((Math.min(Math.max(place(v), low), high) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const ticks = log ? [low, Math.round((low + high) / 2), high].map((t) => 10 ** t) : [low, (low + high) / 2, high];
  return { y, ticks: [...new Set(ticks)], log };
};
const axes = (s) => s.ticks.map((t) => make("g", {},
  make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: s.y(t), y2: s.y(t) }),
  make("text", { x: LEFT - 5, y: s.y(t) + 4, "text-anchor": "end" }, short(t))));
const drawing = (label, ...inside) =>
  make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...inside);

// One bar a layer, each a link to it.
const bars = (title, caption, layers, value, log = false) => {
  const shown = layers.filter((layer) => typeof value(layer) === "number");
  if (!shown.some((layer) => value(layer) > 0)) return null;
  const s = scale(shown.map(value), log, true);
  const step = (WIDTH - LEFT - RIGHT) / shown.length;
  const drawn = shown.map((layer, i) => {
    const y = s.y(value(layer)), label = `${layer.name || "the model"}: ${short(value(layer))}`;
    return make("a", { svg: true, href: target(layer), "aria-label": label },
      make("rect", { class: "bar" + (layer.role === "norm" ? " norm" : ""), x: LEFT + i * step + step * 0.1, y: Math.min(y, HEIGHT - BOTTOM - 1),
        width: Math.max(step * 0.8, 1), height: Math.max(HEIGHT - BOTTOM - y, 1) }, make("title", {}, label)));
  });
  return figure(title, caption, drawing(title, ...axes(s), ...drawn,
    make("text", { x: LEFT, y: HEIGHT - 4 }, "first"), make("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "last")));
};

// Lines over steps: series of [name, values].
const lines = (title, caption, series, log = false, from = 0, below = "time step") => {
  const drawn = series.filter(([, values]) => values && values.length);
  if (!drawn.length) return null;
  const s = scale(drawn.flatMap(([, values]) => values), log, !log);
  const longest = Math.max(...drawn.map(([, values]) => values.length));
  const x = (i) => LEFT + (longest > 1 ? (i / (longest - 1)) * (WIDTH - LEFT - RIGHT) : 0);
  const paths = drawn.map(([name, values], k) => {
    let path = "", pen = "M";
    values.forEach((v, i) => {
      if (!Number.isFinite(number(v))) { pen = "M"; return; }
      path += `${pen}${x(i).toFixed(1)} ${s.y(v).toFixed(1)}`; pen = "L";
    });
    if (values.length === 1) path += "h6";
    return make("path", { d: path, fill: "none", stroke: `var(${COLOURS[k % 4]})`, "stroke-width": 2,
      "stroke-dasharray": k >= 4 ? "5 3" : null }, make("title", {}, name));
  });
  const legend = drawn.length < 2 ? null : make("div", { class: "legend" }, ...drawn.map(([name], k) =>
    make("span", {}, make("i", { style: `border-color:var(${COLOURS[k % 4]})` + (k >= 4 ? ";border-top-style:dashed" : "") }), name)));
  return figure(title, caption, drawing(title, ...axes(s), ...paths,
    make("text", { x: LEFT, y: HEIGHT - 4 }, `${below} ${from}`),
    make("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, String(from + longest - 1))), legend);
};

const histogram = (title, distribution) => {
  if (!distribution || !distribution.count) return null;
  const { low, high, counts } = distribution.histogram, most = Math.max(...counts, 1);
  const step = (WIDTH - LEFT - RIGHT) / counts.length, floor = HEIGHT - BOTTOM;
  const drawn = counts.map((count, i) => make("rect", { class: "bar", x: LEFT + i * step, width: Math.max(step - 1, 0.5),
    y: floor - (count / most) * (floor - TOP), height: (count / most) * (floor - TOP) },
    make("title", {}, `${short(low + (i * (high - low)) / counts.length)} and more: ${count}`)));
  const p = distribution.percentiles;
  const words = `mean ${short(distribution.mean)}, deviation ${short(distribution.std)}; 5 % lie below ${short(p[1])}, half below ${short(p[3])}, 95 % below ${short(p[5])}`
    + (distribution.nonfinite ? `; ${distribution.nonfinite} not finite` : "");
  return figure(title, words, drawing(title, make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: floor, y2: floor }), ...drawn,
    make("text", { x: LEFT, y: HEIGHT - 4 }, short(low)), make("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, short(high))));
};

const list = (pairs) => make("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
  .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));

const normFacts = (n) => [
  ["statistics", n.kind + (n.batch_statistics ? ", from the batch in training" : "") + (n.synchronized ? ", over all ranks" : "")],
  ["fewest values behind a statistic", n.values], ["fewest samples", n.samples],
  ["lengths", n.lengths && n.lengths.join(" to ")], ["padding that enters", n.padding === null ? null : percent(n.padding)],
  ["padding moves means by", n.padding_shift === null ? null : short(n.padding_shift) + " deviations"],
  ["eps", short(n.eps)], ["momentum", short(n.momentum)],
  ["dead gains", n.dead_gains.length || null], ["takes away the bias of", n.removes_bias_of],
  ["running statistics", n.running === null ? null : n.running.initial ? "as they started" :
    `${n.running.tracked ?? "?"} batches; median distance of the means ${short(n.running.distance.percentiles[3])} deviations` +
    (n.running.nonfinite ? `; ${n.running.nonfinite} channels not finite` : "")],
];

const overTime = (title, activations) => activations && activations.time && activations.time.mean.length > 1 ? lines(title,
  "over samples and features, at each step", [["median", activations.time.percentiles[3]], ["5 %", activations.time.percentiles[1]],
    ["95 %", activations.time.percentiles[5]]]) : null;

const recurrence = (r) => [
  lines(`Saturated gates, ${r.place}`, "share of each gate's values in its flat part", r.gates.map((g) => [g.name, g.over_time])),
  lines(`Size over time, ${r.place}`, "root mean square", [["summed input", r.summed], ["state", r.state]]),
  lines(`Gradient over time, ${r.place}`, "norm of the loss's gradient with respect to the state", [["gradient", r.gradient]], true),
];

const details = (layer) => {
  const shape = (a) => (a ? `(${a.shape.join(", ")}) ${a.dtype}` : null);
  const found = data.findings.filter((f) => shownBy(f.layer) === layer);
  const g = layer.gradient, n = layer.norm;
  const charts = [
    histogram("Input", layer.input && layer.input.all), histogram("Output", layer.output && layer.output.all),
    overTime("Input over time", layer.input), overTime("Output over time", layer.output),
    ...layer.recurrence.flatMap(recurrence),
    n && histogram("Gains", n.gain), n && histogram("Biases", n.bias),
    n && n.running && !n.running.initial ? histogram("Running means from the batch's, in deviations", n.running.distance) : null,
    n && n.running && !n.running.initial ? histogram("Running variances over the batch's, log2", n.running.log_ratio) : null,
    layer.input && layer.input.features ? histogram("Input: mean of each feature", layer.input.features.means) : null,
    layer.input && layer.input.samples ? histogram("Input: mean of each sample", layer.input.samples.means) : null,
    layer.shift ? lines("Internal covariate shift", "at each watched step: how far the input's distribution moves, in deviations; how far the gradient moves when the layers before take their step, as a share of it",
      [["input", layer.shift.inputs], ["gradient", layer.shift.gradient]], false, 1, "step") : null,
  ].filter((chart) => chart);
  return [
    make("h3", { class: "name" }, layer.name || "(the model itself)"),
    list([["class", layer.kind + (layer.ours ? " (normwise)" : "")], ["calls", layer.order === null ? "never called" : layer.calls],
      ["input", shape(layer.input)], ["output", shape(layer.output)],
      ["parameters", layer.parameters ? `${layer.parameters}, of which trained ${layer.trainable}` : null],
      ["gradient at the output", g && g.output !== null ? short(g.output) : null],
      ["gradient at the weights", g ? Object.entries(g.weights).map(([name, v]) => `${name} ${short(v)}`).join(", ") : null],
      ["saturated", layer.units ? `${percent(layer.units.saturated)} of the inputs of its ${layer.units.nonlinearity}` : null],
      ["dead units", layer.units && layer.units.dead ? `${percent(layer.units.dead)} of ${layer.units.units}` : null],
      ["opens the train/eval gap by", layer.gap === null ? null : short(layer.gap) + " deviations of the output"],
      ...(n ? normFacts(n) : [])]),
    ...found.map((f) => make("p", { class: "finding " + f.severity }, make("b", {}, f.code + " "), f.title + ". ", f.cause)),
    make("div", { class: "charts" }, ...charts),
  ];
};

const article = document.getElementById("layer"), names = document.getElementById("names");
const show = (layer, move) => {
  article.replaceChildren(...details(layer));
  for (const link of names.querySelectorAll("a")) {
    if (link.hash === target(layer)) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  }
  if (move) { article.scrollIntoView({ block: "start" }); article.focus({ preventScroll: true }); }
};
const wanted = () => {
  const name = location.hash.startsWith("#layer=") ? decodeURIComponent(location.hash.slice(7)) : null;
  return shownBy(name);
};

// Modules that are no layers, as `bars` wants them; a stream's points are behind its blocks.
const named = (record) => ({ ...record, name: record.layer });
const stream = (s) => {
  const behind = s.blocks.map((name, i) => ({ name, ...s.points[i + 1] })), of = data.streams.length > 1 ? `, ${s.layer || "the model"}` : "";
  return [
    bars("Residual stream" + of, "root mean square of the median position behind each block", behind, (b) => b.size, true),
    bars("Outlier features" + of, "kurtosis of the features' mean squares behind each block: 1 where all are of one size", behind, (b) => b.kurtosis, true),
  ];
};

const troubled = new Set(data.findings.map((f) => shownBy(f.layer)));
names.append(...data.layers.map((layer) => make("li", {}, make("a", { href: target(layer) },
  make("span", {}, layer.name || "(the model itself)", troubled.has(layer) ? make("span", { class: "mark", title: "has findings" }, " !") : ""),
  make("span", { class: "soft" }, layer.kind)))));
const called = data.layers.filter((layer) => layer.order !== null);
document.getElementById("charts").append(...[
  bars("Gradient by depth", "norm of the loss's gradient at each layer's output; norm layers in the second colour", called, (l) => l.gradient && l.gradient.output, true),
  bars("Who opens the train/eval gap", "how far the model's output moves, in its deviations, when this layer alone is in train mode", called, (l) => l.gap),
  bars("Saturated units", "share of each nonlinearity's inputs in its flat part", called, (l) => l.units && l.units.saturated),
  bars("Size of the outputs", "standard deviation of each layer's output", called, (l) => l.output && l.output.all.std, true),
  ...data.streams.flatMap(stream),
  bars("Attention logits", "largest distance of a logit from the mean of its row, in each module that calls attention", data.attention.map(named), (a) => a.spread, true),
  bars("Collapsed attention", "share of attention's rows that give one key more than 99.75 %", data.attention.map(named), (a) => a.collapsed),
].filter((chart) => chart));
addEventListener("hashchange", () => { const layer = wanted(); if (layer) show(layer, true); });
const first = wanted() || data.layers.find((layer) => troubled.has(layer)) || data.layers[0];
if (first) show(first, false);
