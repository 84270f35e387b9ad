"use strict";
// Whatever a model wrote reaches the page as text nodes only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const palette = ["#d1495b", "#30638e", "#edae49", "#00798c", "#7d5ba6", "#8d8741", "#c06c84", "#557a46"];
const state = { axis: "step", run: 0, outcome: "", task: "", text: "", from: 0, chosen: 0 };
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
const short = x => x >= 1e6 ? `${+(x / 1e6).toFixed(1)}M` : x >= 1e4 ? `${Math.round(x / 1e3)}k` : `${+x.toPrecision(3)}`;
const known = points => points.filter(p => p[1] !== null && p[1] !== undefined);
function smooth(points) {
  const half = Math.max(1, Math.floor(points.length / 24));
  return points.map((p, i) => {
    const window = points.slice(Math.max(0, i - half), i + half + 1);
    return [p[0], window.reduce((sum, q) => sum + q[1], 0) / window.length];
  });
}
function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
  return found;
}
function tip(event, text) {
  const node = $("tip");
  node.hidden = !text;
  if (!text) return;
  node.textContent = text;
  node.style.left = `${Math.min(event.clientX + 14, innerWidth - node.offsetWidth - 8)}px`;
  node.style.top = `${event.clientY + 16}px`;
}
function tipped(node, text) {
  node.addEventListener("mousemove", e => tip(e, text));
  node.addEventListener("mouseleave", e => tip(e, ""));
  return node;
}

// Charts: series are {name, colour, points, raw, rings: [{x, mean, low, high}]}.
function frame(xs, low, high, { format = short, label = "" } = {}) {
  const W = 560, H = 260, box = { left: 44, right: 10, top: 8, bottom: 34 };
  const left = Math.min(...xs), right = Math.max(...xs, left + 1e-9);
  const x = v => box.left + (v - left) / (right - left) * (W - box.left - box.right);
  const y = v => H - box.bottom - (v - low) / (high - low || 1) * (H - box.top - box.bottom);
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  for (const t of ticks(low, high)) {
    root.append(svg("line", { class: "axis", x1: box.left, x2: W - box.right, y1: y(t), y2: y(t) }));
    root.append(svg("text", { x: box.left - 6, y: y(t) + 4, "text-anchor": "end" }, format(t)));
  }
  for (const t of ticks(left, right, 6)) root.append(svg("text", { x: x(t), y: H - 16, "text-anchor": "middle" }, short(t)));
  root.append(svg("text", { x: W - box.right, y: H - 2, "text-anchor": "end" }, label));
  return { root, x, y, W, H, box, left, right };
}
const path = (points, x, y) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
function legend(series) {
  return el("div", { class: "legend" }, ...series.map(s => el("span", {}, el("i", { style: s.dash && s.dash !== "none" ? `background:repeating-linear-gradient(90deg, ${s.colour} 0 ${s.dash.split(" ")[0]}px, transparent 0 ${+s.dash.split(" ")[0] + 3}px)` : `background:${s.colour}` }), s.name)));
}
function lines(target, series, options = {}) {
  const host = $(target), all = series.flatMap(s => [...s.points, ...(s.rings || []).flatMap(r => [[r.x, r.low], [r.x, r.high]])]);
  host.replaceChildren();
  if (!all.length) { host.append(el("p", { class: "note" }, "Nothing of this was measured.")); return; }
  const ys = all.map(p => p[1]);
  const low = options.unit ? 0 : Math.min(0, ...ys), high = options.unit ? 1 : Math.max(...ys, low + 1e-9);
  const f = frame(all.map(p => p[0]), low, high, { format: options.unit ? percent : short, label: state.axis === "step" ? "step" : "generated tokens" });
  for (const s of series) {
    if (s.raw) f.root.append(svg("path", { d: path(s.points, f.x, f.y), fill: "none", stroke: s.colour, "stroke-width": .8, opacity: .28 }));
    f.root.append(svg("path", { d: path(s.raw ? smooth(s.points) : s.points, f.x, f.y), fill: "none", stroke: s.colour, "stroke-width": 2.2, "stroke-linejoin": "round", "stroke-dasharray": s.dash || "none" }));
    for (const r of s.rings || []) {
      f.root.append(svg("line", { x1: f.x(r.x), x2: f.x(r.x), y1: f.y(r.low), y2: f.y(r.high), stroke: s.colour, "stroke-width": 1.6, opacity: .55 }));
      f.root.append(tipped(svg("circle", { cx: f.x(r.x), cy: f.y(r.mean), r: 4.5, fill: "var(--card)", stroke: s.colour, "stroke-width": 2.2 }),
        `${s.name}: held-out ${percent(r.mean)} [${percent(r.low)}, ${percent(r.high)}], n ${r.n}`));
    }
  }
  // A cross-hair that reads every curve at once.
  const cross = svg("line", { class: "axis", y1: f.box.top, y2: f.H - f.box.bottom, visibility: "hidden" });
  f.root.append(cross);
  f.root.addEventListener("mousemove", e => {
    if (e.target.tagName === "circle") return;
    const at = (e.clientX - f.root.getBoundingClientRect().left) / f.root.getBoundingClientRect().width * f.W;
    const value = f.left + (at - f.box.left) / (f.W - f.box.left - f.box.right) * (f.right - f.left);
    const near = series.filter(s => s.points.length).map(s => {
      const p = s.points.reduce((a, b) => Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a);
      return `${s.name} ${options.unit ? percent(p[1]) : short(p[1])}`;
    });
    cross.setAttribute("x1", at); cross.setAttribute("x2", at); cross.setAttribute("visibility", "visible");
    tip(e, `${state.axis === "step" ? "step" : "tokens"} ${short(value)}: ${near.join(", ")}`);
  });
  f.root.addEventListener("mouseleave", e => { cross.setAttribute("visibility", "hidden"); tip(e, ""); });
  host.append(f.root, legend(series));
}
const xs = run => state.axis === "step" ? run.steps : run.tokens;
const curve = (run, name) => known(xs(run).map((x, i) => [x, (run.curves[name] || [])[i]]));
const named = (run, what) => runs.length > 1 ? `${run.label}, ${what}` : what;

