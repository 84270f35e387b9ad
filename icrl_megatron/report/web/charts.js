// A series: {name, colour, dash, band: {x, mean, low, high}, raw: [[x, y]], rings: [{x, mean, low, high, n}]}.
function frame(host, xs, low, high, { format = short, label = "", title = "" } = {}) {
  const W = Math.max(280, Math.min(1360, host.clientWidth || 560)), H = Math.round(Math.max(200, Math.min(290, W * .45))), box = { left: 46, right: 12, top: 8, bottom: 36 };
  const left = Math.min(...xs), right = Math.max(...xs, left + 1e-9);
  const x = v => box.left + (v - left) / (right - left) * (W - box.left - box.right);
  const y = v => H - box.bottom - (v - low) / (high - low || 1) * (H - box.top - box.bottom);
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title, tabindex: 0 });
  for (const t of ticks(low, high, H < 220 ? 4 : 5)) {
    root.append(svg("line", { class: "axis", x1: box.left, x2: W - box.right, y1: y(t), y2: y(t) }));
    root.append(svg("text", { x: box.left - 6, y: y(t) + 4, "text-anchor": "end" }, format(t)));
  }
  for (const t of ticks(left, right, Math.floor(W / 90))) root.append(svg("text", { x: x(t), y: H - 19, "text-anchor": "middle" }, short(t)));
  root.append(svg("text", { x: W - box.right, y: H - 3, "text-anchor": "end" }, label));
  return { root, x, y, W, H, box, left, right };
}
const path = (points, x, y) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
const zip = (xs, ys) => xs.map((x, i) => [x, ys[i]]);
function legend(series) {
  return el("div", { class: "legend" }, ...series.map(s => el("span", {}, el("i", { style: s.dash && s.dash !== "none" ? `background:repeating-linear-gradient(90deg, ${s.colour} 0 ${s.dash.split(" ")[0]}px, transparent 0 ${+s.dash.split(" ")[0] + 3}px)` : `background:${s.colour}` }), s.name)));
}
const axisName = () => state.axis === "step" ? "step" : "generated tokens";

function lines(host, series, options = {}) {
  series = series.filter(s => s.band.x.length || (s.rings || []).length);
  const rings = series.flatMap(s => s.rings || []);
  host.replaceChildren();
  if (!series.length) { host.append(el("p", { class: "note" }, "Nothing of this was measured.")); return; }
  const xs = [...series.flatMap(s => s.band.x), ...rings.map(r => r.x)];
  const ys = [...series.flatMap(s => [...s.band.low, ...s.band.high]), ...rings.flatMap(r => [r.low, r.high])];
  const low = options.unit ? 0 : Math.min(0, ...ys), high = options.unit ? 1 : Math.max(...ys, low + 1e-9);
  const value = options.unit ? percent : short;
  const curves = series.filter(s => s.band.x.length);
  const ends = curves.map(s => `${s.name} from ${value(s.band.mean[0])} to ${value(last(s.band.mean))}`).join("; ");
  const f = frame(host, xs, low, high, { format: value, label: options.label || axisName(), title: `${options.title || ""}: ${ends}` });
  for (const s of series) {
    const b = s.band;
    if (b.seeds > 1) f.root.append(svg("path", { class: "band", d: `${path(zip(b.x, b.high), f.x, f.y)}L${path(zip(b.x, b.low).reverse(), f.x, f.y).slice(1)}Z`, fill: s.colour, opacity: .17 }));
    if (s.raw && s.raw.length) f.root.append(svg("path", { d: path(s.raw, f.x, f.y), fill: "none", stroke: s.colour, "stroke-width": .9, opacity: .33 }));
    f.root.append(svg("path", { d: path(zip(b.x, b.mean), f.x, f.y), fill: "none", stroke: s.colour, "stroke-width": 2.3, "stroke-linejoin": "round", "stroke-dasharray": s.dash || "none" }));
    for (const r of s.rings || []) {
      f.root.append(svg("line", { x1: f.x(r.x), x2: f.x(r.x), y1: f.y(r.low), y2: f.y(r.high), stroke: s.colour, "stroke-width": 1.6, opacity: .6 }));
      f.root.append(tipped(svg("circle", { cx: f.x(r.x), cy: f.y(r.mean), r: 4.2, fill: "var(--card)", stroke: s.colour, "stroke-width": 2.2 }),
        `${s.name}: held-out ${percent(r.mean)} [${percent(r.low)}, ${percent(r.high)}], ${r.n} attempts`));
    }
  }
  readable(f, curves, value, options.label || (state.axis === "step" ? "step" : "tokens"));
  host.append(f.root, legend(series));
}

