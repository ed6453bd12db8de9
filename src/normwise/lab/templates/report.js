"use strict";
document.body.classList.add("scripted");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Tabs: one part of the page at a time; the address says which, or which task or claim of a part. Print shows all.
const tabs = all("[role=tab]");
function open(tab, focus) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  offerNorms();
  if (focus) tab.focus();
  dispatchEvent(new Event("resize")); // charts fit the screen as it is now
}
// Of the norms only those that are seen: of this part, and of its tasks those that are unfolded.
function offerNorms() {
  const here = new Set(all("[role=tabpanel]:not([hidden]) [data-norm]").filter((one) => !one.closest(".task:not([open])")).map((one) => one.dataset.norm));
  document.querySelector(".filter.norms").hidden = !here.size;
  for (const box of all(".filter.norms input")) box.parentElement.hidden = !here.has(box.value);
}
for (const task of all(".task"))
  task.addEventListener("toggle", () => { offerNorms(); if (task.open) dispatchEvent(new Event("resize")); });
for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => { open(tab); history.replaceState(null, "", "#" + tab.getAttribute("aria-controls")); });
  tab.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, Home: -place, End: tabs.length - 1 - place}[event.key];
    if (step === undefined) return;
    event.preventDefault();
    open(tabs[(place + step + tabs.length) % tabs.length], true);
  });
}
function openAsked() {
  const wanted = document.getElementById(location.hash.slice(1)), part = wanted?.closest("[role=tabpanel]");
  if (part) open(tabs.find((tab) => tab.getAttribute("aria-controls") === part.id));
  if (wanted?.matches("details")) { wanted.open = true; wanted.scrollIntoView(); }
}
addEventListener("hashchange", openAsked);
open(tabs[0]);
openAsked();

// Filters: norms in figures and tables, verdicts of claims.
const hiding = document.head.appendChild(document.createElement("style"));
const norms = all(".filter.norms input");
const shown = () => new Set(norms.filter((box) => box.checked).map((box) => box.value));
function filterNorms() {
  hiding.textContent = norms.filter((box) => !box.checked).map((box) => `[data-norm="${CSS.escape(box.value)}"] { display: none; }`).join("\n");
  for (const panel of all(".panel")) {
    // A panel that has nothing but a hidden norm goes with it; another gets its curves anew.
    panel.classList.toggle("emptied", !rowsOf(panel).length);
    if (panel.view) panel.view.data("rows", structuredClone(rowsOf(panel))).run();
  }
}
for (const box of norms) box.addEventListener("change", filterNorms);
for (const radio of all(".filter.verdicts input"))
  radio.addEventListener("change", () => {
    for (const claim of all(".claim")) claim.hidden = radio.value !== "all" && !claim.classList.contains(radio.value);
  });
for (const select of all("select[data-choices]"))
  select.addEventListener("change", () => {
    for (const panel of all(".panel", select.closest("figure"))) panel.classList.toggle("other", panel.dataset.choice !== select.value);
  });
// In print nobody can open what is folded.
let folded = [];
addEventListener("beforeprint", () => { folded = all(".claim:not([open]), .task:not([open])"); for (const one of folded) one.open = true; });
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });

// Charts: what the page has as a picture becomes live when it comes near the screen.
const {config, templates} = JSON.parse(document.getElementById("charts").textContent);
const fieldsOf = (panel) => panel.fields ??= JSON.parse(panel.dataset.chart);
const rowsOf = (panel) => { const visible = shown(); return fieldsOf(panel).$rows.filter((row) => visible.has(row.norm)); };
const fill = (place, given) => typeof place === "string" ? given[place] ?? place : Array.isArray(place) ? place.map((part) => fill(part, given))
  : place && typeof place === "object" ? Object.fromEntries(Object.entries(place).map(([name, part]) => [name, fill(part, given)])) : place;
