// The table of replicas: filter, order, pages, and the buttons that drain and bring back.
//
// A page of rows at a time, so that 500 replicas cost what 25 do. While a pointer or the focus is in
// the table its order stands still: nothing moves away under a finger that is about to drain it.

import { Keyed, bar, glyph, node, setAttribute, setHidden, setText } from "./dom.js";
import { count, duration, exact, percent, times } from "./format.js";
import { GROUPS, inTrouble, reasonOf, stateOf, wishFor } from "./states.js";

const FULL = 0.9; // from here on a bar says that hardly anything is left
const ROWS = 25;
const ROWS_NARROW = 10; // as cards they are four times as high
const NARROW = matchMedia("(width < 760px)");

const COLUMNS = [
  ["name", "Replica", (replica) => replica.replica_id],
  ["state", "State", (replica) => -stateOf(replica).rank],
  ["inflight", "In flight", (replica) => -replica.inflight],
  ["wait", "Wait", (replica) => -replica.wait_s],
  ["kv", "KV cache", (replica) => -(replica.kv_used_ratio ?? -1)],
  ["cached", "Hit rate", (replica) => -(replica.cached_ratio ?? -1)],
  ["rate", "Requests", (replica) => -replica.requests_per_s],
  ["prefill", "Prefill", (replica) => -replica.prefill_tokens_per_s],
  ["restarts", "Restarts", (replica) => -replica.restarts],
  ["ring", "Ring", (replica) => -replica.ring_ratio],
];

const searched = (replica) =>
  [
    replica.replica_id,
    replica.pool,
    replica.region,
    replica.engine,
    replica.engine_version,
    replica.state,
    reasonOf(replica),
    ...replica.models,
    ...replica.gpus,
  ]
    .join(" ")
    .toLowerCase();

const cell = (label, ...children) => node("td", { role: "cell", "data-label": label }, ...children);

export class ReplicasPanel {
  constructor(root, { drain, tell }) {
    this.root = root;
    this.find = (name) => root.querySelector(`[data-part="${name}"]`);
    this.drain = drain; // (replica, wish), called by the buttons
    this.tell = tell; // (replica), called by the names
    this.table = this.find("table");
    this.filter = this.find("filter");
    this.order = { column: "", descending: false };
    this.page = 0;
    this.group = "all";
    this.still = null; // the names in the order in which they stand, while somebody is there
    this.replicas = [];
    this.rows = new Keyed(this.find("rows"), () => this.#row());
    this.#head();
    this.#groups();
    this.filter.addEventListener("input", () => this.#from(0));
    this.find("previous").addEventListener("click", () => this.#from(this.page - 1));
    this.find("next").addEventListener("click", () => this.#from(this.page + 1));
    NARROW.addEventListener("change", () => this.#from(0));
    this.#hold(this.find("rows"));
  }

  #hold(rows) {
    const here = () => rows.matches(":hover") || rows.contains(document.activeElement);
    const come = () => {
      this.still ??= this.shown?.map(({ replica_id: name }) => name) ?? null;
    };
    const go = () => {
      if (!here()) this.still = null;
    };
    rows.addEventListener("pointerenter", come);
    rows.addEventListener("focusin", come);
    rows.addEventListener("pointerleave", () => queueMicrotask(go));
    rows.addEventListener("focusout", () => setTimeout(go));
  }

  #head() {
    const select = this.find("sort");
    this.heads = COLUMNS.map(([id, label]) => {
      const button = node("button", { type: "button", class: "sort" }, label);
      button.addEventListener("click", () => this.#sort(id));
      select.append(node("option", { value: id }, label));
      return node(
        "th",
        { scope: "col", role: "columnheader", class: `col-${id}`, "aria-sort": "none" },
        button,
      );
    });
    const last = node(
      "th",
      { scope: "col", role: "columnheader", class: "col-action" },
      node("span", { class: "unseen" }, "Action"),
    );
    this.find("head").append(...this.heads, last);
    select.addEventListener("change", () => {
      this.order = { column: select.value, descending: false };
      this.#from(0);
    });
  }

  // First click: the way that is of use, most first; then the other; then as it was.
  #sort(column) {
    if (this.order.column !== column) this.order = { column, descending: false };
    else if (!this.order.descending) this.order.descending = true;
    else this.order = { column: "", descending: false };
    this.#from(0);
  }

  #groups() {
    this.groups = GROUPS.map(([id, label]) => {
      const number = node("span", { class: "tally" }, "0");
      const button = node(
        "button",
        { type: "button", class: "chip", "aria-pressed": String(id === "all") },
        `${label} `,
        number,
      );
      button.addEventListener("click", () => {
        this.group = id;
        for (const other of this.groups)
          setAttribute(other.button, "aria-pressed", String(other.id === id));
        this.#from(0);
      });
      this.find("groups").append(button);
      return { id, button, number };
    });
  }

  // Show the replicas of one group, from outside the table.
  choose(group) {
    this.groups.find(({ id }) => id === group)?.button.click();
  }

  #from(page) {
    this.page = page;
    this.still = null;
    this.#show();
  }

  show(view, replicas, colours) {
    this.replicas = replicas;
    this.colours = colours;
    this.refusal = view.proxy.can_drain;
    this.#show();
  }

  #ordered() {
    const words = this.filter.value.toLowerCase().split(/\s+/u).filter(Boolean);
    const belongs = GROUPS.find(([id]) => id === this.group)[2];
    const found = this.replicas.filter(
      (replica) =>
        belongs(replica) &&
        (!words.length || words.every((word) => searched(replica).includes(word))),
    );
    const column = COLUMNS.find(([id]) => id === this.order.column);
    if (column) {
      const value = new Map(found.map((replica) => [replica, column[2](replica)]));
      const sign = this.order.descending ? -1 : 1;
      found.sort((one, other) => {
        const [a, b] = [value.get(one), value.get(other)];
        return a < b ? -sign : a > b ? sign : 0; // what is equal keeps its order: the sort is stable
      });
    }
    if (this.still === null) return found;
    const place = new Map(this.still.map((name, index) => [name, index]));
    const at = ({ replica_id: name }) => place.get(name) ?? Infinity;
    return found.sort((one, other) => (at(one) === at(other) ? 0 : at(one) - at(other)));
  }

