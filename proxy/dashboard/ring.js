// The ring of a model, and where its hot prefixes live.
//
// Each replica is one path with all its arcs. Few replicas have a colour each, the same as beside
// their names everywhere; many are drawn by how busy they are, for nobody tells 500 colours apart,
// but a hot one is seen. A hot prefix is a mark outside, as long as it is hot; inside, below it, is a
// bead for each replica that holds it. The tables beside it say the same in words.

import { Keyed, node, setAttribute, setHidden, setText, shape } from "./dom.js";
import { count, exact, octets, percent, times } from "./format.js";

export const COLOURS = 12;
const OUTER = 150;
const INNER = 124;
const BEADS_MAX = 6;
const STEM_MAX = 30;

const point = (turn, radius) => {
  const angle = turn * 2 * Math.PI;
  return `${(Math.sin(angle) * radius).toFixed(2)} ${(-Math.cos(angle) * radius).toFixed(2)}`;
};

function sector({ begin, end }) {
  // A whole turn begins where it ends, and SVG draws nothing then.
  const stop = Math.min(end, begin + 0.9999);
  const large = stop - begin > 0.5 ? 1 : 0;
  return (
    `M${point(begin, OUTER)}A${OUTER} ${OUTER} 0 ${large} 1 ${point(stop, OUTER)}` +
    `L${point(stop, INNER)}A${INNER} ${INNER} 0 ${large} 0 ${point(begin, INNER)}Z`
  );
}

// The colour of each replica, by name, while there are few enough of them.
export function coloursOf(replicas) {
  const names = [...new Set(replicas.map((replica) => replica.replica_id))].sort();
  if (names.length > COLOURS) return new Map();
  return new Map(names.map((name, index) => [name, `colour-${index}`]));
}

// How many hold it: more may than are named.
const holdersOf = ({ held_by: number, holders = [] }) => Math.max(number ?? 0, holders.length);

const nameOf = ({ model, models = [] }) =>
  models.length > 1 ? `${model} and ${models.length - 1} more` : model || "models not told";

function sameArcs(one, other) {
  return (
    one.length === other.length &&
    one.every((arc, index) => {
      const { begin, end, replica_id: name } = other[index];
      return arc.begin === begin && arc.end === end && arc.replica_id === name;
    })
  );
}