// A cross-hair that reads every curve at once, by mouse or with the arrow keys.
function readable(f, series, value, unit) {
  const cross = svg("line", { class: "axis", y1: f.box.top, y2: f.H - f.box.bottom, visibility: "hidden", "stroke-dasharray": "3 3" });
  f.root.append(cross);
  let at = f.left;
  function show(clientX, clientY) {
    const near = series.map(s => {
      const b = s.band, i = b.x.reduce((best, x, k) => Math.abs(x - at) < Math.abs(b.x[best] - at) ? k : best, 0);
      return `${s.name} ${value(b.mean[i])}${b.seeds > 1 ? ` [${value(b.low[i])}, ${value(b.high[i])}]` : ""}`;
    });
    cross.setAttribute("x1", f.x(at)); cross.setAttribute("x2", f.x(at)); cross.setAttribute("visibility", "visible");
    tip(clientX, clientY, `${unit} ${short(at)}: ${near.join(", ")}`);
  }
  function hide() { cross.setAttribute("visibility", "hidden"); tip(0, 0, ""); }
  f.root.addEventListener("mousemove", e => {
    if (e.target.tagName === "circle") return;
    const place = f.root.getBoundingClientRect(), x = (e.clientX - place.left) / place.width * f.W;
    at = Math.max(f.left, Math.min(f.right, f.left + (x - f.box.left) / (f.W - f.box.left - f.box.right) * (f.right - f.left)));
    show(e.clientX, e.clientY);
  });
  f.root.addEventListener("mouseleave", hide);
  f.root.addEventListener("blur", hide);
  f.root.addEventListener("keydown", e => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[e.key];
    if (!move) return;
    e.preventDefault();
    at = Math.max(f.left, Math.min(f.right, at + move * (f.right - f.left) / 60));
    const place = f.root.getBoundingClientRect();
    show(place.left + f.x(at) / f.W * place.width, place.top + place.height / 3);
  });
}

// The picture of the weights: a column for each step that was read, a row for each bin of w; darker is more tokens.
function heat(host, run) {
  const w = run.weights, bins = w.shares[0].length, columns = w.steps.length;
  host.replaceChildren();
  const f = frame(host, [w.steps[0], last(w.steps) + 1], 0, run.w_max, { label: "step", title: `calibration weights of ${sum(w.counts)} revision tokens over ${columns} steps` });
  const top = Math.max(...w.shares.flat()), wide = (f.W - f.box.left - f.box.right) / columns, high = (f.H - f.box.top - f.box.bottom) / bins;
  w.shares.forEach((shares, c) => shares.forEach((part, b) => {
    if (part <= 0) return;
    const middle = (b + .5) / bins * run.w_max;
    f.root.append(svg("rect", { x: (f.box.left + c * wide).toFixed(2), y: (f.y(run.w_max) + (bins - 1 - b) * high).toFixed(2), width: (wide + .3).toFixed(2), height: (high + .3).toFixed(2), fill: middle < 1 ? "var(--held)" : "var(--moved)", opacity: (.06 + .94 * Math.sqrt(part / top)).toFixed(3) }));
  }));
  f.root.append(svg("line", { x1: f.box.left, x2: f.W - f.box.right, y1: f.y(1), y2: f.y(1), stroke: "var(--ink)", "stroke-width": 1, "stroke-dasharray": "2 4", opacity: .7 }));
  const middles = w.steps.map((_, c) => [f.left + (c + .5) / columns * (f.right - f.left), w.mean[c]]);
  f.root.append(svg("path", { d: path(middles, f.x, f.y), fill: "none", stroke: "var(--ink)", "stroke-width": 2.3, "stroke-linejoin": "round" }));
  f.root.addEventListener("mousemove", e => {
    const place = f.root.getBoundingClientRect(), scale = f.W / place.width;
    const c = Math.floor(((e.clientX - place.left) * scale - f.box.left) / wide), b = bins - 1 - Math.floor(((e.clientY - place.top) * scale - f.box.top) / high);
    const part = (w.shares[c] || [])[b];
    tip(e.clientX, e.clientY, part === undefined ? "" : `step ${w.steps[c]}: ${(100 * part).toFixed(1)} % of ${w.counts[c]} tokens at w ${(b / bins * run.w_max).toFixed(2)} to ${((b + 1) / bins * run.w_max).toFixed(2)}`);
  });
  f.root.addEventListener("mouseleave", () => tip(0, 0, ""));
  host.append(f.root);
}

function stacked(host, run) {
  const { steps, counts, phases } = run.times, names = Object.keys(phases);
  const totals = steps.map((_, i) => sum(names.map(n => phases[n][i])));
  host.replaceChildren();
  const end = last(steps) + last(counts);
  const f = frame(host, [steps[0], end], 0, Math.max(...totals, 1e-9), { label: "step", format: t => `${short(t)} s`, title: `seconds a step, ${steps.length} columns` });
  const all = sum(totals.map((t, i) => t * counts[i])), base = totals.map(() => 0), series = [];
  names.forEach((name, k) => {
    const colour = palette[(k + 1) % palette.length];
    series.push({ name: `${name} ${percent(sum(phases[name].map((s, i) => s * counts[i])) / (all || 1))}`, colour });
    phases[name].forEach((seconds, i) => {
      if (!seconds) return;
      const wide = Math.max(.8, f.x(steps[i] + counts[i]) - f.x(steps[i]));
      f.root.append(tipped(svg("rect", { x: f.x(steps[i]), width: wide, y: f.y(base[i] + seconds), height: Math.max(0, f.y(base[i]) - f.y(base[i] + seconds)), fill: colour }), `step ${steps[i]}: ${name} ${seconds.toFixed(2)} s of ${totals[i].toFixed(2)} s`));
      base[i] += seconds;
    });
  });
  host.append(f.root, legend(series));
}
