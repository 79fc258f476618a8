// The last minutes, kept in this page alone: what the sparklines draw. Series share one clock of
// samples; where a view was missed there is a gap, not a line across it. Bounded both ways.

import { node, setAttribute, shape } from "./dom.js";

const SAMPLES_MAX = 300; // five minutes of one view a second
const SERIES_MAX = 400;
export const SPAN_S = 300;
const GAP_S = 4;

const WIDTH = 120;
const HEIGHT = 24;

export class History {
  constructor() {
    this.at_s = new Float64Array(SAMPLES_MAX);
    this.series = new Map();
    this.taken = 0;
  }

  // Take the values of one view, by name.
  take(at_s, values) {
    const last_s = this.taken ? this.at_s[(this.taken - 1) % SAMPLES_MAX] : at_s;
    if (at_s < last_s) this.forget(); // the proxy's clock was set back
    const index = this.taken % SAMPLES_MAX;
    this.at_s[index] = at_s;
    for (const line of this.series.values()) line[index] = NaN;
    for (const [name, value] of values) {
      let line = this.series.get(name);
      if (line === undefined) {
        if (this.series.size >= SERIES_MAX) continue;
        line = new Float32Array(SAMPLES_MAX).fill(NaN);
        this.series.set(name, line);
      }
      line[index] = value ?? NaN;
    }
    this.taken += 1;
    if (this.taken % SAMPLES_MAX === 0) this.#drop();
  }

  forget() {
    this.series.clear();
    this.taken = 0;
  }

  // Series of what is no longer there go once nothing of them is left to draw.
  #drop() {
    for (const [name, line] of this.series) if (line.every(Number.isNaN)) this.series.delete(name);
  }

  // Points from the oldest on, as [seconds before the newest, value].
  *points(name) {
    const line = this.series.get(name);
    if (line === undefined) return;
    const newest_s = this.at_s[(this.taken - 1) % SAMPLES_MAX];
    for (let n = Math.max(0, this.taken - SAMPLES_MAX); n < this.taken; n += 1) {
      const age_s = newest_s - this.at_s[n % SAMPLES_MAX];
      if (age_s <= SPAN_S) yield [age_s, line[n % SAMPLES_MAX]];
    }
  }
}

// Return what a sparkline draws: a line, the ground below it, and the largest value.
function drawn(history, name) {
  const points = [...history.points(name)];
  let most = 0;
  for (const [, value] of points) if (value > most) most = value;
  let line = "";
  let ground = "";
  let begun = -1;
  let last = 0;
  let before_s = Infinity;
  const close = () => {
    if (begun >= 0) ground += `L${last} ${HEIGHT}L${begun} ${HEIGHT}Z`;
    begun = -1;
  };
  for (const [age_s, value] of points) {
    if (Number.isNaN(value)) {
      close();
      continue;
    }
    const x = Math.round((1 - age_s / SPAN_S) * WIDTH * 10) / 10;
    const y = Math.round((HEIGHT - 1.5 - (most ? value / most : 0) * (HEIGHT - 3)) * 10) / 10;
    if (begun < 0 || before_s - age_s > GAP_S) {
      close();
      begun = x;
      line += `M${x} ${y}`;
      ground += `M${x} ${y}`;
    } else {
      line += `L${x} ${y}`;
      ground += `L${x} ${y}`;
    }
    last = x;
    before_s = age_s;
  }
  close();
  return { line, ground, most };
}

// A sparkline for one series. It says its scale in its title; the numbers are beside it.
export function sparkline(words) {
  const ground = shape("path", { class: "spark-ground" });
  const line = shape("path", { class: "spark-line" });
  const root = node(
    "span",
    { class: "spark", "aria-hidden": "true" },
    shape(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", focusable: "false" },
      ground,
      line,
    ),
  );
  return {
    root,
    show(history, name, format) {
      const found = drawn(history, name);
      setAttribute(line, "d", found.line || "M0 0");
      setAttribute(ground, "d", found.ground || "M0 0");
      setAttribute(root, "title", `${words}, the last 5 minutes; at most ${format(found.most)}`);
    },
  };
}