export class RingPanel {
  constructor(root) {
    this.find = (name) => root.querySelector(`[data-part="${name}"]`);
    this.model = this.find("model");
    this.paint = this.find("paint");
    this.arcs = this.find("arcs");
    this.marks = this.find("marks");
    this.shares = this.find("shares");
    this.paths = new Map();
    this.drawn = [];
    this.drawnModel = null;
    this.chosen = null; // { kind: "replica" | "prefix", name }, kept until chosen again
    this.hovered = null;
    this.view = null;
    this.prefixMarks = new Keyed(this.marks, () => this.#mark());
    this.prefixRows = new Keyed(this.find("prefixes"), () => this.#prefixRow());
    this.shareRows = new Keyed(this.find("share-rows"), () => this.#shareRow());
    this.models = new Keyed(this.model, (ring) => {
      const root = node("option", { value: ring.model });
      return { root, update: (told) => setText(root, nameOf(told)) };
    });
    for (const control of [this.model, this.paint])
      control.addEventListener("change", () => this.#again());
    this.shares.addEventListener("toggle", () => this.#again());
    this.#listen(this.find("svg"));
  }

  #listen(svg) {
    const hover = (thing) => {
      if (thing?.kind === this.hovered?.kind && thing?.name === this.hovered?.name) return;
      this.hovered = thing;
      this.#emphasise();
    };
    const thingAt = (event) => {
      const element = event.target.closest?.("[data-replica], [data-prefix]");
      if (!element) return null;
      const { replica, prefix } = element.dataset;
      return prefix === undefined
        ? { kind: "replica", name: replica }
        : { kind: "prefix", name: prefix };
    };
    svg.addEventListener("pointermove", (event) => hover(thingAt(event)));
    svg.addEventListener("pointerleave", () => hover(null));
    svg.addEventListener("click", (event) => this.#choose(thingAt(event)));
  }

  #again() {
    if (this.view) this.show(this.view, this.replicas, this.colours);
  }

  #choose(thing) {
    const same = thing?.kind === this.chosen?.kind && thing?.name === this.chosen?.name;
    this.chosen = same ? null : thing;
    this.#emphasise();
  }

  show(view, replicas, colours) {
    this.view = view;
    this.replicas = replicas;
    this.colours = colours;
    const rings = view.rings ?? [];
    this.models.show(rings, ({ model }) => model);
    setHidden(this.model.closest("label"), rings.length < 2);
    const ring = rings.find(({ model }) => model === this.model.value) ?? rings[0];
    setHidden(this.find("empty"), ring !== undefined);
    setHidden(this.find("body"), ring === undefined);
    if (ring === undefined) return;
    this.ring = ring;
    this.#draw(ring);
    this.#tint();
    const { prefixes = [] } = ring;
    this.most = prefixes.reduce((most, { heat }) => Math.max(most, heat), 0);
    this.prefixMarks.show(prefixes, ({ name }) => name);
    this.prefixRows.show(prefixes, ({ name }) => name);
    setHidden(this.find("no-prefixes"), prefixes.length > 0);
    setHidden(this.find("prefix-table"), prefixes.length === 0);
    this.#sum(ring);
    this.#emphasise();
  }

  #draw(ring) {
    if (this.drawnModel === ring.model && sameArcs(this.drawn, ring.arcs)) return;
    this.drawn = ring.arcs;
    this.drawnModel = ring.model;
    this.pieces = new Map();
    for (const arc of ring.arcs) {
      const owned = this.pieces.get(arc.replica_id);
      if (owned) owned.push(arc);
      else this.pieces.set(arc.replica_id, [arc]);
    }
    this.paths.clear();
    for (const [name, owned] of this.pieces) {
      this.paths.set(
        name,
        shape("path", { d: owned.map(sector).join(""), "data-replica": name, class: "arc" }),
      );
    }
    this.arcs.replaceChildren(...this.paths.values());
  }

  // By colour, or by how busy each replica is, in five steps.
  #tint() {
    const few = this.colours.size > 0;
    setHidden(this.find("paint-by-replica"), !few);
    if (!few && this.paint.value === "replica") this.paint.value = "load";
    const by = this.paint.value;
    const most = this.replicas.reduce((max, replica) => Math.max(max, replica.inflight), 0);
    const ratios = new Map(
      this.replicas.map((replica) => [
        replica.replica_id,
        by === "kv"
          ? (replica.kv_used_ratio ?? 0)
          : replica.inflight / (replica.inflight_max || most || 1),
      ]),
    );
    for (const [name, path] of this.paths) {
      const step = Math.min(5, Math.ceil((ratios.get(name) ?? 0) * 5));
      path.tint = few && by === "replica" ? (this.colours.get(name) ?? "step-0") : `step-${step}`;
    }
    setHidden(this.find("legend"), by === "replica");
  }

  #emphasise() {
    const thing = this.hovered ?? this.chosen;
    const prefix =
      thing?.kind === "prefix"
        ? this.ring.prefixes.find(({ name }) => name === thing.name)
        : undefined;
    const near = new Set(prefix?.holders ?? []);
    const home = thing?.kind === "replica" ? thing.name : prefix?.home;
    for (const [name, path] of this.paths) {
      let classes = `arc ${path.tint}`;
      if (thing)
        classes += name === home ? " is-home" : near.has(name) ? " is-holder" : " is-other";
      setAttribute(path, "class", classes);
    }
    for (const [name, { root, row }] of this.prefixMarks.entries) {
      setAttribute(
        root,
        "data-state",
        thing ? (name === prefix?.name || (row.home === home && !prefix) ? "on" : "off") : null,
      );
    }
    for (const [name, { pick }] of this.prefixRows.entries) {
      setAttribute(
        pick,
        "aria-pressed",
        String(this.chosen?.kind === "prefix" && this.chosen.name === name),
      );
    }
    for (const [name, { pick }] of this.shareRows.entries) {
      setAttribute(
        pick,
        "aria-pressed",
        String(this.chosen?.kind === "replica" && this.chosen.name === name),
      );
    }
    this.#middle(thing, prefix);
  }

  // The words in the middle of the ring.
  #middle(thing, prefix) {
    const lines = ["", "", ""];
    if (prefix) {
      lines[0] = `prefix ${prefix.name.slice(0, 8)}`;
      lines[1] = `home ${prefix.home ?? "nobody"}`;
      lines[2] = `${octets(prefix.octets)} · held by ${count(holdersOf(prefix))}`;
    } else if (thing?.kind === "replica") {
      const { share, pieces } = this.#shareOf(thing.name);
      lines[0] = thing.name;
      lines[1] = `${percent(share)} of the ring`;
      lines[2] = `${times(pieces, "piece", "pieces")} drawn`;
    } else {
      lines[0] = nameOf(this.ring);
      lines[1] = times(this.#names().length, "replica", "replicas");
      lines[2] = times((this.ring.prefixes ?? []).length, "hot prefix", "hot prefixes");
    }
    lines.forEach((line, index) => {
      setText(
        this.find(`middle-${index}`),
        line.length > 26 ? `${line.slice(0, 25)}…` : line || " ",
      );
    });
  }

