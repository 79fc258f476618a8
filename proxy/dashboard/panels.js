// The smaller panels: key figures, classes, models, choices, answers, scaling, regions.

import { Keyed, bar, node, setAttribute, setHidden, setText } from "./dom.js";
import { ago, count, duration, exact, moment, octets, percent } from "./format.js";
import { sparkline } from "./history.js";

const part = (root, name) => root.querySelector(`[data-part="${name}"]`);
const cell = (label, ...children) => node("td", { "data-label": label }, ...children);

// name, label, what is shown of the view, in words; what is drawn; format of the drawing's scale
const FIGURES = [
  [
    "requests",
    "Requests",
    ({ proxy }) => `${count(proxy.requests_per_s)}/s`,
    ({ proxy }) => proxy.requests_per_s,
  ],
  [
    "errors",
    "Errors",
    ({ proxy }) => `${count(proxy.errors_per_s)}/s`,
    ({ proxy }) => proxy.errors_per_s,
  ],
  [
    "tokens",
    "Generated",
    ({ proxy }) => `${count(proxy.tokens_per_s)} tok/s`,
    ({ proxy }) => proxy.tokens_per_s,
  ],
  [
    "cached",
    "Prompt cached",
    ({ proxy }) => percent(proxy.cached_ratio),
    ({ proxy }) => proxy.cached_ratio,
    percent,
  ],
  ["flight", "In flight", ({ proxy }) => count(proxy.in_flight), ({ proxy }) => proxy.in_flight],
  [
    "connections",
    "Connections",
    ({ proxy }) => count(proxy.connections),
    ({ proxy }) => proxy.connections,
  ],
  ["fleet", "Fleet heard", ({ proxy }) => ago(proxy.fleet_age_s)],
  [
    "lag",
    "Loop lag",
    ({ proxy }) => duration(proxy.loop_lag_s),
    ({ proxy }) => proxy.loop_lag_s,
    duration,
  ],
];
const HINTS = {
  errors: "Answers of 500 and above, and streams that were cut",
  cached: "Of the prompt tokens that answers told of",
  fleet: "Since the proxy last heard which replicas there are",
  lag: "The longest that a worker's event loop was late since the last view",
};

export class Figures {
  constructor(root) {
    this.tiles = FIGURES.map(([name, label, say, value, format = count]) => {
      const words = node("span", { class: "figure-value" });
      const line = value ? sparkline(label) : null;
      root.append(
        node(
          "div",
          { class: "figure", title: HINTS[name] },
          node("dt", {}, label),
          node("dd", {}, words, line?.root ?? node("span", { class: "spark" })),
        ),
      );
      return { name, words, say, line, format };
    });
  }

  static values(view) {
    return FIGURES.filter(([, , , value]) => value).map(([name, , , value]) => [
      `figure ${name}`,
      value(view),
    ]);
  }

  show(view, history) {
    for (const { name, words, say, line, format } of this.tiles) {
      setText(words, say(view));
      line?.show(history, `figure ${name}`, format);
    }
  }
}

// Three percentiles and the course of one of them.
class Quantiles {
  constructor(label, words) {
    this.parts = ["p50", "p95", "p99"].map((name) => node("span", { class: `q q-${name}` }));
    this.line = sparkline(words);
    this.root = cell(label, node("span", { class: "quantiles" }, ...this.parts, this.line.root));
  }

  show(found, history, name) {
    [found.p50_s, found.p95_s, found.p99_s].forEach((value, index) =>
      setText(this.parts[index], duration(value)),
    );
    setAttribute(this.root, "title", `p50, p95, p99 of ${exact(found.count)} in the window`);
    this.line.show(history, name, duration);
  }
}

const NOBODY = { p50_s: null, p95_s: null, p99_s: null, count: 0 };

export class Classes {
  constructor(root) {
    this.rows = new Keyed(part(root, "rows"), () => this.#row());
  }

  static values(view) {
    return view.classes.flatMap((line) => [
      [`class ${line.work_class} depth`, line.depth],
      [`class ${line.work_class} wait`, line.queue_wait?.p95_s],
      [`class ${line.work_class} first`, line.first_token?.p95_s],
      [`class ${line.work_class} token`, line.token?.p95_s],
    ]);
  }

  #row() {
    const name = node("th", { scope: "row", "data-label": "Class" });
    const [depth, oldest, rate] = Array.from({ length: 3 }, () => node("span"));
    const [size, refused] = Array.from({ length: 2 }, () => node("span", { class: "below" }));
    const waiting = sparkline("Waiting");
    const wait = new Quantiles("Wait p50 p95 p99", "p95 of the wait");
    const first = new Quantiles("First token p50 p95 p99", "p95 of the time to the first token");
    const token = new Quantiles("Per token p50 p95 p99", "p95 of the time per token");
    const root = node(
      "tr",
      {},
      name,
      cell("Waiting", node("span", { class: "first" }, depth, waiting.root), size),
      cell("Requests", rate, refused),
      cell("Oldest", oldest),
      wait.root,
      first.root,
      token.root,
    );
    return {
      root,
      update: (line) => {
        const of = `class ${line.work_class}`;
        setText(name, line.work_class);
        setText(depth, count(line.depth));
        waiting.show(this.history, `${of} depth`, count);
        setText(size, octets(line.queue_bytes));
        setText(oldest, duration(line.oldest_s));
        setText(rate, `${count(line.requests_per_s)}/s`);
        setText(refused, `${count(line.refused_per_s)}/s refused`);
        setAttribute(refused, "data-some", line.refused_per_s > 0 ? "yes" : null);
        wait.show(line.queue_wait ?? NOBODY, this.history, `${of} wait`);
        first.show(line.first_token ?? NOBODY, this.history, `${of} first`);
        token.show(line.token ?? NOBODY, this.history, `${of} token`);
      },
    };
  }