const specOf = (panel) => fill(templates[fieldsOf(panel).template], {...fieldsOf(panel), $rows: rowsOf(panel)});
async function enliven(panel) {
  if (panel.view !== undefined) return;
  panel.view = null;
  const box = document.createElement("div"), spec = {...specOf(panel), width: "container", autosize: {type: "fit-x", contains: "padding"}, config};
  panel.append(box);
  panel.view = (await vegaEmbed(box, spec, {actions: false, renderer: "svg", mode: "vega-lite"})).view;
  for (const old of [...panel.children]) if (old !== box) old.remove();
  panel.view.data("rows", structuredClone(rowsOf(panel))).run(); // norms may have been hidden meanwhile
}
const near = new IntersectionObserver((seen) => seen.filter((one) => one.isIntersecting).forEach((one) => { near.unobserve(one.target); enliven(one.target); }), {rootMargin: "200px"});

// Pointing at a chart, or the arrow keys on it: all curves' values at one place.
const tip = document.getElementById("tip");
const number = (value, percent) => value === null ? "–" : percent ? +(100 * value).toPrecision(3) + "%" : String(+value.toPrecision(3));
const placesOf = (panel) => [...new Set(rowsOf(panel).flatMap((row) => row.x))].sort((a, b) => a - b);
function show(panel, x) {
  const fields = fieldsOf(panel), percent = fields.template.endsWith("percent");
  const rows = rowsOf(panel).map((row) => [row, row.x.indexOf(x)]).filter(([, i]) => i >= 0).sort(([a, i], [b, j]) => b.y[j] - a.y[i]);
  if (x === undefined || !rows.length) return hide();
  panel.at = x;
  panel.view.data("at", [{x}]).run();
  const table = document.createElement("table");
  for (const [row, i] of rows) {
    const line = table.insertRow(), name = line.insertCell(), dot = document.createElement("span");
    dot.className = "dot";
    dot.style.background = fields.$colours[fields.$norms.indexOf(row.norm)];
    name.append(dot, row.norm + (row.label ? ", " + row.label : ""));
    line.insertCell().textContent = number(row.y[i], percent);
    line.insertCell().textContent = row.high.length ? `${number(row.low[i], percent)} – ${number(row.high[i], percent)}` : "";
  }
  tip.replaceChildren(`${fields.$label} ${fields.$places.length ? fields.$places[x] : x}`, table);
  tip.hidden = false;
  const box = panel.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = box.left + panel.view.origin()[0] + panel.view.scale("x")(x);
  tip.style.left = Math.max(4, Math.min(left + 14, document.documentElement.clientWidth - size.width - 4)) + "px";
  tip.style.top = Math.max(4, box.bottom + size.height < innerHeight ? box.bottom - 8 : box.top - size.height + 8) + "px";
}
function hide() {
  tip.hidden = true;
  for (const panel of all(".panel")) if (panel.at !== undefined) { delete panel.at; panel.view.data("at", []).run(); }
}
// A part of an axis `factor` as long, about its middle or `about`; null shows all again.
function zoom(panel, factor) {
  for (const name of ["x", "y"]) {
    const scale = panel.view.scale(name), [a, b] = scale.range(), half = factor * (b - a) / 2, middle = name === "x" && panel.at !== undefined ? scale(panel.at) : (a + b) / 2;
    panel.view.signal("zoom_" + name, factor ? [scale.invert(middle - half), scale.invert(middle + half)] : null);
  }
  panel.view.run();
}
for (const panel of all(".panel")) {
  near.observe(panel);
  panel.addEventListener("pointermove", (event) => {
    if (!panel.view || event.buttons) return;
    const wanted = event.clientX - panel.getBoundingClientRect().left - panel.view.origin()[0], scale = panel.view.scale("x");
    const away = (x) => Math.abs(scale(x) - wanted);
    show(panel, placesOf(panel).reduce((best, x) => best === undefined || away(x) < away(best) ? x : best, undefined));
  });
  panel.addEventListener("pointerleave", hide);
  panel.addEventListener("blur", hide);
  panel.addEventListener("keydown", (event) => {
    if (!panel.view || event.ctrlKey || event.metaKey || event.altKey) return;
    const places = placesOf(panel), at = places.indexOf(panel.at), last = places.length - 1;
    const to = {ArrowRight: Math.min(last, at + 1), ArrowLeft: at < 0 ? last : Math.max(0, at - 1), Home: 0, End: last}[event.key];
    const factor = {"+": 0.5, "=": 0.5, "-": 2, "0": 0}[event.key];
    if (event.key === "Escape") hide();
    if (factor !== undefined) zoom(panel, factor);
    if (to !== undefined) show(panel, places[to]);
    if (to !== undefined || factor !== undefined) event.preventDefault();
  });
}