function drawCurves() {
  lines("chart-free", runs.map((run, i) => ({
    name: run.label, colour: palette[i % palette.length], points: curve(run, "success/critique_free"), raw: true,
    rings: run.heldout.map(h => ({ x: state.axis === "step" ? h.step : h.tokens, ...h })),
  })), { unit: true });
  const styles = { attempt: "none", revision: "7 4", critique: "2 4" };
  const single = runs.length === 1, roleColours = { attempt: "var(--accent)", revision: "var(--good)", critique: "var(--critic)" };
  lines("chart-roles", runs.flatMap((run, i) => Object.entries(styles).map(([role, dash]) => ({
    name: named(run, role), colour: single ? roleColours[role] : palette[i % palette.length], dash: single ? "none" : dash,
    points: smooth(curve(run, `reward/${role}`)),
  }))).filter(s => s.points.length));
  lines("chart-rounds", runs.flatMap((run, i) => Object.entries(run.rounds).map(([name, values], r) => ({
    name: named(run, `round ${+name.slice(6) + 1}`), colour: single ? palette[(r + 1) % palette.length] : palette[i % palette.length],
    dash: single ? "none" : ["none", "7 4", "2 4"][r % 3], points: smooth(known(xs(run).map((x, k) => [x, values[k]]))),
  }))), { unit: true });
  lines("chart-lengths", runs.flatMap((run, i) => [["critique", "critique/tokens", "7 4"], ["attempt", "attempt/tokens", "none"]].map(([what, name, dash]) => ({
    name: named(run, what), colour: single ? roleColours[what] : palette[i % palette.length], dash: single ? "none" : dash, points: smooth(curve(run, name)),
  }))));
}