  show(view, history) {
    this.history = history;
    this.rows.show(view.classes, (line) => line.work_class);
  }
}

export class Models {
  constructor(root) {
    this.root = root;
    this.rows = new Keyed(part(root, "rows"), () => this.#row());
  }

  static values(view) {
    return view.models.flatMap((line) => [
      [`model ${line.model} first`, line.first_token?.p95_s],
      [`model ${line.model} token`, line.token?.p95_s],
    ]);
  }

  #row() {
    const name = node("th", { scope: "row", "data-label": "Model" });
    const [rate, tokens, cached] = ["Requests", "Generated", "Cached"].map((label) => cell(label));
    const first = new Quantiles("First token p50 p95 p99", "p95 of the time to the first token");
    const token = new Quantiles("Per token p50 p95 p99", "p95 of the time per token");
    return {
      root: node("tr", {}, name, rate, tokens, cached, first.root, token.root),
      update: (line) => {
        setText(name, line.model);
        setAttribute(name, "title", line.model);
        setText(rate, `${count(line.requests_per_s)}/s`);
        setText(tokens, `${count(line.tokens_per_s)} tok/s`);
        setText(cached, percent(line.cached_ratio));
        first.show(line.first_token ?? NOBODY, this.history, `model ${line.model} first`);
        token.show(line.token ?? NOBODY, this.history, `model ${line.model} token`);
      },
    };
  }

  show(view, history) {
    this.history = history;
    this.rows.show(view.models, (line) => line.model);
    setHidden(part(this.root, "empty"), view.models.length > 0);
    setHidden(part(this.root, "table"), view.models.length === 0);
  }
}

const REASONS = {
  prefix: "it has the most of the prompt cached",
  spill: "the replica with more of it cached was too busy",
  hot: "the prefix is shared by so many that several serve it",
  new: "nobody has the prompt: the least work first",
  home: "its place on the ring",
  session: "the session's home",
  response: "it has the response that this one continues",
  least_load: "the least busy",
  round_robin: "its turn",
  random: "by lot",
  region: "another region can begin sooner",
};

export const reasonWords = (reason) => (Object.hasOwn(REASONS, reason) ? REASONS[reason] : "");

const CODES = { 2: "served", 3: "sent on", 4: "the client's fault, or refused", 5: "failed" };

// Rates as bars, in an order that stays; what has been seen once keeps its line.
export class Rates {
  constructor(root, words) {
    this.root = root;
    this.words = words;
    this.seen = new Set();
    this.rows = new Keyed(part(root, "rows"), (name) => this.#row(name));
  }

  static reasons(root) {
    return new Rates(root, reasonWords);
  }

  static codes(root) {
    return new Rates(root, (code) => CODES[code[0]] ?? "");
  }

  #row(name) {
    const [rate, share] = [node("td", { class: "number" }), node("td", { class: "number" })];
    const length = bar();
    const root = node(
      "tr",
      {},
      node(
        "th",
        { scope: "row" },
        node("span", { class: "rate-name" }, name),
        node("span", { class: "below" }, this.words(name) || " "),
      ),
      node("td", { class: "rate-bar" }, length.root),
      rate,
      share,
    );
    return {
      root,
      update: (key) => {
        const value = this.rates[key] ?? 0;
        setText(rate, `${count(value)}/s`);
        setText(share, this.total ? percent(value / this.total) : "–");
        length.show(this.total ? value / this.total : 0);
        setAttribute(root, "data-none", value ? null : "yes");
      },
    };
  }

  show(rates) {
    this.rates = rates;
    this.total = Object.values(rates).reduce((sum, value) => sum + value, 0);
    for (const name of Object.keys(rates)) if (this.seen.size < 64) this.seen.add(name);
    this.rows.show([...this.seen].sort(), (name) => name);
    setHidden(part(this.root, "empty"), this.seen.size > 0);
    setHidden(part(this.root, "table"), this.seen.size === 0);
  }
}