  // Whom the ring has. The arcs of a large one are a sample, in which small shares may be missing.
  #names() {
    const { model, models: served } = this.ring;
    const of = new Set(served?.length ? served : [model]);
    const on = ({ models, ring_ratio: share }) =>
      share > 0 && (models.some((one) => of.has(one)) || (model === "" && models.length === 0));
    const told = this.replicas.filter(on).map(({ replica_id: name }) => name);
    return [...new Set([...told, ...this.pieces.keys()])].sort();
  }

  #shareOf(name) {
    const pieces = this.pieces.get(name) ?? [];
    const drawn = pieces.reduce((sum, { begin, end }) => sum + end - begin, 0);
    const told = this.replicas.find((replica) => replica.replica_id === name)?.ring_ratio;
    return { pieces: pieces.length, share: told || drawn };
  }

  #mark() {
    const stem = shape("line", { class: "mark-stem" });
    const head = shape("circle", { class: "mark-head" });
    const beads = shape("g");
    const root = shape("g", { class: "mark" }, stem, head, beads);
    const entry = {
      root,
      row: null,
      update: (prefix) => {
        entry.row = prefix;
        setAttribute(root, "data-prefix", prefix.name);
        setAttribute(root, "transform", `rotate(${(prefix.at * 360).toFixed(2)})`);
        const warmth = this.most ? Math.sqrt(prefix.heat / this.most) : 0;
        const top = -(OUTER + 4 + Math.round(warmth * STEM_MAX));
        for (const [line, name, value] of [
          [stem, "y1", -(OUTER + 2)],
          [stem, "y2", top],
          [head, "cy", top],
          [head, "r", 2.5 + Math.round(warmth * 4) / 2],
        ])
          setAttribute(line, name, value);
        this.#beads(beads, prefix.holders ?? []);
      },
    };
    return entry;
  }

  #beads(group, holders) {
    const shown = holders.slice(0, BEADS_MAX);
    while (group.childElementCount > shown.length) group.lastElementChild.remove();
    shown.forEach((name, index) => {
      const bead =
        group.children[index] ??
        group.appendChild(shape("circle", { r: 3, cy: -(INNER - 8 - index * 8) }));
      setAttribute(bead, "class", `bead ${this.colours.get(name) ?? ""}`);
    });
  }

  #prefixRow() {
    const pick = node(
      "button",
      { type: "button", class: "link mono", "aria-pressed": "false" },
      "",
    );
    const cells = ["Heat", "Length", "Home", "Held by", "May spread to"].map((label) =>
      node("td", { "data-label": label }),
    );
    const root = node(
      "tr",
      {},
      node("th", { scope: "row", "data-label": "Prefix" }, pick),
      ...cells,
    );
    let name = "";
    pick.addEventListener("click", () => this.#choose({ kind: "prefix", name }));
    return {
      root,
      pick,
      update: (prefix) => {
        name = prefix.name;
        const holders = prefix.holders ?? [];
        setText(pick, name.slice(0, 8));
        setAttribute(pick, "title", `${name}: show it in the ring`);
        const words = [
          count(prefix.heat),
          octets(prefix.octets),
          prefix.home ?? "nobody",
          holdersOf(prefix) > 3
            ? `${holders.slice(0, 2).join(", ")} and ${holdersOf(prefix) - 2} more`
            : holders.join(", ") || "nobody",
          prefix.spread ? times(prefix.spread, "replica", "replicas") : "its own",
        ];
        cells.forEach((cell, index) => setText(cell, words[index]));
        setAttribute(cells[3], "title", holders.length > 3 ? holders.join(", ") : null);
      },
    };
  }

  #sum(ring) {
    if (!this.shares.open) return;
    const homes = new Map();
    const held = new Map();
    for (const { home, holders = [] } of ring.prefixes ?? []) {
      homes.set(home, (homes.get(home) ?? 0) + 1);
      for (const name of holders) held.set(name, (held.get(name) ?? 0) + 1);
    }
    const rows = this.#names().map((name) => ({
      name,
      ...this.#shareOf(name),
      homes: homes.get(name) ?? 0,
      held: held.get(name) ?? 0,
    }));
    this.shareRows.show(rows, ({ name }) => name);
  }

  #shareRow() {
    const pick = node("button", { type: "button", class: "link", "aria-pressed": "false" }, "");
    const cells = ["Share", "Pieces drawn", "Home of", "Holds"].map((label) =>
      node("td", { "data-label": label }),
    );
    const root = node(
      "tr",
      {},
      node("th", { scope: "row", "data-label": "Replica" }, pick),
      ...cells,
    );
    let name = "";
    pick.addEventListener("click", () => this.#choose({ kind: "replica", name }));
    return {
      root,
      pick,
      update: (row) => {
        name = row.name;
        setText(pick, name);
        setAttribute(pick, "title", `${name}: show it in the ring`);
        const words = [
          percent(row.share),
          exact(row.pieces),
          times(row.homes, "prefix", "prefixes"),
          times(row.held, "prefix", "prefixes"),
        ];
        cells.forEach((cell, index) => setText(cell, words[index]));
      },
    };
  }
}
