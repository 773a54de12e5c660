"""The page of `tinymim live`: one file, whose script asks for state.json and draws it.

Everything that comes from a run or a cache reaches the page as text of a node, never as HTML.
"""

import base64
import hashlib
import json

from tinymim.stages.pages.look import COLOURS, document

_STYLE = """
.job { border: 1px solid var(--line); border-radius: 8px; padding: 0.9rem 1.1rem 1.1rem; margin: 1.2rem 0; }
.job h2 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
.job h3 { margin: 1.1rem 0 0.3rem; font-size: 0.92rem; color: var(--soft); font-weight: 600; }
.job p { margin: 0.25rem 0; overflow-wrap: anywhere; max-width: none; }
.job table { font-size: 0.85rem; }
.state { display: inline-block; border-radius: 99px; padding: 0 0.7em; margin-left: 0.6em; font-size: 0.82rem;
  font-weight: 600; color: #fff; background: #6b7080; }
.running { background: #2f6db5; } .done { background: #35794f; } .failed, .silent { background: #b13a4f; }
.bar { height: 0.8rem; border-radius: 99px; background: var(--line); overflow: hidden; display: flex; }
.bar span { display: block; height: 100%; flex: none; }
.alarm { border-left: 4px solid #b13a4f; padding: 0.3rem 0.8rem; margin: 0.7rem 0; background: var(--strong);
  overflow-wrap: anywhere; }
.key span { display: inline-block; margin-right: 1rem; font-size: 0.85rem; }
.key i { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.35em; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 0.6rem 1.6rem; }
.charts svg { width: 100%; height: 6.5rem; display: block; border-bottom: 1px solid var(--line); }
.charts p { font-size: 0.82rem; display: flex; justify-content: space-between; gap: 1rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 0.2rem 1.6rem; font-size: 0.88rem; }
.numbers b { font-weight: 600; font-variant-numeric: tabular-nums; margin-left: 0.4em; }
.job pre { margin: 0.2rem 0 0; font-size: 0.78rem; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); }
.small { color: var(--soft); font-size: 0.85rem; }
@media (max-width: 40rem) { .job { padding: 0.7rem 0.7rem 0.9rem; } .job table { font-size: 0.76rem; } }
"""

