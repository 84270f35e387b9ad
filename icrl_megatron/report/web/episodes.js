const words = { alone: "succeeded at once", rescued: "rescued by critique", failed: "failed throughout", hurt: "hurt by critique" };
const marks = { alone: "✓", rescued: "↑", failed: "✗", hurt: "↓" };
const sorts = { played: "as played", held: "most held back first", moved: "most transferred first", spread: "widest range of w first", advantage: "largest advantage first" };

// Orange: held back. Nothing: as likely without the critique. Blue: transferred with more weight than 1.
function shade(weight, top) {
  if (weight === null) return "";
  if (weight < 1) return `color-mix(in srgb, var(--held-fill) ${Math.round(92 * (1 - weight))}%, transparent)`;
  return `color-mix(in srgb, var(--moved-fill) ${Math.round(30 + 62 * Math.min(1, (weight - 1) / Math.max(top - 1, 1e-9)))}%, transparent)`;
}
const tokensOf = turn => turn.parts.flatMap(p => p.tokens);
const textOf = tokens => tokens.map(t => t[0]).join("");
const roundWeights = round => round.turns.flatMap(t => tokensOf(t).map(x => x[1]).filter(x => x !== null));
const weightsOf = episode => episode.rounds.flatMap(roundWeights);
function facts([, weight, logprob]) {
  const found = [];
  if (weight !== null) found.push(`w ${weight.toFixed(3)}: ${weight < .5 ? "held back" : weight < 1 ? "partly transferred" : "transferred"}`);
  if (logprob !== null) found.push(`probability as written ${percent(Math.exp(logprob))}`);
  return found.join(" · ");
}
function tokenSpan(token, top) {
  const [text, weight] = token;
  const node = el("span", { class: "t", style: weight === null ? "" : `background:${shade(weight, top)}` }, text || (weight === null ? "" : "∎"));
  if (weight !== null) node.dataset.w = weight;
  node.dataset.facts = facts(token);
  return tipped(node, node.dataset.facts);
}

