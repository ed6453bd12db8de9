"use strict";
document.body.classList.add("scripted");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Tabs: one part of the page at a time; the address says which. Print shows all of them.
const tabs = all("[role=tab]");
function open(tab, focus) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  // Of the norms only those that this part has.
  const part = document.getElementById(tab.getAttribute("aria-controls"));
  const here = new Set(all("[data-norm]", part).map((element) => element.dataset.norm));
  document.querySelector(".filter.norms").hidden = !here.size;
  for (const box of all(".filter.norms input")) box.parentElement.hidden = !here.has(box.value);
  if (focus) tab.focus();
}
for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => { open(tab); history.replaceState(null, "", "#" + tab.getAttribute("aria-controls")); });
  tab.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, Home: -place, End: tabs.length - 1 - place}[event.key];
    if (step === undefined) return;
    event.preventDefault();
    open(tabs[(place + step + tabs.length) % tabs.length], true);
  });
}
const asked = () => tabs.find((tab) => "#" + tab.getAttribute("aria-controls") === location.hash);
addEventListener("hashchange", () => { if (asked()) open(asked()); });
open(asked() ?? tabs[0]);

// Filters: norms in figures and tables, verdicts of claims.
const hiding = document.head.appendChild(document.createElement("style"));
const norms = all(".filter.norms input");
const shown = () => new Set(norms.filter((box) => box.checked).map((box) => box.value));
function filterNorms() {
  hiding.textContent = norms.filter((box) => !box.checked).map((box) => `[data-norm="${CSS.escape(box.value)}"] { display: none; }`).join("\n");
  const visible = shown();
  for (const panel of all("svg.panel")) {
    // A panel that has nothing but a hidden norm goes with it.
    const lines = all("[data-norm]", panel);
    panel.classList.toggle("emptied", lines.every((line) => !visible.has(line.dataset.norm)));
    panel.style.display = panel.classList.contains("emptied") ? "none" : "";
  }
}
for (const box of norms) box.addEventListener("change", filterNorms);
for (const radio of all(".filter.verdicts input"))
  radio.addEventListener("change", () => {
    for (const claim of all(".claim")) claim.hidden = radio.value !== "all" && !claim.classList.contains(radio.value);
  });
for (const select of all("select[data-choices]"))
  select.addEventListener("change", () => {
    for (const panel of all("svg.panel", select.closest("figure"))) panel.classList.toggle("other", panel.dataset.choice !== select.value);
  });
// In print nobody can open what is folded.
let folded = [];
addEventListener("beforeprint", () => { folded = all(".claim:not([open])"); for (const one of folded) one.open = true; });
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });

// Hovering, or the arrow keys on a panel: all lines' values at one place.
const LEFT = 46, RIGHT = 10, WIDTH = 340;
const tip = document.getElementById("tip");
const number = (value, percent) => value === null ? "–" : percent ? +(100 * value).toPrecision(3) + "%" : String(+value.toPrecision(3));
function placeOf(data, x) {
  const [low, high, log] = data.x, f = log ? Math.log10 : (v) => v;
  return LEFT + (WIDTH - LEFT - RIGHT) * (f(x) - f(low)) / (f(high) - f(low));
}
function show(panel, at) {
  const data = panel.data, visible = shown();
  const lines = data.lines.filter((line) => visible.has(line.norm));
  if (!lines.length) return hide();
  const steps = data.steps, x = steps[at];
  panel.at = at;
  const guide = panel.querySelector(".guide"), place = placeOf(data, x);
  guide.setAttribute("x1", place); guide.setAttribute("x2", place);
  guide.classList.add("on");
  const rows = lines.map((line) => [line, nearest(line.x, x)]).filter(([line, i]) => Math.abs(line.x[i] - x) <= data.reach)
    .sort(([a, i], [b, j]) => b.y[j] - a.y[i]);
  const table = document.createElement("table");
  for (const [line, i] of rows) {
    const row = table.insertRow();
    const name = row.insertCell(), dot = document.createElement("span");
    dot.className = "dot";
    dot.style.background = panel.querySelector(`[data-norm="${CSS.escape(line.norm)}"]`)?.style.getPropertyValue("--c") ?? "";
    name.append(dot, line.norm + (line.label ? ", " + line.label : ""));
    row.insertCell().textContent = number(line.y[i], data.percent);
    row.insertCell().textContent = line.low ? `${number(line.low[i], data.percent)} – ${number(line.high[i], data.percent)}` : "";
  }
  tip.replaceChildren(`${data.label} ${data.names.length ? data.names[x] : x}`, table);
  tip.hidden = false;
  const box = panel.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = box.left + place / WIDTH * box.width;
  tip.style.left = Math.max(4, Math.min(left + 14, document.documentElement.clientWidth - size.width - 4)) + "px";
  const below = box.bottom + size.height < innerHeight;
  tip.style.top = Math.max(4, below ? box.bottom - 8 : box.top - size.height + 8) + "px";
}
function hide() {
  tip.hidden = true;
  for (const guide of all(".guide.on")) guide.classList.remove("on");
}
function nearest(values, x) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(values[best] - x)) best = i; });
  return best;
}
for (const panel of all("svg.panel")) {
  Object.defineProperty(panel, "data", {get() {
    const data = this.parsed ??= JSON.parse(this.dataset.lines);
    data.steps ??= [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    data.reach ??= (data.x[1] - data.x[0]) / 25;
    return data;
  }});
  panel.addEventListener("pointermove", (event) => {
    const box = panel.getBoundingClientRect(), wanted = (event.clientX - box.left) / box.width * WIDTH;
    const places = panel.data.steps.map((x) => placeOf(panel.data, x));
    hide();
    show(panel, nearest(places, wanted));
  });
  panel.addEventListener("pointerleave", hide);
  panel.addEventListener("blur", hide);
  panel.addEventListener("keydown", (event) => {
    const last = panel.data.steps.length - 1;
    const to = {ArrowRight: Math.min(last, (panel.at ?? -1) + 1), ArrowLeft: Math.max(0, (panel.at ?? 1) - 1), Home: 0, End: last}[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    hide();
    show(panel, to);
  });
}
