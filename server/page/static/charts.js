// Small line charts of the last five minutes, as SVG.

import { draw, make, write } from "./dom.js";
import { count, rate, seconds, share } from "./format.js";

const SPAN_S = 300;
const WIDTH = 300;
const HEIGHT = 60;
const LATENCY = { format: seconds, least: 0.001, keepsLast: true };

const CHARTS = [
  {
    title: "Requests",
    lines: [["running", "num_running"], ["waiting", "num_waiting"]],
    format: count,
    least: 4,
  },
  {
    title: "Output tokens per second",
    lines: [["now", "output_tokens_per_s"]],
    format: rate,
    least: 10,
  },
  {
    title: "Time to first token",
    lines: [["p50", "ttft_p50_s"], ["p95", "ttft_p95_s"]],
    ...LATENCY,
  },
  {
    title: "Time between tokens",
    lines: [["p50", "inter_token_p50_s"], ["p95", "inter_token_p95_s"]],
    ...LATENCY,
  },
  { title: "KV cache in use", lines: [["now", "kv_share"]], format: share, top: 1 },
  { title: "Adapter pool in use", lines: [["now", "pool_share"]], format: share, top: 1 },
];

/** The charts, and the samples that they draw. */
export class Charts {
  constructor(place) {
    this.columns = { at_s: [] };
    this.charts = CHARTS.map((description) => new Chart(description));
    place.append(...this.charts.map((chart) => chart.element));
  }

  /** Take new samples, by column; `isNew` forgets those before. */
  add(columns, isNew) {
    const from = (columns.at_s.at(-1) ?? this.columns.at_s.at(-1) ?? 0) - SPAN_S;
    const at = isNew ? [] : this.columns.at_s;
    const numOld = at.findIndex((time) => time > from);
    for (const name of Object.keys(columns)) {
      const kept = isNew || numOld < 0 ? [] : (this.columns[name] ?? []).slice(numOld);
      this.columns[name] = kept.concat(columns[name]);
    }
    for (const chart of this.charts) {
      chart.show(this.columns);
    }
  }
}

class Chart {
  constructor(description) {
    this.description = description;
    this.columns = { at_s: [] };
    this.pointed = null;
    this.figures = description.lines.map(() => make("b"));
    this.when = make("span", { class: "when" });
    this.paths = description.lines.map((_, index) => draw("path", { class: `line line-${index}` }));
    this.area = draw("path", { class: "area" });
    this.cross = draw("path", { class: "cross" });
    this.plot = draw(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      draw("path", { class: "grid", d: `M0 .5H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}` }),
      draw("path", { class: "floor", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }),
      this.area,
      ...this.paths.toReversed(),
      this.cross,
    );
    this.top = make("span");
    this.element = this.frame();
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.point(null));
  }

  frame() {
    const { title, lines } = this.description;
    const figures = lines.map(([label], index) =>
      lines.length === 1
        ? make("span", { class: "figure" }, this.figures[index])
        : make(
            "span",
            { class: "figure" },
            make("span", { class: `key key-${index}`, "aria-hidden": "true" }),
            `${label} `,
            this.figures[index],
          ),
    );
    return make(
      "figure",
      { class: "chart" },
      make("figcaption", {}, make("span", { class: "chart-title" }, title), this.when),
      make("div", { class: "figures" }, ...figures),
      make(
        "div",
        { class: "plot" },
        make("div", { class: "y-axis", "aria-hidden": "true" }, this.top, make("span", {}, "0")),
        this.plot,
        make(
          "div",
          { class: "x-axis", "aria-hidden": "true" },
          make("span", {}, "5 min ago"),
          make("span", {}, "now"),
        ),
      ),
    );
  }

  show(columns) {
    this.columns = columns;
    const { title, lines, format, least, top } = this.description;
    const drawn = lines.map(([, name]) => columns[name] ?? []);
    const highest = Math.max(0, ...drawn.flat().filter((value) => value !== null));
    const limit = top ?? roundUp(Math.max(highest, least));
    write(this.top, format(limit));
    drawn.forEach((values, index) => {
      this.paths[index].setAttribute("d", outline(columns.at_s, values, limit, false));
    });
    this.area.setAttribute("d", outline(columns.at_s, drawn[0], limit, true));
    const said = lines.map(([label, name]) => `${label} ${format(this.last(name))}`);
    const text = drawn[0].length
      ? `${title} over the last five minutes: ${said.join(", ")}; highest ${format(highest)}`
      : `${title}: no samples yet`;
    this.plot.setAttribute("aria-label", text);
    this.write();
  }

  /** The value shown as the current one: of latencies the last that was measured. */
  last(name) {
    const values = this.columns[name] ?? [];
    return this.description.keepsLast
      ? (values.findLast((value) => value !== null) ?? null)
      : (values.at(-1) ?? 0);
  }

  point(event) {
    const at = this.columns.at_s;
    this.pointed = null;
    if (event !== null && at.length > 0) {
      const box = this.plot.getBoundingClientRect();
      const time = at.at(-1) - SPAN_S * (1 - (event.clientX - box.left) / box.width);
      const index = at.findIndex((sampled) => sampled >= time);
      this.pointed = at[index < 0 ? at.length - 1 : index];
    }
    this.write();
  }

  write() {
    const { lines, format } = this.description;
    const index = this.pointed === null ? -1 : this.columns.at_s.indexOf(this.pointed);
    lines.forEach(([, name], line) => {
      const value = index < 0 ? this.last(name) : this.columns[name][index];
      write(this.figures[line], format(value));
    });
    const time = index < 0 ? "" : new Date(this.pointed * 1000).toLocaleTimeString();
    write(this.when, time);
    const x = index < 0 ? null : across(this.pointed, this.columns.at_s.at(-1));
    this.cross.setAttribute("d", x === null ? "" : `M${x} 0V${HEIGHT}`);
  }
}

function across(time, now) {
  return (WIDTH * (1 - (now - time) / SPAN_S)).toFixed(2);
}

/** A line through the values, broken where there is none; or, closed, the area below it. */
function outline(at, values, limit, isClosed) {
  const floor = HEIGHT - 1;
  let path = "";
  let last = null;
  values.forEach((value, index) => {
    const x = across(at[index], at.at(-1));
    if (value !== null) {
      const y = (floor - (floor - 1) * Math.min(1, value / limit)).toFixed(2);
      const begins = isClosed ? `M${x} ${floor}V${y}` : `M${x} ${y}h0`;
      path += last === null ? begins : `L${x} ${y}`;
    }
    if (isClosed && last !== null && value === null) {
      path += `V${floor}Z`;
    }
    last = value === null ? null : x;
  });
  return isClosed && last !== null ? `${path}V${floor}Z` : path;
}

/** The next of 1, 2, 5, 10 … at or above a number. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}