function drawTiles() {
  const run = runs[0], before = run.heldout[0], after = run.heldout[run.heldout.length - 1];
  const tile = (value, text) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, text));
  const found = [];
  if (after) found.push(tile(`${percent(before.mean)} → ${percent(after.mean)}`, "held-out success without a critique"));
  const weights = known(run.steps.map((s, i) => [s, (run.curves["actor/calibration_weight"] || [])[i]]));
  if (weights.length) found.push(tile(`${weights[0][1].toFixed(2)} → ${weights[weights.length - 1][1].toFixed(2)}`, "mean calibration weight of a revision's tokens"));
  if (run.tokens.length) found.push(tile(short(run.tokens[run.tokens.length - 1]), "generated tokens"));
  const seconds = Object.entries(run.times).filter(([n]) => n !== "evaluation").reduce((sum, [, v]) => sum + v.reduce((a, b) => a + b, 0), 0);
  found.push(tile(seconds > 3600 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 60).toFixed(1)} min`, `over ${run.steps.length} steps`));
  $("tiles").append(...found);
  $("subtitle").textContent = runs.map(r => r.label).join(", ");
}
function share(p) { return [percent(p.mean), el("span", { class: "ci" }, ` [${percent(p.low)}, ${percent(p.high)}]`)]; }
function drawTables() {
  const head = (...names) => el("tr", {}, ...names.map(n => el("th", {}, n)));
  const rows = runs.flatMap(run => run.table.map(t => el("tr", {}, el("td", {}, run.label), el("td", {}, t.task),
    el("td", {}, ...share(t.before)), el("td", {}, ...share(t.after)), el("td", {}, run.tokens.length ? run.tokens[run.tokens.length - 1].toLocaleString("en") : "-"))));
  $("tables").append(el("table", {}, head("run", "task", "before", "after", "generated tokens"), ...rows));
  const controls = runs.flatMap(run => Object.entries(run.control).flatMap(([when, by]) => Object.entries(by).filter(([, c]) => c.failures).map(([task, c]) =>
    el("tr", {}, el("td", {}, `${run.label}, ${when}`), el("td", {}, task), el("td", {}, `${c.failures}`), ...["critique", "empty", "plain"].map(a => el("td", {}, ...share(c[a])))))));
  if (controls.length) $("tables").append(el("table", {}, head("retries of failed attempts", "task", "failed", "with the critique", "with an empty one", "another attempt"), ...controls));
  const setup = [...new Set(runs.flatMap(r => Object.keys(r.setup)))];
  $("tables").append(el("table", {}, head("setting", ...runs.map(r => r.label)), ...setup.map(k => el("tr", {}, el("td", {}, k), ...runs.map(r => el("td", {}, r.setup[k]))))));
}

// Red: held back. Nothing: as likely without the critique. Green: transferred with more weight than 1.
function shade(weight, top) {
  if (weight === null) return "";
  if (weight < 1) return `color-mix(in srgb, var(--held) ${Math.round(68 * (1 - weight))}%, transparent)`;
  return `color-mix(in srgb, var(--moved) ${Math.round(18 + 50 * Math.min(1, (weight - 1) / Math.max(top - 1, 1e-9)))}%, transparent)`;
}
function drawWeights() {
  for (const run of runs) {
    const w = run.weights;
    if (!w.steps.length) continue;
    const bins = w.shares[0].length, columns = Math.min(w.steps.length, 120), f = frame([w.steps[0], w.steps[w.steps.length - 1] + 1], 0, run.w_max, { label: "step" });
    const top = Math.max(...w.shares.flat()), width = (f.W - f.box.left - f.box.right) / columns, height = (f.H - f.box.top - f.box.bottom) / bins;
    for (let c = 0; c < columns; c++) {
      const first = Math.floor(c * w.steps.length / columns), last = Math.max(first + 1, Math.floor((c + 1) * w.steps.length / columns));
      for (let b = 0; b < bins; b++) {
        const part = w.shares.slice(first, last).reduce((sum, s) => sum + s[b], 0) / (last - first);
        if (part <= 0) continue;
        const middle = (b + .5) / bins * run.w_max, colour = middle < 1 ? "var(--held)" : "var(--moved)";
        f.root.append(tipped(svg("rect", { x: f.box.left + c * width, y: f.y(run.w_max) + (bins - 1 - b) * height, width: width + .3, height: height + .3, fill: colour, opacity: (.08 + .92 * Math.sqrt(part / top)).toFixed(3) }),
          `step ${w.steps[first]}: ${(100 * part).toFixed(1)} % of tokens at w ${(b / bins * run.w_max).toFixed(2)} to ${((b + 1) / bins * run.w_max).toFixed(2)}`));
      }
    }
    const means = known(run.steps.map((s, i) => [s + .5, (run.curves["actor/calibration_weight"] || [])[i]]));
    if (means.length) f.root.append(svg("path", { d: path(smooth(means), f.x, f.y), fill: "none", stroke: "var(--ink)", "stroke-width": 2.2 }));
    $("weights").append(el("figure", {}, el("figcaption", {}, runs.length > 1 ? `Calibration weight: ${run.label}` : "Calibration weight of every revision token, step by step"), f.root,
      el("p", { class: "note" }, "Darker: more of the step's tokens. Line: their mean. Where the line rises, less is held back.")));
    const held = w.shares.map((s, i) => [w.steps[i], s.slice(0, Math.round(bins / run.w_max * .5)).reduce((a, b) => a + b, 0)]);
    const moved = w.shares.map((s, i) => [w.steps[i], s.slice(Math.round(bins / run.w_max)).reduce((a, b) => a + b, 0)]);
    const id = `held-${runs.indexOf(run)}`, axis = state.axis;
    $("weights").append(el("figure", {}, el("figcaption", {}, "Held back and transferred"), el("div", { id })));
    state.axis = "step";
    lines(id, [{ name: "held back: w under 0.5", colour: "var(--held)", points: held, raw: true }, { name: "transferred: w of at least 1", colour: "var(--moved)", points: moved, raw: true }], { unit: true });
    state.axis = axis;
  }
  if (!$("weights").children.length) $("weights").append(el("p", { class: "note" }, "No revision of these runs was calibrated, or their rollouts do not hold the weights."));
}
function drawTimes() {
  for (const run of runs) {
    const phases = Object.keys(run.times), totals = run.steps.map((_, i) => phases.reduce((sum, p) => sum + run.times[p][i], 0));
    if (!totals.length) continue;
    const f = frame([run.steps[0], run.steps[run.steps.length - 1] + 1], 0, Math.max(...totals, 1e-9), { label: "step", format: t => `${short(t)} s` });
    const whole = totals.reduce((a, b) => a + b, 0), width = Math.max(.8, (f.W - f.box.left - f.box.right) / totals.length);
    const base = totals.map(() => 0), series = [];
    phases.forEach((phase, k) => {
      const colour = palette[(k + 1) % palette.length], sum = run.times[phase].reduce((a, b) => a + b, 0);
      series.push({ name: `${phase} ${percent(sum / whole)}`, colour });
      run.times[phase].forEach((seconds, i) => {
        if (!seconds) return;
        f.root.append(tipped(svg("rect", { x: f.x(run.steps[i]), width, y: f.y(base[i] + seconds), height: Math.max(0, f.y(base[i]) - f.y(base[i] + seconds)), fill: colour }), `step ${run.steps[i]}: ${phase} ${seconds.toFixed(2)} s of ${totals[i].toFixed(2)} s`));
        base[i] += seconds;
      });
    });
    $("times").append(el("figure", {}, el("figcaption", {}, runs.length > 1 ? `Seconds a step: ${run.label}` : "Seconds a step"), f.root, legend(series)));
  }
}

// Episodes
const words = { alone: "succeeded at once", rescued: "rescued by critique", failed: "failed throughout", hurt: "hurt by critique" };
function visible() {
  const text = state.text.toLowerCase();
  return runs[state.run].episodes.shown.filter(e => (!state.outcome || e.outcome === state.outcome) && (!state.task || e.source === state.task)
    && e.step >= state.from && (!text || JSON.stringify([e.task, e.problem, e.rounds.map(r => r.turns.map(t => [t.tokens.map(x => x[0]).join(""), t.observation]))]).toLowerCase().includes(text)));
}
function drawFilters() {
  const host = $("filters"), change = (name, value) => { state[name] = value; state.chosen = 0; drawList(); };
  host.replaceChildren();
  if (runs.length > 1) host.append(el("select", { "aria-label": "run", onchange: e => { state.run = +e.target.value; state.task = ""; state.from = 0; drawFilters(); change("outcome", state.outcome); } }, ...runs.map((r, i) => el("option", { value: i, selected: i === state.run ? "" : null }, r.label))));
  for (const [key, name] of [["", "all"], ...Object.entries(words)]) {
    const n = runs[state.run].episodes.shown.filter(e => !key || e.outcome === key).length;
    host.append(el("button", { "data-outcome": key, class: state.outcome === key ? "on" : "", onclick: () => { change("outcome", key); drawFilters(); } }, `${name} (${n})`));
  }
  const sources = [...new Set(runs[state.run].episodes.shown.map(e => e.source))];
  if (sources.length > 1) host.append(el("select", { "aria-label": "task", onchange: e => change("task", e.target.value) }, el("option", { value: "" }, "every task"), ...sources.map(s => el("option", { value: s }, s))));
  const steps = runs[state.run].steps;
  if (steps.length) host.append(el("label", {}, "from step ", el("input", { type: "number", min: 0, max: steps[steps.length - 1], value: state.from, style: "width:6rem", onchange: e => change("from", +e.target.value || 0) })));
  host.append(el("input", { type: "search", placeholder: "search texts", "aria-label": "search texts", oninput: e => change("text", e.target.value) }));
}
function drawList() {
  const found = visible(), list = $("list"), total = runs[state.run].episodes.total;
  $("count").textContent = `${found.length} shown of ${total} played; arrow keys move`;
  list.replaceChildren(...found.map((e, i) => el("li", { class: i === state.chosen ? "on" : "", onclick: () => choose(i) },
    el("i", { class: `dot ${e.outcome}` }), el("em", {}, e.task), el("span", {}, `step ${e.step}`))));
  drawEpisode(found[state.chosen]);
}
function choose(i) {
  const items = $("list").children;
  if (i < 0 || i >= items.length) return;
  items[state.chosen]?.classList.remove("on");
  state.chosen = i;
  items[i].classList.add("on");
  items[i].scrollIntoView({ block: "nearest" });
  drawEpisode(visible()[i]);
}
function tokenSpan([text, weight, logprob], top) {
  const node = el("span", { class: "t", style: weight === null ? "" : `background:${shade(weight, top)}` }, text || (weight === null ? "" : "∎"));
  const facts = [];
  if (weight !== null) { node.dataset.w = weight; facts.push(`w ${weight.toFixed(3)}: ${weight < .5 ? "held back" : weight < 1 ? "partly transferred" : "transferred"}`); }
  if (logprob !== null) facts.push(`probability as written ${percent(Math.exp(logprob))}`);
  return tipped(node, facts.join(" · "));
}
function column(round, top) {
  const kind = round.role === "critique" ? "critique" : round.success ? "ok" : "no";
  const title = round.role === "critique" ? "Critique" : round.role === "attempt" ? "Attempt" : `Revision ${round.round}`;
  const earned = round.reward === null ? "not trained" : `reward ${short(round.reward)}, advantage ${round.advantage >= 0 ? "+" : ""}${round.advantage.toFixed(2)}`;
  const body = el("div", { class: "text" });
  round.turns.forEach((turn, i) => {
    body.append(el("div", {}, ...turn.tokens.map(t => tokenSpan(t, top))));
    if (turn.lost) body.append(el("div", { class: "note" }, "no action could be read"));
    if (turn.observation) body.append(el("div", { class: "obs" }, turn.observation));
  });
  const facts = [["", earned], ["", `${round.generated} tokens`]];
  if (round.role !== "critique") facts.push(["", `${round.success ? "succeeded" : "failed"}, outcome ${short(round.outcome)}, ${round.stop}`]);
  if (round.weight !== null && round.weight !== undefined) facts.push(["", `mean w ${round.weight.toFixed(2)}`]);
  return el("div", { class: `col ${kind}`, "data-role": round.role }, el("h3", {}, title, el("small", {}, round.role === "critique" ? "" : round.success ? "✓" : "✗")), body,
    round.summary ? el("p", { class: "note" }, round.summary) : null, el("div", { class: "facts" }, ...facts.map(([, text]) => el("span", {}, text))));
}
function drawEpisode(episode) {
  const host = $("episode");
  if (!episode) { host.replaceChildren(el("p", { class: "note" }, "No episode matches.")); return; }
  const top = runs[state.run].w_max;
  const weighted = episode.rounds.some(r => r.weight !== null && r.weight !== undefined);
  const parts = [el("div", { class: "facts" }, el("b", {}, episode.task), el("span", {}, `step ${episode.step}, try ${episode.index}`), el("span", {}, words[episode.outcome])),
    el("div", { class: "text problem" }, episode.problem),
    el("div", { class: "cols" }, ...episode.rounds.map(r => column(r, top))),
    weighted ? el("div", { class: "key" }, el("span", { class: "held" }, "held back, w 0"), el("i", { style: `background:linear-gradient(90deg, ${shade(0, top)}, transparent 50%, ${shade(1.001, top)} 51%, ${shade(top, top)})` }), el("span", { class: "moved" }, `transferred, w ${short(top)}`)) : null];
  host.replaceChildren(...parts.filter(p => p !== null));
}
document.querySelectorAll("button[data-axis]").forEach(button => button.addEventListener("click", () => {
  state.axis = button.dataset.axis;
  document.querySelectorAll("button[data-axis]").forEach(b => b.classList.toggle("on", b === button));
  drawCurves();
}));
$("list").addEventListener("keydown", e => {
  const move = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[e.key];
  if (move) { e.preventDefault(); choose(state.chosen + move); }
});
// Open on what the page is for: an episode that critique rescued, with its weights.
const spread = e => {
  const w = e.outcome === "rescued" ? e.rounds.flatMap(r => r.turns.flatMap(t => t.tokens.map(x => x[1]).filter(x => x !== null))) : [];
  return w.length > 1 ? Math.max(...w) - Math.min(...w) : -1;
};
const spreads = runs[0].episodes.shown.map(spread), first = spreads.indexOf(Math.max(...spreads, 0));
drawTiles(); drawCurves(); drawTables(); drawWeights(); drawTimes(); drawFilters();
state.chosen = Math.max(0, first);
drawList();
$("list").children[state.chosen]?.scrollIntoView({ block: "nearest" });
scrollTo(0, 0);
document.body.dataset.ready = "yes";