// Saving: the panels of a figure that are shown as one picture with a legend, or their numbers.
const resolved = (text) => text.replace(/var\((--\w+)\)/g, (_, name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim());
const walk = (part, change) => Array.isArray(part) ? part.map((one) => walk(one, change)) : part && typeof part === "object"
  ? change(Object.fromEntries(Object.entries(part).map(([name, one]) => [name, walk(one, change)]))) : part;
function pictureOf(figure) {
  const panels = all(".panel:not(.other, .emptied)", figure);
  // One scale for all: a panel's own knows its norms alone, and of several Vega would take the first.
  const colours = Object.fromEntries(panels.map(fieldsOf).flatMap((one) => one.$norms.map((norm, i) => [norm, one.$colours[i]])));
  const spec = panels.length ? {title: figure.querySelector("h3").textContent, columns: 3, resolve: {scale: {color: "shared"}},
    concat: walk(panels.map(specOf), (part) => {
      delete part.params; // of which, as of names, there may be no two in one chart
      delete part.name;
      if (part.field === "norm") {
        part.legend = {title: null, symbolType: "circle", orient: "bottom"};
        part.scale = {domain: Object.keys(colours), range: Object.values(colours)};
      }
      return part;
    })} : JSON.parse(figure.dataset.spec);
  return JSON.parse(resolved(JSON.stringify({...spec, config: {...config, background: "var(--card)"}})));
}
function numbersOf(figure) {
  const cell = (value) => value === null || value === undefined ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value;
  const lines = all(".panel:not(.other, .emptied)", figure).flatMap((panel) => rowsOf(panel).flatMap((row) => row.x.map((x, i) =>
    [fieldsOf(panel).$title, row.norm, row.label, fieldsOf(panel).$places[x] ?? x, row.y[i], row.low[i], row.high[i]])));
  const table = lines.length ? [["panel", "norm", "curve", fieldsOf(figure.querySelector(".panel")).$label, "value", "low", "high"], ...lines]
    : all(".heat tr", figure).map((row) => [...row.cells].map((one) => one.innerText.trim().replace(/\s+/g, " ")));
  return table.map((line) => line.map(cell).join(",")).join("\n") + "\n";
}
async function save(figure, kind) {
  let address;
  if (kind === "csv") address = URL.createObjectURL(new Blob([numbersOf(figure)], {type: "text/csv"}));
  else {
    const {view, finalize} = await vegaEmbed(document.createElement("div"), pictureOf(figure), {actions: false, renderer: "svg", mode: "vega-lite"});
    address = kind === "png" ? await view.toImageURL("png", 2) : URL.createObjectURL(new Blob([await view.toSVG()], {type: "image/svg+xml"}));
    finalize();
  }
  const link = document.createElement("a");
  link.href = address;
  link.download = `${figure.closest(".task, [role=tabpanel]").id}-${figure.dataset.picture}.${kind}`;
  link.click();
  figure.querySelector(".save").open = false;
}
for (const button of all("[data-save]")) button.addEventListener("click", () => save(button.closest("[data-picture]"), button.dataset.save));
