// The page: what of a run is shown, and where. Figures are made in Python; here they are only placed.

const { runs, made } = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const TWO = runs.length > 1;
const COLOURS = ["var(--one)", "var(--two)"];
const curve = (run, key) => run.curves[key] ?? [];
const last = (points) => (points.length ? points[points.length - 1][1] : null);
const lastFrame = (run) => run.frames[run.frames.length - 1] ?? null;
const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(values.length, 1);
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? null;
const named = (run, what) => (TWO ? (what ? `${run.name}: ${what}` : run.name) : what);
const swatch = (index) => (TWO ? el("i", { class: "key", style: `background:${COLOURS[index]}` }) : null);

const card = (title, text, ...content) => el("section", { class: "card" }, el("h2", null, title), text ? el("p", null, text) : null, content);
const each = (build) => (TWO ? el("div", { class: "pair" }, runs.map((run, i) => el("div", null, el("p", { class: "sub" }, swatch(i), run.name), build(run, i)))) : build(runs[0], 0));
const any = (test) => runs.some(test);

// ---- the head

function head(run, index) {
  const steps = run.setting.steps;
  const state = run.finished
    ? el("span", { class: "chip good" }, `finished, ${whole(run.last_step)} steps`)
    : el("span", { class: "chip" }, `at step ${whole(run.last_step)}${steps ? " of " + whole(steps) : ""}`);
  const lines = run.about.map((line) => line.match(/^(\S+)\s+(.*)$/) ?? [line, "", line]);
  const began = run.first_time === null ? null : `${new Date(run.first_time * 1000).toLocaleString()}, ${duration(run.seconds)}`;
  return el("header", null,
    el("div", { class: "run-head" }, swatch(index), el("h1", null, run.name), state,
      run.num_damaged ? el("span", { class: "chip warn" }, `${whole(run.num_damaged)} damaged line${run.num_damaged === 1 ? "" : "s"} left out`) : null),
    el("dl", { class: "about" },
      lines.map(([, name, text]) => [el("dt", null, name), el("dd", null, text)]),
      run.setting.device ? [el("dt", null, "device"), el("dd", null, run.setting.device)] : null,
      began ? [el("dt", null, "began"), el("dd", null, began)] : null));
}

// ---- the numbers on top

function tiles() {
  const all = [
    ["validation loss", (run) => number(last(curve(run, "val/loss")), 4), (run) => against(run), (run) => curve(run, "val/loss").length],
    ["training loss", (run) => number(last(curve(run, "train/loss")), 4), () => "nats per token, last step logged"],
    ["throughput", (run) => number(median(curve(run, "perf/tokens_per_s").map((p) => p[1]))), (run) => {
      const mfu = median(curve(run, "perf/mfu").map((p) => p[1]));
      return `tokens/s, median${mfu === null ? "" : `; MFU ${(100 * mfu).toFixed(1)} %`}`;
    }],
    ["tokens", (run) => number(last(curve(run, "train/tokens"))), () => "trained on"],
    ["MaxVio", (run) => number(last(curve(run, "moe/max_vio"))), (run) => maxVio(run)],
    ["entropy", (run) => number(last(curve(run, "moe/entropy_mean"))), () => "mean of layers; 1 is even"],
    ["experts without a token", (run) => whole(last(curve(run, "moe/dead_experts")) ?? 0), () => "last interval, all layers"],
    ["lost to the fullest rank", (run) => number(last(curve(run, "perf/skew_ms"))) + " ms", (run) => share(run), (run) => last(curve(run, "perf/skew_ms")) !== null],
    ["sent to other ranks", (run) => number(last(curve(run, "perf/wire_mb"))) + " MB", (run) => saving(run), (run) => last(curve(run, "perf/wire_mb"))],
  ];
  return el("div", { class: "tiles" }, all.filter(([, , , shown]) => !shown || any(shown)).map(([name, value, hint]) =>
    el("div", { class: "tile" }, el("div", { class: "name" }, name),
      runs.map((run, i) => el("div", { class: TWO ? "value second" : "value" }, TWO ? el("i", { style: `background:${COLOURS[i]}` }) : null, value(run))),
      el("div", { class: "hint" }, TWO ? hintOfTwo(name, hint) : hint(runs[0])))));
}
const hintOfTwo = (name, hint) => (name === "validation loss" ? "nats per token" : hint(runs[0]).split(";")[0]);
function against(run) {
  const first = last(curve(run, "val/untrained")), unigram = last(curve(run, "val/unigram"));
  const parts = [unigram === null ? null : `unigram ${number(unigram)}`, first === null ? null : `untrained ${number(first)}`];
  return parts.filter(Boolean).join(", ") || "nats per token";
}
function maxVio(run) {
  const held = last(curve(run, "moe/max_vio_global"));
  return `worst layer; 0 is even${held === null ? "" : `; ${number(held)} on held-out tokens`}`;
}
function share(run) {
  const speed = last(curve(run, "perf/tokens_per_s")), step = speed && run.setting.tokens_per_step ? (1000 * run.setting.tokens_per_step) / speed : null;
  return step ? `of each step, ${((100 * last(curve(run, "perf/skew_ms"))) / step).toFixed(1)} % of it` : "of each step, all layers";
}
function saving(run) {
  const saved = last(curve(run, "perf/wire_spared_mb")), all = last(curve(run, "perf/wire_mb"));
  return saved === null || !all ? "per rank and step" : `per rank and step; ${((100 * saved) / (saved + all)).toFixed(0)} % less than one row for each copy`;
}