_SCRIPT = """
"use strict";
const EVERY_MS = @EVERY@, COLOURS = @COLOURS@, SILENT_S = 60;
const main = document.getElementById("jobs"), clock = document.getElementById("clock");

function node(tag, cls, ...children) {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  made.append(...children.filter(child => child !== null && child !== ""));
  return made;
}
function number(value) { return value === null ? "?" : Math.round(value).toLocaleString("en"); }
function duration(seconds) {
  if (seconds === null) return "unknown";
  for (const [unit, size] of [["days", 86400], ["h", 3600], ["min", 60]])
    if (seconds >= 2 * size) return (seconds / size).toFixed(1) + " " + unit;
  return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
}
function bytes(size) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (size < 1024) return size.toFixed(unit === "B" ? 0 : 1) + " " + unit;
    size /= 1024;
  }
  return size.toFixed(2) + " TiB";
}
function table(header, rows) {
  const row = (cells, tag) => node("tr", "", ...cells.map(cell => node(tag, "", String(cell))));
  return node("div", "wide", node("table", "v", node("thead", "", row(header, "th")),
    node("tbody", "", ...rows.map(cells => row(cells, "td")))));
}
function filled(parts) {
  const bar = node("div", "bar");
  for (const [share, colour] of parts) {
    const part = node("span");
    part.style.width = 100 * Math.max(0, Math.min(1, share)) + "%";
    part.style.background = colour;
    bar.append(part);
  }
  return bar;
}
function chart(curve, colour) {
  const points = curve.points, xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys);
  const at = (v, low, high, size) => high > low ? size * (v - low) / (high - low) : size / 2;
  const made = name => document.createElementNS("http://www.w3.org/2000/svg", name);
  const svg = made("svg"), line = made("polyline");
  svg.setAttribute("viewBox", "0 0 300 100");
  svg.setAttribute("preserveAspectRatio", "none");
  line.setAttribute("points", points.map(p => at(p[0], x0, x1, 298) + 1 + "," + (97 - at(p[1], y0, y1, 94))).join(" "));
  line.setAttribute("fill", "none");
  line.setAttribute("stroke", colour);
  line.setAttribute("stroke-width", "2");
  line.setAttribute("vector-effect", "non-scaling-stroke");
  svg.append(line);
  const short = v => Number(v.toPrecision(3)).toString();
  return node("div", "", node("p", "", node("span", "", curve.name), node("b", "", curve.last)), svg,
    node("p", "small", node("span", "", "step " + number(x0) + " to " + number(x1)),
      node("span", "", short(y0) + " to " + short(y1))));
}
function key(parts) {
  return node("div", "key", ...parts.map(([text, colour]) => {
    const mark = node("i");
    mark.style.background = colour;
    return node("span", "", mark, text);
  }));
}
function run(job) {
  const silent = job.phase === "running" && job.heartbeat_s > SILENT_S;
  const phase = silent ? "silent" : job.phase;
  const known = ["running", "done", "failed", "silent"].includes(phase) ? phase : "";
  const box = node("section", "job", node("h2", "", job.name, node("span", "state " + known, phase)));
  box.append(node("p", "small", job.stage + ", " + job.place + (job.where ? ", " + job.where : "")));
  for (const alarm of job.alarms) box.append(node("p", "alarm", "ALARM " + alarm));
  if (job.total) {
    box.append(filled([[job.done / job.total, "#2f6db5"]]));
    const rate = job.rate_per_s === null ? "" : ", " + job.rate_per_s.toFixed(1) + "/s";
    const eta = phase === "running" ? ", " + duration(job.eta_s) + " left" : "";
    box.append(node("p", "", number(job.done) + " of " + number(job.total) + " " + job.unit + rate + eta));
  }
  const beat = job.heartbeat_s === null ? "no heartbeat" : "last heartbeat " + duration(job.heartbeat_s) + " ago";
  box.append(node("p", "", [beat, job.limits && "limited by " + job.limits].filter(Boolean).join("; ")));
  const shares = Object.entries(job.shares);
  if (shares.length) {
    const colour = order => COLOURS[order % COLOURS.length];
    box.append(node("h3", "", "Where time goes"), filled(shares.map(([, share], i) => [share, colour(i)])),
      key(shares.map(([name, share], i) => [name + " " + (100 * share).toFixed(0) + " %", colour(i)])));
  }
  if (job.curves.length) {
    const charts = job.curves.map((curve, i) => chart(curve, COLOURS[i % COLOURS.length]));
    box.append(node("h3", "", "Losses and audits"), node("div", "charts", ...charts));
  }
  if (job.numbers.length) {
    const numbers = job.numbers.map(([name, value]) => node("span", "", name, node("b", "", value)));
    box.append(node("h3", "", "Newest numbers"), node("div", "numbers", ...numbers));
  }
  if (job.note) box.append(node("p", "small", job.note));
  if (job.messages.length) box.append(node("h3", "", "Messages"), node("pre", "", job.messages.join("\\n")));
  return box;
}
function cache(job) {
  const done = Math.min(...job.layers.map(layer => layer.shards)) >= job.num_shards;
  const state = job.writers.length ? "running" : done ? "done" : "";
  const shown = job.writers.length ? "being written" : done ? "complete shards" : "partial";
  const box = node("section", "job", node("h2", "", job.name, node("span", "state " + state, shown)));
  box.append(node("p", "small", "cache " + job.spec_id + ", " + job.place));
  box.append(node("p", "", number(job.num_images) + " images in " + number(job.num_shards) + " shards"));
  box.append(table(["layer", "shards", "views", "units", "size", "last commit", "in 10 min"], job.layers.map(layer => [
    layer.name, layer.shards + " of " + job.num_shards,
    layer.views[0] === layer.views[1] ? layer.views[0] : layer.views[0] + " to " + layer.views[1],
    number(layer.units), bytes(layer.bytes),
    layer.last_commit_s === null ? "-" : duration(layer.last_commit_s) + " ago", layer.recent_units])));
  if (job.writers.length) {
    const rows = job.writers.map(writer => [writer.holder, writer.lease,
      writer.age_s === null ? "-" : duration(writer.age_s) + " ago"]);
    box.append(node("h3", "", "Writers"), table(["process", "holds", "last heartbeat"], rows));
  }
  return box;
}
function draw(state) {
  const problems = state.problems.map(p => node("p", "alarm", p.place + ": " + p.problem));
  const jobs = state.jobs.map(job => job.kind === "cache" ? cache(job) : run(job));
  if (!jobs.length) problems.push(node("p", "", "No run and no cache there yet."));
  main.replaceChildren(...problems, ...jobs);
  clock.textContent = state.jobs.length + " jobs, read " + state.time;
}
async function update() {
  try {
    const answer = await fetch("state.json", {cache: "no-store"});
    if (!answer.ok) throw new Error("status " + answer.status);
    draw(await answer.json());
  } catch (error) {
    clock.textContent = "no answer from tinymim live: " + error.message + "; what follows is old";
  }
  setTimeout(update, EVERY_MS);
}
update();
"""


def _script(every_s: float) -> str:
    return _SCRIPT.replace("@EVERY@", str(round(1000 * every_s))).replace("@COLOURS@", json.dumps(COLOURS))


def page(every_s: float) -> str:
    """The page; it asks for state.json every `every_s` seconds."""
    body = '<h1>tinymim live</h1>\n<p class="small" id="clock">reading</p>\n<div id="jobs"></div>\n'
    return document("tinymim live", f"{body}<style>{_STYLE}</style>\n<script>{_script(every_s)}</script>\n")


def policy(every_s: float) -> str:
    """The Content-Security-Policy of the page: its own script, and requests to its own server."""
    digest = base64.b64encode(hashlib.sha256(_script(every_s).encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