  #show() {
    for (const { id, number, button } of this.groups) {
      const size = this.replicas.filter(GROUPS.find(([name]) => name === id)[2]).length;
      setText(number, count(size));
      setAttribute(button, "data-none", size ? null : "yes");
    }
    const ordered = this.#ordered();
    this.shown = ordered;
    const size = NARROW.matches ? ROWS_NARROW : ROWS;
    const pages = Math.max(1, Math.ceil(ordered.length / size));
    this.page = Math.min(Math.max(0, this.page), pages - 1);
    const first = this.page * size;
    this.most = this.replicas.reduce((most, replica) => Math.max(most, replica.inflight), 0);
    this.rows.show(ordered.slice(first, first + size), (replica) => replica.replica_id);
    setAttribute(this.table, "aria-rowcount", ordered.length + 1);
    [...this.rows.parent.children].forEach((row, index) => {
      setAttribute(row, "aria-rowindex", first + index + 2); // the head is the first
    });
    if (this.find("sort").value !== this.order.column) this.find("sort").value = this.order.column;
    this.heads.forEach((head, index) => {
      const ours = COLUMNS[index][0] === this.order.column;
      // The columns of numbers stand the largest first, unless turned round.
      const falls = (this.order.column !== "name") !== this.order.descending;
      setAttribute(head, "aria-sort", ours ? (falls ? "descending" : "ascending") : "none");
    });
    setText(
      this.find("range"),
      ordered.length > size
        ? `${first + 1} to ${Math.min(ordered.length, first + size)} of ${exact(ordered.length)}`
        : ordered.length === this.replicas.length
          ? times(ordered.length, "replica", "replicas")
          : `${ordered.length} of ${exact(this.replicas.length)}`,
    );
    setHidden(this.find("pager"), pages < 2);
    // Not `disabled`: whoever pressed it to the last page keeps the focus.
    setAttribute(this.find("previous"), "aria-disabled", this.page === 0 || null);
    setAttribute(this.find("next"), "aria-disabled", this.page >= pages - 1 || null);
    setHidden(this.find("empty"), ordered.length > 0);
    setText(
      this.find("empty"),
      this.replicas.length
        ? "No replica is like that."
        : "There is no replica. Start one with a manager, or name engines with --worker-urls.",
    );
    setHidden(this.table, ordered.length === 0);
    setHidden(this.find("refusal"), !this.refusal);
    if (this.refusal) setText(this.find("refusal"), `Drain and undrain are off: ${this.refusal}`);
  }

  #row() {
    const part = Object.fromEntries(
      [
        "swatch",
        "about",
        "word",
        "reason",
        "inflight",
        "engine",
        "wait",
        "queued",
        "kv",
        "known",
        "cached",
        "rate",
        "decoding",
        "prefill",
        "restarts",
        "ring",
      ].map((name) => [name, node("span", { class: `v-${name}` })]),
    );
    const [load, kv] = [bar(), bar()];
    const mark = node("span", { class: "state-mark" });
    const button = node("button", { type: "button", class: "small drain" }, "Drain");
    part.name = node("button", { type: "button", class: "link v-name" });
    part.name.addEventListener("click", () => this.tell(entry.replica));
    const root = node(
      "tr",
      { role: "row" },
      node(
        "th",
        { scope: "row", role: "rowheader", "data-label": "Replica" },
        node("span", { class: "first" }, part.swatch, part.name),
        part.about,
      ),
      cell("State", node("span", { class: "first state" }, mark, part.word), part.reason),
      cell("In flight", node("span", { class: "first" }, part.inflight, load.root), part.engine),
      cell("Wait", part.wait, part.queued),
      cell("KV cache", node("span", { class: "first" }, part.kv, kv.root), part.known),
      cell("Hit rate", part.cached),
      cell("Requests", part.rate, part.decoding),
      cell("Prefill", part.prefill),
      cell("Restarts", part.restarts),
      cell("Ring", part.ring),
      cell("Action", button),
    );
    const entry = {
      root,
      part,
      load,
      kv,
      mark,
      button,
      replica: null,
      update: (replica) => this.#fill(entry, replica),
    };
    button.addEventListener("click", () => {
      if (button.getAttribute("aria-disabled") !== "true")
        this.drain(entry.replica, button.dataset.wish);
    });
    return entry;
  }

  #fill(entry, replica) {
    const { part, root } = entry;
    entry.replica = replica;
    this.#say(entry, replica);
    setText(part.name, replica.replica_id);
    setAttribute(part.name, "title", `${replica.replica_id}: all that is told of it`);
    setAttribute(
      part.swatch,
      "class",
      `v-swatch ${this.colours.get(replica.replica_id) ?? "none"}`,
    );
    const about = [
      [replica.engine, replica.engine_version].filter(Boolean).join(" "),
      replica.pool,
      replica.region,
      replica.gpus.length ? `GPU ${replica.gpus.join(", ")}` : "",
      replica.dp_size > 1 ? `${replica.dp_size} ranks` : "",
    ]
      .filter(Boolean)
      .join(" · ");
    setText(part.about, about);
    setAttribute(
      part.about,
      "title",
      [about, replica.models.join(", ")].filter(Boolean).join("\n"),
    );
    const most = replica.inflight_max;
    setText(
      part.inflight,
      most ? `${count(replica.inflight)} / ${count(most)}` : count(replica.inflight),
    );
    entry.load.show(
      replica.inflight / (most || this.most || 1),
      most > 0 && replica.inflight >= FULL * most,
    );
    setText(
      part.engine,
      replica.running === null
        ? "engine: not known"
        : `runs ${count(replica.running)}, waits ${count(replica.waiting)}`,
    );
    setText(part.wait, duration(replica.wait_s));
    setText(part.queued, `${count(replica.queued_tokens)} tokens`);
    setText(part.kv, percent(replica.kv_used_ratio));
    entry.kv.show(replica.kv_used_ratio, (replica.kv_used_ratio ?? 0) >= FULL);
    setText(
      part.known,
      replica.cache_tokens ? `of ${count(replica.cache_tokens)} · ${replica.cache_source}` : " ",
    );
    setAttribute(
      part.known,
      "title",
      `room for ${exact(replica.cache_tokens)} tokens; what is in it is known by ${
        replica.cache_source === "events"
          ? `the engine's events, ${duration(replica.cache_source_age_s)} ago`
          : "the proxy's own record"
      }`,
    );
    setText(part.cached, percent(replica.cached_ratio));
    setText(part.rate, `${count(replica.requests_per_s)}/s`);
    setText(part.decoding, `${count(Math.round(replica.decoding))} decoding`);
    setText(
      part.prefill,
      replica.prefill_tokens_per_s ? `${count(replica.prefill_tokens_per_s)} tok/s` : "–",
    );
    setText(part.restarts, count(replica.restarts));
    setAttribute(part.restarts, "data-some", replica.restarts ? "yes" : null);
    setText(part.ring, percent(replica.ring_ratio));
    setAttribute(root, "data-trouble", inTrouble(replica) ? "yes" : null);
    this.#button(entry, replica);
  }

  #say({ part, mark }, replica) {
    const state = stateOf(replica);
    if (mark.dataset.glyph !== state.glyph) {
      mark.dataset.glyph = state.glyph;
      mark.replaceChildren(glyph(state.glyph));
    }
    setAttribute(mark.parentElement, "data-tone", state.tone);
    setText(part.word, state.word);
    const reason = reasonOf(replica);
    setText(part.reason, reason || " ");
    setAttribute(part.reason, "title", reason || null);
  }

  #button({ button }, replica) {
    const wish = wishFor(replica);
    setAttribute(button, "data-wish", wish ?? "");
    setHidden(button, wish === null);
    setText(button, wish === "undrain" ? "Undrain" : "Drain");
    setAttribute(
      button,
      "aria-label",
      `${wish === "undrain" ? "Undrain" : "Drain"} ${replica.replica_id}`,
    );
    // Not `disabled`: it stays reachable, and tells whoever reaches it why it does nothing.
    setAttribute(button, "aria-disabled", this.refusal ? "true" : null);
    setAttribute(button, "aria-describedby", this.refusal ? "drain-refusal" : null);
    setAttribute(button, "title", this.refusal ?? null);
  }
}