// ---- curves

const lines = (key, what) => runs.map((run, i) => ({ name: named(run, what), colour: COLOURS[i], points: curve(run, key) }));
function losses() {
  const series = runs.flatMap((run, i) => [
    { name: named(run, "training"), colour: COLOURS[i], points: curve(run, "train/loss"), opacity: 0.75, width: 1.5 },
    { name: named(run, "validation"), colour: TWO ? COLOURS[i] : "var(--two)", points: curve(run, "val/loss"), dots: true, quiet: TWO, width: 1.5 },
  ]);
  const levels = ["untrained", "unigram"].map((name) => ({ name, value: last(curve(runs[0], "val/" + name)) })).filter((l) => l.value !== null);
  return card("Loss", `Nats per token. ${TWO ? "Lines are training, dots validation. " : ""}Dashed: what training has to beat.`, lineChart({ series, levels }));
}
function simple(title, text, keys, options = {}) {
  const series = keys.flatMap(([key, what], k) =>
    runs.map((run, i) => ({ name: named(run, what), colour: keys.length > 1 && !TWO ? [...COLOURS, "var(--third)"][k] : COLOURS[i], points: curve(run, key), opacity: k ? 0.55 : 1 })));
  return series.some((s) => s.points.length) ? card(title, text, lineChart({ series, ...options })) : null;
}

// ---- load over time, with one slider for everything that is of one record

