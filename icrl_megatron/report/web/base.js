"use strict";
// Whatever a model wrote reaches the page as text nodes only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { runs, groups } = data;
const palette = ["#c8503f", "#3a75b0", "#d99a2b", "#12897c", "#8a63b5", "#8d8741", "#c06c94", "#557a46"];
const roleColours = { attempt: "var(--accent)", revision: "var(--good)", critique: "var(--critic)" };
const state = { axis: "step", run: 0, outcome: "", task: "", text: "", from: 0, sort: "played", chosen: 0 };
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter(c => c !== null));
  return node;
}
function svg(tag, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}
const percent = x => `${Math.round(100 * x)} %`;
const whole = x => Math.round(x).toLocaleString("en");
const short = x => Math.abs(x) >= 1e6 ? `${+(x / 1e6).toFixed(1)}M` : Math.abs(x) >= 1e4 ? `${Math.round(x / 1e3)}k` : `${+x.toPrecision(3)}`;
const sum = values => values.reduce((a, b) => a + b, 0);
const last = values => values[values.length - 1];
function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
  return found;
}
function tip(x, y, text) {
  const node = $("tip");
  node.hidden = !text;
  if (!text) return;
  node.textContent = text;
  node.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - node.offsetWidth - 8))}px`;
  node.style.top = `${y + 16 + node.offsetHeight > innerHeight ? y - node.offsetHeight - 12 : y + 16}px`;
}
function tipped(node, text) {
  node.addEventListener("mousemove", e => tip(e.clientX, e.clientY, text));
  node.addEventListener("mouseleave", () => tip(0, 0, ""));
  return node;
}
const chart = (caption, host, note = "") => el("figure", {}, el("figcaption", {}, caption), host, note ? el("p", { class: "note" }, note) : null);

// What to draw again when the window's width or the axis changes: charts are as wide as their place, so that their
// letters keep their size on a telephone.
const drawings = [];
function drawn(draw) { drawings.push(draw); draw(); }
function redraw() { drawings.forEach(draw => draw()); }
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
