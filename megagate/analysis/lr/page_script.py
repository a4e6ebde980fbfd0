"""The page's script: plain JavaScript that draws the report's curves as SVG. Nothing is fetched; all text is set as text."""

SCRIPT = r"""
"use strict";
(() => {
const report = JSON.parse(document.getElementById("data").textContent);
const facts = report.facts, stats = report.statistics, rates = facts.learning_rates;
const hidden = new Set(), H = 360, L = 56, R = 16, T = 14, B = 40;
const main = document.getElementById("report"), tip = document.getElementById("tip");
const colour = variant => `var(--c${facts.variants.indexOf(variant) % 7})`;
const dashes = ["none", "9 3", "2 3", "9 3 2 3", "5 5", "1 2", "14 4"];
const there = value => value !== null && value !== undefined;

function html(tag, text, parent, attributes = {}) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.appendChild(made);
  return made;
}
function svg(tag, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}
const short = value => Number(value.toPrecision(3)).toString();
const nats = (value, signed) => (signed && value > 0 ? "+" : "") + value.toFixed(3);
const span = found => !there(found.mean) ? "-" : nats(found.mean, true) +
  (there(found.low) ? ` [${nats(found.low, true)}, ${nats(found.high, true)}]` : "") + `, n=${found.n}`;
const boot = found => there(found.boot_low) ? `\nbootstrap [${nats(found.boot_low, true)}, ${nats(found.boot_high, true)}]` : "";

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++)
      for (const step of [1, 2, 5]) { const at = step * 10 ** decade; if (at >= low && at <= high) found.push(at); }
    return found.length > 8 ? found.filter(at => Math.abs(Math.log10(at) % 1) < 1e-9) : found;
  }
  const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(by => by * unit).find(by => by >= rough), found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-12; k++) found.push(k * step);
  return found;
}

// A panel draws series: {variant, points: [{x, dots: [[seed, y]], mean, low, high, note}]}; x counts rungs or stands for a learning rate.
function panel(title, caption, make, options = {}) {
  const box = html("section", "", main);
  html("h2", title, box);
  html("small", caption, box);
  const holder = html("div", "", box);
  const draw = () => {
    holder.replaceChildren();
    const series = make().filter(one => !hidden.has(one.variant));
    const values = series.flatMap(one => one.points.flatMap(point =>
      [...point.dots.map(dot => dot[1]), point.mean, point.low, point.high])).filter(value => there(value) && (!options.log || value > 0));
    if (!values.length) { html("p", "Nothing to show.", holder, {class: "soft"}); return; }
    if (options.zero) values.push(0);
    let low = Math.min(...values), high = Math.max(...values);
    // A bar far from all losses would press the curves flat.
    const near = there(options.bar) && Math.max(options.bar - high, low - options.bar) <= high - low;
    if (near) { low = Math.min(low, options.bar); high = Math.max(high, options.bar); }
    if (options.log) { low /= 1.2; high *= 1.2; } else { const by = (high - low || 1) * .07; low -= by; high += by; }
    const of = options.log ? Math.log : value => value;
    const y = value => H - B - (of(value) - of(low)) / (of(high) - of(low)) * (H - T - B);
    // One unit is one pixel, so that words stay legible on a narrow screen.
    const W = Math.min(1060, Math.max(300, holder.clientWidth || 1060)), inset = W < 600 ? 20 : 40;
    const first = Math.log(rates[0]), last = Math.log(rates[rates.length - 1]);
    const x = options.names ? place => L + (place + .5) / options.names().length * (W - L - R)
      : lr => rates.length < 2 ? W / 2 : L + inset + (Math.log(lr) - first) / (last - first) * (W - L - R - 2 * inset);
    const apart = Math.min(7, (W - L - R - 2 * inset) / Math.max(rates.length - 1, 1) / (facts.variants.length + 1));
    const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title}, holder);
    for (const at of ticks(low, high, options.log)) {
      svg("line", {x1: L, x2: W - R, y1: y(at), y2: y(at), class: "grid"}, root);
      svg("text", {x: L - 8, y: y(at) + 4, "text-anchor": "end"}, root, short(at));
    }
    if (options.zero) svg("line", {x1: L, x2: W - R, y1: y(0), y2: y(0), class: "zero"}, root);
    if (near) {
      svg("line", {x1: L, x2: W - R, y1: y(options.bar), y2: y(options.bar), class: "bar"}, root);
      svg("text", {x: L + 4, y: y(options.bar) - 5}, root, `collapsed above ${options.bar}`);
    }
    if (options.names) options.names().forEach((name, place) => svg("text", {x: x(place), y: H - 18, "text-anchor": "middle"}, root, name));
    else {
      rates.forEach(lr => svg("text", {x: x(lr), y: H - 20, "text-anchor": "middle"}, root, short(lr)));
      svg("text", {x: W / 2, y: H - 3, "text-anchor": "middle"}, root, "learning rate");
    }
    const spots = [];
    for (const one of series) {
      const move = options.names ? 0 : (facts.variants.indexOf(one.variant) - (facts.variants.length - 1) / 2) * apart;
      const ink = colour(one.variant);
      let path = "";
      for (const point of one.points) path += there(point.mean) && (!options.log || point.mean > 0)
        ? `${path && !path.endsWith(" ") ? "L" : "M"}${x(point.x) + move},${y(point.mean)}` : " ";
      if (!options.names) svg("path", {d: path.trim(), fill: "none", stroke: ink, "stroke-width": 2,
        "stroke-dasharray": dashes[facts.variants.indexOf(one.variant) % dashes.length], "data-curve": one.variant}, root);
      for (const point of one.points) {
        const at = x(point.x) + move;
        for (const [seed, value] of point.dots) if (there(value) && (!options.log || value > 0)) {
          svg("circle", {cx: at, cy: y(value), r: 3.5, fill: ink, "fill-opacity": .45, "data-dot": one.variant}, root);
          const shown = options.log ? short(value) : nats(value, options.zero);
          spots.push([at, y(value), `${one.variant}${point.where}\nseed ${seed}: ${shown}${point.note}`]);
        }
        if (point.diverged) {
          const look = {style: `fill: ${ink}; font-weight: bold`, "data-diverged": one.variant};
          svg("text", {x: at, y: T + 8, "text-anchor": "middle", ...look}, root, "×");
          spots.push([at, T + 4, `${one.variant}${point.where}${point.note}`]);
        }
        if (there(point.low)) svg("line", {x1: at, x2: at, y1: y(point.low), y2: y(point.high), stroke: ink, "stroke-width": 2}, root);
        if (there(point.mean) && (!options.log || point.mean > 0)) {
          svg("rect", {x: at - 5, y: y(point.mean) - 1.5, width: 10, height: 3, fill: ink}, root);
          spots.push([at, y(point.mean), `${one.variant}${point.where}\nmean: ${point.words}${point.note}`]);
        }
      }
    }
    root.addEventListener("mousemove", event => {
      const frame = root.getBoundingClientRect(), scale = W / frame.width;
      const px = (event.clientX - frame.left) * scale, py = (event.clientY - frame.top) * scale;
      let best = null, nearest = 30;
      for (const spot of spots) { const far = Math.hypot(spot[0] - px, spot[1] - py); if (far < nearest) { nearest = far; best = spot; } }
      tip.hidden = best === null;
      if (!best) return;
      tip.textContent = best[2];
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
    });
    root.addEventListener("mouseleave", () => { tip.hidden = true; });
  };
  panels.push(draw);
}

const panels = [];
const seeded = values => values.map((value, index) => [facts.seeds[index], value]);
const at = lr => ` at ${short(lr)}`;
const fates = rung => (rung.collapsed ? `\n${rung.collapsed} of ${rung.runs} collapsed` : "") +
  (rung.diverged ? `\n${rung.diverged} of ${rung.runs} diverged` : "");
const paired = (found, x, where, note) => ({x, dots: seeded(found.values), mean: found.interval.mean, low: found.interval.low,
  high: found.interval.high, words: `${span(found.interval)}${boot(found.interval)}`, where, note});

for (const verdict of report.verdicts) html("p", verdict.line, main, {class: verdict.word.replace(" ", "-")});
for (const line of report.attributions) html("p", line, main);
if (report.cautions.length) html("h2", "Caution", main);
const cautions = html("ul", "", main);
for (const line of report.cautions) html("li", line, cautions);
const legend = html("nav", "", main, {"aria-label": "variants"});
for (const variant of facts.variants) {
  const button = html("button", variant, legend, {type: "button", "aria-pressed": "true", "data-variant": variant});
  const sample = svg("svg", {width: 34, height: 8, viewBox: "0 0 34 8", "aria-hidden": "true"}, button);
  svg("line", {x1: 6, x2: 34, y1: 4, y2: 4, stroke: colour(variant), "stroke-width": 2,
    "stroke-dasharray": dashes[facts.variants.indexOf(variant) % dashes.length]}, sample);
  button.style.borderColor = button.style.color = colour(variant);
  button.addEventListener("click", () => {
    if (!hidden.delete(variant)) hidden.add(variant);
    button.setAttribute("aria-pressed", String(!hidden.has(variant)));
    panels.forEach(draw => draw());
  });
}

const collapse = there(facts.collapsed_above) ? `; above ${facts.collapsed_above} a finished run is collapsed (dashed, where near)` : "";
panel("Held-out loss", "nats; dots are seeds, lines their mean over finished runs; × diverged" + collapse, () => stats.rows.map(row => ({
  variant: row.variant,
  points: row.rungs.map(rung => ({x: rung.lr, dots: seeded(rung.losses), mean: rung.levels.val_loss, low: null, high: null,
    words: there(rung.levels.val_loss) ? `${nats(rung.levels.val_loss)}, n=${rung.runs - rung.diverged}` : "-",
    where: at(rung.lr), note: fates(rung), diverged: rung.diverged}))
})), {bar: facts.collapsed_above});
for (const reference of [...new Set(stats.comparisons.map(one => one.reference))]) {
  const mine = stats.comparisons.filter(one => one.reference === reference);
  panel(`Gap to ${reference}`, "nats, below 0 better; dots are seeds, bars the mean and its 95 % t-interval", () => mine.map(one => ({
    variant: one.variant, points: one.rungs.map(rung => paired(rung.gap, rung.lr, `${at(rung.lr)} minus ${reference}`, ""))})),
    {zero: true});
  const shown = () => mine.filter(one => !hidden.has(one.variant));
  panel(`Interaction against ${reference}`, "gap at the top rungs minus gap at the baseline's best rung, nats; below 0 more stable"
      + (mine.some(one => one.interaction.lost) ? "; capped at ln V where pairs diverged" : ""),
    () => shown().map((one, place) => ({variant: one.variant, points: [one.interaction.lost
      ? paired(one.interaction.capped, place, "", "\ncapped at ln V: pairs diverged") : paired(one.interaction.gap, place, "", "")]})),
    {zero: true, names: () => shown().map(one => one.variant)});
}
const geometric = values => values.length ? Math.exp(values.reduce((sum, value) => sum + Math.log(value), 0) / values.length) : null;
panel("Peak activation", "largest absolute hidden state that any look saw; lines are geometric means", () => stats.rows.map(row => ({
  variant: row.variant,
  points: row.rungs.map(rung => {
    const mean = geometric(rung.peaks.filter(peak => there(peak) && peak > 0)), words = there(mean) ? short(mean) : "-";
    return {x: rung.lr, dots: seeded(rung.peaks), mean, low: null, high: null, words, where: at(rung.lr), note: ""};
  })
})), {log: true});
panels.forEach(draw => draw());
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; panels.forEach(draw => draw()); } });

html("h2", "Variants", main);
const table = html("table", "", html("div", "", main, {class: "wide"}));
const row = (cells, tag) => { const line = html("tr", "", table); cells.forEach(cell => html(tag, cell, line)); };
const over = (one, of) => one.rungs.map(of).join("  ");
const plain = (value, places) => there(value) ? value.toFixed(places) : "-";
row(["variant", "largest stable rate", "over baseline's", "sensitivity, own best", "pooled best", "collapsed or diverged, by rung",
  "spikes per 1,000 steps", "gate score", "first token / uniform",
  "own best, minus baseline's", "pooled best, minus baseline's"], "th");
for (const one of stats.rows) row([one.variant,
  there(one.stable.lr) ? (one.stable.at_least ? "at least " : "") + short(one.stable.lr) : one.stable.known ? "none" : "not known yet",
  one.stable.ratio, span(one.own_best.interval), span(one.pooled_best.interval),
  over(one, rung => `${rung.collapsed + rung.diverged}/${rung.runs}`), over(one, rung => plain(rung.spikes_per_1000, 1)),
  over(one, rung => plain(rung.levels.gate_mean, 2)),
  over(one, rung => `${plain(rung.levels.first_token_attention, 3)}/${plain(rung.levels.uniform_attention, 3)}`),
  ...[one.own_minus_baseline, one.pooled_minus_baseline].map(found => one.variant === facts.variants[0] ? "-" : span(found.interval))],
  "td");
html("h2", "Rules", main);
const rules = html("dl", "", main);
for (const [name, text] of Object.entries(report.rules)) { html("dt", name, rules); html("dd", text, rules); }

const root = document.documentElement;
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});
})();
"""