const followers = [];
function loadCard() {
  if (!any((run) => run.frames.length)) return null;
  const frames = Math.max(...runs.map((run) => run.frames.length));
  const slider = el("input", { type: "range", min: 0, max: Math.max(frames - 1, 0), value: frames - 1, "aria-label": "step" });
  const said = el("output");
  let timer = null, total = false;
  const play = el("button", { onclick: () => (timer ? stop() : start()) }, "Play");
  const sum = el("button", { "aria-pressed": "false", onclick: () => { total = !total; sum.setAttribute("aria-pressed", total); stop(); show(); } }, "Whole run");
  function show() {
    const frame = (run) => run.frames[Math.min(Number(slider.value), run.frames.length - 1)];
    const first = runs.find((run) => run.frames.length);
    said.textContent = total ? "all steps" : frame(first).first_step < frame(first).step ? `steps ${whole(frame(first).first_step)} – ${whole(frame(first).step)}` : `step ${whole(frame(first).step)}`;
    for (const follow of followers) follow(frame, total);
  }
  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
  function start() {
    if (total) { total = false; sum.setAttribute("aria-pressed", false); }
    if (Number(slider.value) >= frames - 1) slider.value = 0;
    show();
    play.textContent = "Pause";
    timer = setInterval(() => { if (Number(slider.value) >= frames - 1) return stop(); slider.value = Number(slider.value) + 1; show(); }, 180);
  }
  slider.addEventListener("input", () => { stop(); total = false; sum.setAttribute("aria-pressed", false); show(); });
  const high = highest();
  const content = card("Tokens per layer and expert",
    "Relative to the layer's mean: 1 is an even share. A cross marks an expert without a token.",
    el("div", { class: "controls" }, frames > 1 ? [play, slider] : null, said, sum),
    each((run) => (run.frames.length ? heat(run, high) : el("p", { class: "note" }, "No loads were recorded."))),
    scale(aroundOne(high), 0, high, "0", `${number(high)}×${high === 4 ? " and more" : ""}`));
  redraws.push(show);
  return content;
}
function highest() {
  const shares = runs.flatMap((run) => run.frames.flatMap((frame) => frame.counts.map((row) => Math.max(...row) / (mean(row) || 1))));
  return Math.min(Math.max(2, ...shares), 4);
}
function heat(run, high) {
  const layers = run.frames[0].counts.length, experts = run.frames[0].counts[0].length;
  const summed = run.frames[0].counts.map((row, l) => row.map((_, e) => run.frames.reduce((a, f) => a + f.counts[l][e], 0)));
  const shown = (counts) => {
    const means = counts.map(mean);
    return (l, e) => {
      const value = means[l] ? counts[l][e] / means[l] : 0;
      return { value, crossed: counts[l][e] === 0 && means[l] > 0, text: `layer ${l}, expert ${e}\n${whole(counts[l][e])} tokens, ${value.toFixed(2)}× the mean` };
    };
  };
  const picture = matrix({
    rows: layers, columns: experts, rowNames: (l) => String(l), columnNames: (e) => String(e), axis: "expert (rows: MoE layers)",
    colour: aroundOne(high), cell: shown(summed), label: "tokens per layer and expert",
  });
  followers.push((frame, total) => picture.set({ cell: shown(total ? summed : frame(run).counts) }));
  return picture.node;
}

// ---- one row per layer, one column per record

function strip(key, title, text, colourOf, ends) {
  if (!any((run) => run.frames.some((frame) => frame[key]))) return null;
  const values = runs.flatMap((run) => run.frames.flatMap((frame) => frame[key] ?? []));
  const colour = colourOf(values);
  return card(title, text, each((run) => {
    const frames = run.frames.filter((frame) => frame[key]);
    if (!frames.length) return el("p", { class: "note" }, "Nothing was recorded.");
    return matrix({
      rows: frames[0][key].length, columns: frames.length, cellHeight: Math.min(Math.max(Math.round(190 / frames[0][key].length), 4), 22),
      rowNames: (l) => String(l), columnNames: (f) => whole(frames[f].step), axis: "step (rows: MoE layers)", colour, label: title,
      cell: (l, f) => (frames[f][key][l] === null ? null : { value: frames[f][key][l], text: `layer ${l}, step ${whole(frames[f].step)}\n${title} ${number(frames[f][key][l], 4)}` }),
    }).node;
  }), ends(values, colour));
}
const most = (values) => Math.max(...values.filter((v) => v !== null), 1e-9);

// ---- ranks

function rankCard() {
  if (!any((run) => run.frames.some((frame) => frame.rank_share && frame.rank_share[0].length > 1))) return null;
  return card("Rows per layer and rank",
    "Of the step at the end of the record above, relative to the mean of the expert-parallel group: the fullest rank sets the pace of the others.",
    each((run) => {
      const frames = run.frames.filter((frame) => frame.rank_share);
      if (!frames.length || frames[0].rank_share[0].length < 2) return el("p", { class: "note" }, "One rank, or nothing recorded.");
      const shown = (frame) => (l, r) => {
        const value = frame.rank_share[l][r];
        if (value === null) return null;
        const lost = frame.lost_ms ? `\nwaits ${number(frame.lost_ms[l][r])} ms a step` : "";
        return { value, text: `layer ${l}, rank ${r}\n${whole(frame.received[l][r])} rows, ${value.toFixed(2)}× the mean${lost}` };
      };
      const at = frames[frames.length - 1];
      const picture = matrix({
        rows: at.rank_share.length, columns: at.rank_share[0].length, rowNames: String, columnNames: String, axis: "rank (rows: MoE layers)",
        cellHeight: Math.min(Math.max(Math.round(200 / at.rank_share.length), 4), 24), colour: aroundOne(2), cell: shown(at), label: "rows per layer and rank",
      });
      followers.push((frame, total) => picture.set({ cell: shown(!total && frame(run).rank_share ? frame(run) : at) }));
      return picture.node;
    }), scale(aroundOne(2), 0, 2, "0", "2× and more"));
}

