const colourOf = i => palette[i % palette.length];
const labelOf = g => g.seeds.length > 1 ? `${g.label} (${g.seeds.length} seeds)` : g.label;
const seeded = run => runs.filter(r => r.label === run.label).length > 1 ? `${run.label}, seed ${run.seed}` : run.label;
const named = (group, what) => groups.length > 1 ? `${group.label}, ${what}` : what;
const nothing = { seeds: 0, x: [], mean: [], low: [], high: [] };
const curve = (group, name) => group.curves[state.axis][name] || nothing;

function drawCurves() {
  const single = groups.length === 1, dashes = ["none", "7 4", "2 4"];
  const style = (i, k, colour) => ({ colour: single ? colour : colourOf(i), dash: single ? "none" : dashes[k % 3] });
  lines($("chart-roles"), groups.flatMap((g, i) => Object.keys(roleColours).map((role, k) => ({ name: named(g, role), ...style(i, k, roleColours[role]), band: curve(g, `reward/${role}`) }))), { title: "reward by role" });
  lines($("chart-rounds"), groups.flatMap((g, i) => Object.entries(g.rounds[state.axis]).map(([name, band], k) => ({ name: named(g, `round ${+name.split("_").pop() + 1}`), ...style(i, k, colourOf(k + 1)), band }))), { unit: true, title: "success by round" });
  lines($("chart-lengths"), groups.flatMap((g, i) => ["critique", "attempt"].map((what, k) => ({ name: named(g, what), ...style(i, k, roleColours[what]), band: curve(g, `${what}/tokens`) }))), { title: "tokens" });
}
// One chart for each task set: a mean over them would let one hide the other.
const taskNames = [...new Set(groups.flatMap(g => g.tasks.map(t => t.name)))];
const ofTask = (group, name) => group.tasks.find(t => t.name === name);
function drawSuccess() {
  const note = (groups.some(h => h.seeds.length > 1) ? "Band: 95 % interval over the seeds. " : "") + (groups.some(h => h.seeds.length === 1) ? "Thin: each step's training tasks. " : "") + "Thick: running mean. Rings: held-out problems, 95 % interval.";
  for (const name of taskNames) {
    const host = el("div"), caption = `Success without a critique: ${name}`;
    $("chart-free").append(chart(caption, host, note));
    drawn(() => lines(host, groups.flatMap((g, i) => ofTask(g, name) ? [{ name: labelOf(g), colour: colourOf(i), band: ofTask(g, name).curve[state.axis], raw: ofTask(g, name).raw[state.axis],
      rings: ofTask(g, name).heldout.map(h => ({ ...h, x: h[state.axis] })) }] : []), { unit: true, title: caption }));
  }
}
function drawSupervised() {
  const dashes = ["none", "7 4"], single = groups.length === 1, host = el("div");
  const curves = groups.flatMap((g, i) => Object.entries(g.supervised).map(([what, band], k) => ({ name: named(g, what), colour: single ? colourOf(k) : colourOf(i), dash: single ? "none" : dashes[k], band })));
  if (!curves.some(c => c.band.x.length)) return;
  $("curves").append(chart("Loss of supervised training", host, "Mean -log p of a token, in nats."));
  drawn(() => lines(host, curves, { label: "step", title: "loss of supervised training" }));
}
function drawTiles() {
  const g = groups[0], run = runs[0], weight = g.transfer.mean;
  const tile = (value, text) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, text));
  const tiles = [];
  for (const { name, heldout } of g.tasks) if (heldout.length) tiles.push(tile(`${percent(heldout[0].mean)} → ${percent(last(heldout).mean)}`, `held-out success on ${name} of ${labelOf(g)}, without a critique`));
  if (weight.x.length) tiles.push(tile(`${weight.mean[0].toFixed(2)} → ${last(weight.mean).toFixed(2)}`, `mean ${run.weight_name.toLowerCase()} of a revision's tokens`));
  tiles.push(tile(short(run.tokens), `generated tokens${g.seeds.length > 1 ? " a seed" : ""}${run.evaluation_tokens ? `; ${short(run.evaluation_tokens)} more in evaluations` : ""}`));
  const { counts, phases } = run.times, seconds = sum(Object.entries(phases).filter(([n]) => n !== "evaluation").map(([, v]) => sum(v.map((s, i) => s * counts[i]))));
  tiles.push(tile(seconds > 3600 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 60).toFixed(1)} min`, `of training over ${run.steps} steps`));
  $("tiles").append(...tiles);
  $("subtitle").textContent = groups.map(labelOf).join(", ");
}
const share = p => [percent(p.mean), el("span", { class: "ci" }, ` [${percent(p.low)}, ${percent(p.high)}]`)];
function drawTables() {
  const head = (...names) => el("tr", {}, ...names.map(n => el("th", { scope: "col" }, n)));
  const table = (names, rows) => $("tables").append(el("div", { class: "scroll", tabindex: 0 }, el("table", names[0] === "setting" ? { class: "setup" } : {}, head(...names), ...rows)));
  const mean = values => sum(values) / values.length, length = g => last((g.curves.step["critique/tokens"] || nothing).mean);
  if (runs.length > 1) table(["experiment", "task", "seeds", "before", "after", "generated tokens", "steps", "tokens a critique"], groups.flatMap(g => g.tasks.map(task => {
    const of = g.runs.map(r => runs[r]), ends = task.heldout.length ? [task.heldout[0], last(task.heldout)] : [];
    return el("tr", {}, el("td", {}, g.label), el("td", {}, task.name), el("td", {}, g.seeds.join(", ")), ...[0, 1].map(i => el("td", {}, ...(ends[i] ? share(ends[i]) : ["-"]))),
      el("td", {}, whole(mean(of.map(r => r.tokens)))), el("td", {}, whole(mean(of.map(r => r.steps)))), el("td", {}, length(g) === undefined ? "-" : short(length(g))));
  })));
  table(["run", "task", "before", "after", "generated tokens", "in evaluations"], runs.flatMap(run => run.table.map(t => el("tr", {}, el("td", {}, seeded(run)), el("td", {}, t.task),
    el("td", {}, ...share(t.before)), el("td", {}, ...share(t.after)), el("td", {}, whole(run.tokens)), el("td", {}, whole(run.evaluation_tokens))))));
  const controls = runs.flatMap(run => Object.entries(run.control).flatMap(([when, by]) => Object.entries(by).filter(([, c]) => c.failures).map(([task, c]) =>
    el("tr", {}, el("td", {}, `${seeded(run)}, ${when}`), el("td", {}, task), el("td", {}, `${c.failures}`), ...["critique", "empty", "plain"].map(a => el("td", {}, ...share(c[a])))))));
  if (controls.length) table(["retries of failed attempts", "task", "failed", "with the critique", "with an empty one", "another attempt"], controls);
  const first = groups.map(g => runs[g.runs[0]]), rows = [...new Set(first.flatMap(r => Object.keys(r.setup)))];
  if (first.length === 1) $("tables").append(el("dl", { class: "grid setup" }, ...rows.map(k => el("div", {}, el("dt", {}, k), el("dd", {}, first[0].setup[k])))));
  else table(["setting", ...groups.map(labelOf)], rows.map(k => el("tr", {}, el("td", {}, k), ...first.map((r, i) => el("td", {}, k === "seed" ? groups[i].seeds.join(", ") : r.setup[k])))));
}
function drawWeights() {
  groups.forEach(g => {
    const run = runs[g.runs.find(r => runs[r].weights.steps.length)];
    if (!run) return;
    const picture = el("div"), parts = el("div"), several = g.seeds.length > 1;
    $("weights").append(chart(`${run.weight_name} of every revision token${groups.length > 1 || several ? `: ${seeded(run)}` : ""}`, picture, "Stronger: more of the step's tokens. Solid line: their mean. Dotted: w = 1. Where the line rises, less is held back."),
      chart(`Held back and transferred${groups.length > 1 || several ? `: ${labelOf(g)}` : ""}`, parts, `Shares of the revisions' tokens.${several ? " Band: 95 % interval over the seeds." : ""}`));
    drawn(() => heat(picture, run));
    drawn(() => lines(parts, [{ name: "held back: w under 0.5", colour: "var(--held)", band: g.transfer.held }, { name: "transferred: w of at least 1", colour: "var(--moved)", band: g.transfer.moved }], { unit: true, label: "step", title: "shares of tokens" }));
  });
  if (!$("weights").children.length) $("weights").append(el("p", { class: "note" }, "No revision of these runs was calibrated, or their rollouts do not hold the weights."));
}
function drawTimes() {
  groups.forEach(g => {
    const run = runs[g.runs[0]], host = el("div");
    if (!run.times.steps.length) return;
    $("times").append(chart(`Seconds a step${groups.length > 1 || g.seeds.length > 1 ? `: ${seeded(run)}` : ""}`, host, "Evaluation is counted apart from training."));
    drawn(() => stacked(host, run));
  });
  const healths = { "actor/entropy": "Entropy of the policy", "actor/mismatch_abs": "Engine mismatch, mean |Δ log-prob|", "groups/flat_share": "Groups without a signal" };
  for (const [name, caption] of Object.entries(healths)) {
    if (!groups.some(g => g.curves.step[name])) continue;
    const host = el("div");
    $("health").append(chart(caption, host));
    drawn(() => lines(host, groups.map((g, i) => ({ name: g.label, colour: colourOf(i), band: curve(g, name) })), { title: caption }));
  }
}
// Calls by tool are one chart, calls that went wrong another; whatever else an environment counted has its own.
function drawCounted() {
  const names = [...new Set(groups.flatMap(g => Object.keys(g.counted.step)))].map(name => name.slice("task/".length)).sort();
  $("tools").hidden = !names.length;
  const wrong = names.filter(name => ["calls_repeated", "calls_invalid", "calls_refused"].includes(name));
  const calls = names.filter(name => name === "calls" || name.startsWith("calls_") && !wrong.includes(name));
  const charts = [["Calls by tool", calls], ["Repeated and invalid calls", wrong], ...names.filter(name => !wrong.includes(name) && !calls.includes(name)).map(name => [name, [name]])];
  const dashes = ["none", "7 4", "2 4", "9 3 2 3"], single = groups.length === 1;
  const title = name => name === "calls" ? "all calls" : name.replace(/^calls_/, "");
  const colour = (name, i, k) => !single ? colourOf(i) : name === "calls" ? "var(--ink)" : Object.hasOwn(data.agents, title(name)) ? data.agents[title(name)] : colourOf(k);
  for (const [caption, of] of charts) {
    if (!of.length) continue;
    const host = el("div");
    $("counted").append(chart(caption === "answered" ? "Share of attempts with an answer" : caption, host));
    drawn(() => lines(host, groups.flatMap((g, i) => of.map((name, k) => ({ name: named(g, title(name)), colour: colour(name, i, k), dash: single ? "none" : dashes[k % 4],
      band: g.counted[state.axis][`task/${name}`] || nothing }))), { title: caption, unit: caption === "answered" }));
  }
}
function drawHero() {
  const best = exemplary();
  if (!best) { $("example").querySelector("#hero").append(el("p", { class: "note" }, "No episode of these runs was rescued by a critique.")); return; }
  const [r, i] = best;
  $("hero").append(...episodeView(runs[r].episodes.shown[i], runs[r]));
  state.run = r;
  state.chosen = i;
}
document.querySelectorAll("button[data-axis]").forEach(button => button.addEventListener("click", () => {
  state.axis = button.dataset.axis;
  document.querySelectorAll("button[data-axis]").forEach(b => { b.classList.toggle("on", b === button); b.setAttribute("aria-pressed", b === button); });
  redraw();
}));
$("theme").addEventListener("click", () => {
  const next = { "": "light", light: "dark", dark: "" }[document.documentElement.dataset.theme || ""];
  document.documentElement.dataset.theme = next;
  $("theme").textContent = `theme: ${next || "system"}`;
});
drawTiles(); drawHero(); drawSuccess(); drawn(drawCurves); drawSupervised(); drawTables(); drawWeights(); drawCounted(); drawTimes(); drawFilters(); drawList();
$("list").children[state.chosen]?.scrollIntoView({ block: "nearest" });
scrollTo(0, 0);
document.body.dataset.ready = "yes";