// Arrow keys walk through the tokens of a text and say what the mouse would.
function walkable(text) {
  const tokens = [...text.querySelectorAll(".t")].filter(t => t.dataset.facts);
  if (!tokens.length) return text;
  let at = -1;
  const leave = () => { tokens[at]?.classList.remove("at"); tip(0, 0, ""); };
  text.tabIndex = 0;
  text.setAttribute("aria-label", "text; left and right arrows walk through its tokens");
  text.addEventListener("blur", leave);
  text.addEventListener("keydown", e => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[e.key];
    if (!move) return;
    e.preventDefault();
    leave();
    at = Math.max(0, Math.min(tokens.length - 1, at + move));
    const folded = tokens[at].closest("details");
    if (folded) folded.open = true;
    tokens[at].classList.add("at");
    tokens[at].scrollIntoView({ block: "nearest" });
    const place = tokens[at].getBoundingClientRect();
    tip(place.left, place.bottom, `${tokens[at].textContent.trim()}: ${tokens[at].dataset.facts}`);
  });
  return text;
}
function transferred(weights) {
  const part = test => weights.filter(test).length / weights.length;
  const held = part(w => w < .5), moved = part(w => w >= 1), between = 1 - held - moved;
  return el("div", {}, el("div", { class: "parts", role: "img", "aria-label": `${percent(held)} held back, ${percent(between)} partly, ${percent(moved)} transferred` },
    el("i", { class: "h", style: `flex:${held}` }), el("i", { class: "p", style: `flex:${between}` }), el("i", { class: "m", style: `flex:${moved}` })),
    el("div", { class: "facts" }, el("span", {}, `${percent(held)} held back (w < 0.5)`), el("span", {}, `${percent(between)} partly`), el("span", {}, `${percent(moved)} transferred (w ≥ 1)`)));
}
// One line of a call or an observation, which opens to the whole.
function collapsed(kind, style, name, text, ...inside) {
  const peek = text.slice(0, 640).split(/\s+/).join(" ").slice(0, 160);
  return el("details", { class: kind, style }, el("summary", {}, el("b", {}, name), el("span", { class: "peek" }, peek)), ...inside);
}
const agentStyle = name => `--agent:${data.agents[name]}`;
function partView(part, top) {
  const tokens = part.tokens.map(t => tokenSpan(t, top));
  if (part.kind === "call") return collapsed("agent", agentStyle(part.agent), part.agent, textOf(part.tokens), ...tokens);
  if (!part.agent) return el("div", {}, ...tokens);
  return el("div", { class: "agent", style: agentStyle(part.agent) }, el("b", {}, part.agent), ...tokens);
}
function agentsKey(episode) {
  const names = new Set(episode.rounds.flatMap(r => r.turns.flatMap(t => t.parts.map(p => p.agent))).filter(name => name));
  return names.size ? el("div", { class: "agents" }, ...[...names].sort().map(name => el("span", { class: "agent", style: agentStyle(name) }, el("b", {}, name)))) : null;
}
function column(round, top) {
  const critique = round.role === "critique", kind = critique ? "critique" : round.success ? "ok" : "no";
  const title = critique ? "Critique" : round.role === "attempt" ? "Attempt, alone" : `Revision ${round.round}, with the critique`;
  const earned = round.reward === null ? "not trained" : `reward ${short(round.reward)}, advantage ${round.advantage >= 0 ? "+" : ""}${round.advantage.toFixed(2)}`;
  const body = el("div", { class: "text" });
  round.turns.forEach(turn => {
    body.append(...turn.parts.map(part => partView(part, top)));
    if (turn.lost) body.append(el("div", { class: "note" }, "no action could be read"));
    if (turn.observation) body.append(collapsed("obs", "", "observed", turn.observation, turn.observation));
  });
  const told = [earned, `${round.generated} tokens`];
  if (!critique) told.push(`${round.success ? "succeeded" : "failed"}, outcome ${short(round.outcome)}, ${round.stop}`);
  if (round.weight !== null && round.weight !== undefined) told.push(`mean w ${round.weight.toFixed(2)}`);
  const weights = roundWeights(round);
  return el("div", { class: `col ${kind}`, "data-role": round.role }, el("h3", {}, title, el("small", {}, critique ? "" : round.success ? "✓" : "✗")), walkable(body),
    round.summary ? el("p", { class: "note" }, round.summary) : null, weights.length ? transferred(weights) : null,
    el("div", { class: "facts" }, ...told.map(text => el("span", {}, text))));
}
function key(top) {
  const at = w => `${Math.round(100 * w / top)}%`, stops = [0, .5, .999].map(w => `${shade(w, top)} ${at(w)}`);
  const scale = [...stops, `${shade(1.001, top)} ${at(1)}`, `${shade(top, top)} 100%`].join(", ");
  return el("div", { class: "key" }, el("span", { class: "held" }, "w 0, held back"), el("i", { style: `background:linear-gradient(90deg, ${scale})`, role: "img", "aria-label": `from orange at weight 0 over nothing at 1 to blue at ${top}` }), el("span", { class: "moved" }, `w ${short(top)}, transferred`), el("span", {}, `no colour: w 1, or nothing to weigh`));
}
function episodeView(episode, run) {
  const weighted = weightsOf(episode).length > 0;
  return [el("div", { class: "facts" }, el("b", {}, episode.task), el("span", {}, `step ${episode.step}, try ${episode.index}`), el("span", {}, `${marks[episode.outcome]} ${words[episode.outcome]}`)),
    el("div", { class: "text problem" }, episode.problem),
    agentsKey(episode), weighted ? key(run.w_max) : null,
    el("div", { class: "cols" }, ...episode.rounds.map(r => column(r, run.w_max)))].filter(part => part !== null);
}