// ---- which experts go together

function pairCard() {
  if (!any((run) => run.coactivation)) return null;
  return card("Experts chosen together",
    "Of the tokens that chose the expert of a row, the share that chose the one of a column too. The diagonal is left out.",
    each((run) => {
      const found = run.coactivation;
      if (!found) return el("p", { class: "note" }, "Not recorded: diagnostics.coactivation_interval is 0.");
      const size = found.thousandths[0].length, chance = run.setting.top_k > 1 ? (run.setting.top_k - 1) / (size - 1) : 0;
      const high = Math.max(...found.thousandths.flatMap((layer) => layer.map((row, i) => Math.max(...row.map((v, j) => (i === j ? 0 : v)))))) / 1000 || 1;
      const shown = (place) => (i, j) => {
        if (i === j) return null;
        const value = found.thousandths[place][i][j] / 1000;
        return { value, text: `layer ${found.layers[place]}\nof expert ${i}'s tokens ${(100 * value).toFixed(1)} % chose expert ${j}` };
      };
      const pictures = found.layers.length <= 4 ? found.layers.map((_, place) => place) : [0];
      const draw = (place) => matrix({
        rows: size, columns: size, rowNames: String, columnNames: String, axis: found.layers.length <= 4 ? `layer ${found.layers[place]}` : null, cellHeight: Math.max(Math.round((found.layers.length <= 4 ? 220 : 420) / size), 2),
        colour: fromZero(high), cell: shown(place), label: "experts chosen together", labels: 8,
      });
      const made = pictures.map(draw);
      const pick = el("select", { "aria-label": "layer", onchange: () => made[0].set({ cell: shown(Number(pick.value)) }) },
        found.layers.map((layer, place) => el("option", { value: place }, `layer ${layer}`)));
      return [el("div", { class: "controls" }, made.length === found.layers.length ? null : pick, el("span", { class: "note", style: "margin:0" }, `step ${whole(found.step)}; by chance ${(100 * chance).toFixed(1)} %`)),
        made.length > 1 ? el("div", { class: "many" }, made.map((m) => m.node)) : made[0].node,
        scale(fromZero(high), 0, high, "0", `${(100 * high).toFixed(0)} %`)];
    }));
}

function saturationCard() {
  if (!any((run) => run.saturation.length > 1)) return null;
  const series = runs.map((run, i) => ({ name: named(run, "mean of layers"), colour: COLOURS[i], dots: true, points: run.saturation.map((s) => [s.step, mean(s.layers)]) }));
  const run = runs[0], experts = run.frames.length ? run.frames[0].counts[0].length : null;
  const levels = experts && run.setting.top_k ? [{ name: "chance", value: run.setting.top_k / experts }] : [];
  return card("Router saturation", "Of the experts that held-out tokens choose at the last evaluation, the share they chose already.", lineChart({ series, levels, floor: 0, ceiling: 1 }));
}

// ---- experts without a token

function deadCard() {
  if (!any((run) => run.frames.length)) return null;
  return card("Experts without a token", "In the last record, and since when: nothing routed to them since that step.", each((run) => {
    if (!run.frames.length) return el("p", { class: "note" }, "No loads were recorded.");
    if (!run.dead.length) return el("p", { class: "note" }, `None: every expert of every layer had tokens up to step ${whole(lastFrame(run).step)}.`);
    const layers = [...new Set(run.dead.map((d) => d.layer))];
    return el("div", { class: "scroll" }, el("table", null, el("tr", null, el("th", { class: "number" }, "layer"), el("th", { class: "number" }, "how many"), el("th", null, "experts (first step without a token)")),
      layers.map((layer) => {
        const found = run.dead.filter((d) => d.layer === layer);
        return el("tr", null, el("td", { class: "number" }, layer), el("td", { class: "number" }, found.length),
          el("td", { class: "text" }, found.map((d) => `${d.expert} (${whole(d.since)})`).join(", ")));
      })));
  }));
}