const OLD_S = 15; // what the manager said is older than it is when it answers

export class Scaling {
  constructor(root) {
    this.root = root;
    this.pools = new Keyed(part(root, "pools"), () => this.#pool());
    this.notes = new Keyed(part(root, "notes"), (note) => this.#note(note));
  }

  #pool() {
    const name = node("span", { class: "first" });
    const about = node("span", { class: "below" });
    const [ready, desired, bounds, moving, waiting] = [
      "Ready",
      "Wanted",
      "Between",
      "On the way",
      "Waits for",
    ].map((label) => cell(label));
    const filled = bar();
    const words = node("span");
    ready.append(node("span", { class: "first" }, words, filled.root));
    const root = node(
      "tr",
      {},
      node("th", { scope: "row", "data-label": "Pool" }, name, about),
      ready,
      desired,
      bounds,
      moving,
      waiting,
    );
    return {
      root,
      update: (pool) => {
        setText(name, pool.pool);
        setText(about, `${pool.work_class} · ${pool.model}`);
        setText(words, count(pool.ready));
        filled.show(pool.max ? pool.ready / pool.max : 0);
        setText(desired, count(pool.desired));
        setAttribute(desired, "data-some", pool.desired !== pool.ready ? "yes" : null);
        setText(bounds, pool.scaled ? `${count(pool.min)} and ${count(pool.max)}` : "fixed size");
        setText(
          moving,
          [
            pool.coming ? `${count(pool.coming)} coming` : "",
            pool.going ? `${count(pool.going)} going` : "",
            pool.resting ? `${count(pool.resting)} at rest` : "",
          ]
            .filter(Boolean)
            .join(", ") || "none",
        );
        setText(waiting, pool.waiting || "nothing");
        setAttribute(waiting, "data-some", pool.waiting ? "yes" : null);
      },
    };
  }

  #note(note) {
    const when = node(
      "time",
      { datetime: new Date(note.at_s * 1000).toISOString(), title: moment(note.at_s) },
      "",
    );
    const way = note.desired > note.was ? "up" : note.desired < note.was ? "down" : "same";
    const root = node(
      "li",
      { "data-way": way },
      when,
      node("span", { class: "note-pool" }, note.pool),
      node(
        "span",
        { class: "note-step" },
        node("span", { "aria-hidden": "true" }, `${note.was} → ${note.desired}`),
        node("span", { class: "unseen" }, `from ${note.was} to ${note.desired}`),
      ),
      node("span", { class: "note-reason" }, note.reason),
      note.moves.length ? node("span", { class: "below" }, note.moves.join(" · ")) : null,
    );
    return { root, update: (seen) => setText(when, ago(this.at_s - seen.at_s)) };
  }

  show(view) {
    this.at_s = view.at_s;
    this.pools.show(view.pools, (pool) => pool.pool);
    this.notes.show(
      view.scaling.map((note) => ({ ...note, moves: note.moves ?? [] })),
      (note) => `${note.at_s} ${note.pool} ${note.was} ${note.desired}`,
    );
    setHidden(part(this.root, "table"), view.pools.length === 0);
    setHidden(part(this.root, "empty"), view.pools.length > 0);
    setText(
      part(this.root, "empty"),
      view.proxy.manager_url
        ? "The manager tells of no pool."
        : "There is no manager: the replicas are those that were named, and nothing is scaled.",
    );
    const age_s = view.scaling_age_s ?? null;
    const old = view.pools.length > 0 && (age_s === null || age_s > OLD_S);
    setHidden(part(this.root, "age"), !old);
    if (old) setText(part(this.root, "age"), `as the manager last said, ${ago(age_s)}`);
    setHidden(part(this.root, "no-notes"), view.scaling.length > 0 || view.pools.length === 0);
  }
}

export class Regions {
  constructor(root) {
    this.root = root;
    this.rows = new Keyed(part(root, "rows"), () => this.#row());
  }

  #row() {
    const name = node("th", { scope: "row", "data-label": "Region" });
    const cells = ["Proxy", "Link", "Round trip", "Heard", "Sent there"].map((label) =>
      cell(label),
    );
    return {
      root: node("tr", {}, name, ...cells),
      update: (remote) => {
        setText(name, remote.region);
        const words = [
          remote.peer,
          remote.linked ? (remote.draining ? "draining" : "up") : "down",
          duration(remote.round_trip_s),
          remote.summary_age_s === null ? "never" : `${duration(remote.summary_age_s)} ago`,
          `${count(remote.inflight)} in flight`,
        ];
        cells.forEach((each, index) => setText(each, words[index]));
        setAttribute(cells[1], "data-some", remote.linked && !remote.draining ? null : "yes");
      },
    };
  }

  show(view) {
    setHidden(this.root, view.regions.length === 0);
    this.rows.show(view.regions, (remote) => `${remote.region} ${remote.peer}`);
  }
}