const ranks = {
  played: () => 0,
  held: e => { const w = weightsOf(e); return w.length ? sum(w) / w.length : Infinity; },
  moved: e => { const w = weightsOf(e); return w.length ? -sum(w) / w.length : Infinity; },
  spread: e => { const w = weightsOf(e); return w.length ? Math.min(...w) - Math.max(...w) : Infinity; },
  advantage: e => -Math.max(...e.rounds.map(r => Math.abs(r.advantage || 0))),
};
let found = [];
function search() {
  const text = state.text.toLowerCase();
  found = runs[state.run].episodes.shown.filter(e => (!state.outcome || e.outcome === state.outcome) && (!state.task || e.source === state.task)
    && e.step >= state.from && (!text || JSON.stringify([e.task, e.problem, e.rounds.map(r => r.turns.map(t => [textOf(tokensOf(t)), t.observation]))]).toLowerCase().includes(text)));
  if (state.sort !== "played") { const by = new Map(found.map(e => [e, ranks[state.sort](e)])); found.sort((a, b) => by.get(a) - by.get(b) || 0); }
}
const changed = (name, value) => { state[name] = value; state.chosen = 0; drawList(); };
function choice(label, value, options, change) {
  return el("select", { "aria-label": label, onchange: e => change(e.target.value) }, ...options.map(([v, name]) => el("option", { value: v, selected: `${v}` === `${value}` ? "" : null }, name)));
}
function drawFilters() {
  const host = $("filters"), shown = runs[state.run].episodes.shown;
  host.replaceChildren();
  if (runs.length > 1) host.append(choice("run", state.run, runs.map((r, i) => [i, seeded(r)]), v => { state.run = +v; state.task = ""; state.from = 0; drawFilters(); changed("outcome", state.outcome); }));
  for (const [name, text] of [["", "all"], ...Object.entries(words)]) {
    const n = shown.filter(e => !name || e.outcome === name).length, on = state.outcome === name;
    host.append(el("button", { type: "button", "data-outcome": name, class: on ? "on" : "", "aria-pressed": on, onclick: () => { changed("outcome", name); drawFilters(); host.querySelector(`[data-outcome="${name}"]`).focus(); } }, `${marks[name] ? `${marks[name]} ` : ""}${text} (${n})`));
  }
  const sources = [...new Set(shown.map(e => e.source))].sort();
  if (sources.length > 1) host.append(choice("task", state.task, [["", "every task"], ...sources.map(s => [s, s])], v => changed("task", v)));
  host.append(choice("order", state.sort, Object.entries(sorts), v => changed("sort", v)));
  host.append(el("label", {}, "from step ", el("input", { type: "number", min: 0, value: state.from, style: "width:5.5rem", onchange: e => changed("from", +e.target.value || 0) })));
  host.append(el("input", { type: "search", placeholder: "search texts", "aria-label": "search texts", value: state.text, oninput: e => changed("text", e.target.value) }));
}
function drawList() {
  search();
  const { kept, read, dumped, shown } = runs[state.run].episodes, single = new Set(shown.map(e => e.source)).size === 1;
  $("count").textContent = `${found.length} of ${whole(kept)} dumped in ${read < dumped ? `${read} of ${dumped}` : dumped} steps; arrow keys move`;
  $("list").replaceChildren(...found.map((e, i) => el("li", { id: `e${i}`, role: "option", "aria-selected": i === state.chosen, class: i === state.chosen ? "on" : "", onclick: () => choose(i) },
    el("i", { class: `dot ${e.outcome}`, title: words[e.outcome] }, marks[e.outcome]), el("em", {}, `${e.task.startsWith(`${e.source}/`) && single ? e.task.slice(e.source.length + 1) : e.task} #${e.index}`), el("span", {}, `step ${e.step}`))));
  drawEpisode();
}
function choose(i) {
  const items = $("list").children;
  if (i < 0 || i >= items.length) return;
  for (const [at, on] of [[state.chosen, false], [i, true]]) {
    items[at]?.classList.toggle("on", on);
    items[at]?.setAttribute("aria-selected", on);
  }
  state.chosen = i;
  items[i].scrollIntoView({ block: "nearest" });
  drawEpisode();
}
function drawEpisode() {
  const episode = found[state.chosen];
  $("list").setAttribute("aria-activedescendant", episode ? `e${state.chosen}` : "");
  $("episode").replaceChildren(...(episode ? episodeView(episode, runs[state.run]) : [el("p", { class: "note" }, "No episode matches.")]));
}
$("list").addEventListener("keydown", e => {
  const move = { ArrowDown: 1, j: 1, PageDown: 10, ArrowUp: -1, k: -1, PageUp: -10, Home: -1e9, End: 1e9 }[e.key];
  if (!move) return;
  e.preventDefault();
  choose(Math.max(0, Math.min(found.length - 1, state.chosen + move)));
});
// What the page is for: an episode that critique rescued, whose revision was partly held back and partly transferred.
function exemplary() {
  const telling = e => {
    if (e.outcome !== "rescued") return -1;
    const w = weightsOf(e), held = w.filter(x => x < .5).length, moved = w.filter(x => x >= .9).length;
    return .001 + (w.length ? Math.min(held, moved) / w.length + Math.min(w.length, 24) / 100 : 0);
  };
  let best = [0, 0, -1];
  runs.forEach((run, r) => run.episodes.shown.forEach((e, i) => { const t = telling(e); if (t > best[2]) best = [r, i, t]; }));
  return best[2] > 0 ? best : null;
}