// ---- events

const BAD = ["guard", "checkpoint_failed", "stopped", "warning"];
function eventCard() {
  return card("Events", null, each((run) => {
    const shown = [...run.events].reverse();
    if (!shown.length) return el("p", { class: "note" }, "None.");
    return el("div", { class: "scroll" }, el("table", null, el("tr", null, el("th", { class: "number" }, "step"), el("th", null, "time"), el("th", null, "event"), el("th", null, "")),
      shown.map((e) => el("tr", null,
        el("td", { class: "number" }, typeof e.step === "number" ? whole(e.step) : ""),
        el("td", { style: "white-space:nowrap" }, typeof e.time === "number" ? new Date(e.time * 1000).toLocaleTimeString() : ""),
        el("td", null, el("span", { class: BAD.includes(e.kind) ? "kind warn" : "kind" }, e.kind.replaceAll("_", " "))),
        el("td", { class: "text" }, e.text)))));
  }));
}

// ---- what the words mean

function foot() {
  const words = [
    ["MaxVio", "(max − mean) / mean of the tokens per expert; arXiv 2408.15664, eq. 4."],
    ["entropy", "Shannon entropy of the experts' shares over the logarithm of their number."],
    ["router saturation", "OLMoE, arXiv 2409.02060, section 5.1, on the held-out tokens of the evaluations."],
    ["chosen together", "OLMoE, section 5.2, over all pairs of a token's experts."],
  ];
  return el("footer", null, el("dl", null, words.map(([name, text]) => [el("dt", null, name), el("dd", null, text)])),
    el("p", null, `Made by moe-train report, ${new Date(made * 1000).toLocaleString()}, from metrics.jsonl alone.`));
}

page.append(
  el("div", { class: TWO ? "heads two" : "heads" }, runs.map(head)),
  tiles(),
  ...[
    el("div", { class: "grid" }, losses(), simple("Throughput", "Tokens per second, all ranks.", [["perf/tokens_per_s", "tokens/s"]], { floor: 0 })),
    loadCard(),
    el("div", { class: "grid" },
      strip("max_vio", "MaxVio per layer", "How far the fullest expert is above the mean; 0 is even.", (v) => fromZero(most(v)), (v, c) => scale(c, 0, most(v), "0", number(most(v)))),
      strip("entropy", "Entropy per layer", "1 is even, 0 is all on one expert; strong colour is uneven.", (v) => { const low = Math.min(...v, 0.9); return (x) => fromZero(1 - low)(1 - x); }, (v, c) => { const low = Math.min(...v, 0.9); return scale(c, 1, low, "1", number(low)); })),
    el("div", { class: "grid" },
      simple("Balance of all layers", "MaxVio of the worst layer and the mean of layers.", [["moe/max_vio", "worst layer"], ["moe/max_vio_mean", "mean"]], { floor: 0 }),
      simple("Router logits", "Root mean square, and logsumexp: growth is the sign of a router that hardens.", [["moe/logit_rms", "root mean square"], ["moe/logsumexp", "logsumexp"]]),
      simple("Router confidence", "Largest share of a token's scores, and all its chosen ones together, before they are normalised.", [["moe/confidence", "largest"], ["moe/topk_mass", "chosen ones"]], { floor: 0, ceiling: 1 }),
      saturationCard()),
    rankCard(),
    el("div", { class: "grid" },
      simple("Time lost to the fullest rank", "Milliseconds of a step, all layers: time of the slowest rank's experts × (1 − mean / max rows).", [["perf/skew_ms", "ms"]], { floor: 0 }),
      simple("Bytes on the wire", "MB that a rank sends in a step, a token once to each rank, and what it does not send because of that.", [["perf/wire_mb", "sent"], ["perf/wire_spared_mb", "saved"]], { floor: 0 })),
    pairCard(),
    el("div", { class: "grid" }, deadCard(), simple("Gradient norm", "Before clipping.", [["train/grad_norm", "norm"]], { floor: 0 })),
    eventCard(),
  ].filter((part) => part && (part.className !== "grid" || part.children.length)),
  foot(), tip,
);
redrawAll();
addEventListener("resize", redrawAll);
addEventListener("beforeprint", redrawAll);
addEventListener("afterprint", redrawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
