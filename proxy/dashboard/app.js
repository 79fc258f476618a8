// The page: one view comes in, every panel shows it. What a panel shows is its own; here is when.
//
// A view is drawn in the next frame, the newest only; a page that nobody sees draws nothing, and
// after five minutes reads nothing either, so that forgotten tabs do not hold the few places of
// watchers. Only what changes for the worse or the better is spoken, never a number.

import { node, setAttribute, setHidden, setText } from "./dom.js";
import { Detail } from "./detail.js";
import { ExplainPanel } from "./explain.js";
import { Feed, adminKey, ask, refusal } from "./feed.js";
import { count, duration, exact, moment, octets } from "./format.js";
import { History } from "./history.js";
import { Classes, Figures, Models, Rates, Regions, Scaling } from "./panels.js";
import { ReplicasPanel } from "./replicas.js";
import { RingPanel, coloursOf } from "./ring.js";
import { changes, concerns, inTrouble, stateOf } from "./states.js";

const STALE_MS = 4_000;
const UNSEEN_MS_MAX = 300_000;
const VERSION = 1;

const at = (id) => document.getElementById(id);

// Fields may be left out where they have their default; readers see them all.
const REPLICA = {
  pool: "",
  region: "",
  engine: "",
  engine_version: "",
  models: [],
  state: "",
  reason: "",
  suspect: false,
  held: false,
  dp_size: 1,
  gpus: [],
  restarts: 0,
  inflight: 0,
  inflight_max: 0,
  queued_tokens: 0,
  wait_s: 0,
  decoding: 0,
  prefill_tokens_per_s: 0,
  requests_per_s: 0,
  running: null,
  waiting: null,
  kv_used_ratio: null,
  cached_ratio: null,
  cache_tokens: 0,
  cache_source: "record",
  cache_source_age_s: null,
  ring_ratio: 0,
};
const PROXY = {
  not_ready: null,
  draining: false,
  fleet_age_s: null,
  manager_url: null,
  in_flight: 0,
  connections: 0,
  requests_per_s: 0,
  errors_per_s: 0,
  tokens_per_s: 0,
  cached_ratio: null,
  loop_lag_s: null,
  can_drain: null,
};
const CLASS = { depth: 0, queue_bytes: 0, oldest_s: null, requests_per_s: 0, refused_per_s: 0 };
const MODEL = { requests_per_s: 0, tokens_per_s: 0, cached_ratio: null };
const POOL = { coming: 0, going: 0, resting: 0, waiting: "" };
const REGION = { draining: false, round_trip_s: null, summary_age_s: null, inflight: 0 };

function whole(view) {
  const each = (list, defaults) => (list ?? []).map((entry) => ({ ...defaults, ...entry }));
  return {
    decisions: {},
    codes: {},
    ...view,
    proxy: { ...PROXY, ...view.proxy },
    replicas: each(view.replicas, REPLICA),
    classes: each(view.classes, CLASS),
    models: each(view.models, MODEL),
    pools: each(view.pools, POOL),
    scaling: view.scaling ?? [],
    rings: each(view.rings, { arcs: [], prefixes: [] }),
    regions: each(view.regions, REGION),
  };
}

class Page {
  constructor() {
    this.history = new History();
    this.view = null;
    this.fresh = false;
    this.heard_ms = 0;
    this.fault = ""; // why the page stands still
    this.link = { name: "connecting" };
    this.said = [];
    this.figures = new Figures(at("figures"));
    this.replicas = new ReplicasPanel(at("replicas"), {
      drain: (replica, wish) => this.#confirm(replica, wish),
      tell: (replica) => this.detail.open(replica, this.view),
    });
    this.detail = new Detail(at("replica-dialog"));
    this.ring = new RingPanel(at("ring"));
    this.classes = new Classes(at("classes"));
    this.models = new Models(at("models"));
    this.reasons = Rates.reasons(at("reasons"));
    this.codes = Rates.codes(at("codes"));
    this.scaling = new Scaling(at("scaling"));
    this.regions = new Regions(at("regions"));
    this.explain = new ExplainPanel(at("explain"), { denied: (why) => this.#askKey(why) });
    this.feed = new Feed({
      onView: (view, size) => this.#guarded(() => this.#take(view, size)),
      onState: (state) => this.#linked(state),
    });
    this.#buttons();
    this.#theme();
    document.addEventListener("visibilitychange", () => this.#seen());
    setInterval(() => this.#tick(), 1000);
    this.feed.start();
  }

  // What cannot be shown is said, and does not look like what is live.
  #guarded(act) {
    try {
      act();
    } catch (error) {
      console.error(error);
      this.#broken(`what came cannot be shown (${error.message})`);
    }
  }

  #broken(why) {
    this.fault = `This page stands still: ${why}. Load it again.`;
    this.#linkWords();
  }

  #take(view, size) {
    if (view.view_version !== VERSION) {
      this.#broken(
        `it reads views of version ${VERSION}, these are of version ${view.view_version}`,
      );
      return;
    }
    const before = this.view;
    this.view = whole(view);
    this.size = size;
    this.heard_ms = Date.now();
    this.history.take(view.at_s, [
      ...Figures.values(this.view),
      ...Classes.values(this.view),
      ...Models.values(this.view),
    ]);
    if (before) this.#speak(changes(before, this.view));
    if (this.fresh) return; // a frame is due already, and will draw this one
    this.fresh = true;
    requestAnimationFrame(() => {
      this.fresh = false;
      this.#guarded(() => this.#draw());
    });
  }

  #draw() {
    const begun_ms = performance.now();
    const { view, history } = this;
    const colours = coloursOf(view.replicas);
    this.#header(view);
    this.#concerns(view);
    this.figures.show(view, history);
    this.replicas.show(view, view.replicas, colours);
    this.ring.show(view, view.replicas, colours);
    if (this.detail.dialog.open) this.detail.show(view);
    this.classes.show(view, history);
    this.models.show(view, history);
    this.reasons.show(view.decisions);
    this.codes.show(view.codes);
    this.scaling.show(view);
    this.regions.show(view);
    setHidden(at("to-regions"), view.regions.length === 0);
    this.fault = "";
    this.explain.offer(
      [...new Set(view.replicas.flatMap(({ models }) => models))].sort().slice(0, 200),
    );
    this.#linkWords();
    const took_ms = performance.now() - begun_ms;
    setText(at("cost"), `View of ${octets(this.size)} drawn in ${took_ms.toFixed(1)} ms`);
    performance.clearMeasures("doherty-draw");
    performance.measure("doherty-draw", { start: begun_ms, duration: took_ms });
    setAttribute(document.body, "data-drawn", String(view.at_s));
  }

  #header(view) {
    const { proxy, replicas } = view;
    const tone = proxy.not_ready ? "bad" : proxy.draining ? "warn" : "good";
    const word = proxy.not_ready ? "not ready" : proxy.draining ? "draining" : "ready";
    this.#state(
      "proxy-state",
      tone,
      tone === "good" ? "ready" : tone === "warn" ? "draining" : "trouble",
      word,
      proxy.not_ready ?? "",
    );
    const about = [
      proxy.region && `region ${proxy.region}`,
      `policy ${proxy.policy}`,
      `${count(proxy.workers)} ${proxy.workers === 1 ? "worker" : "workers"}`,
      `version ${proxy.version}`,
    ];
    setText(at("about"), about.filter(Boolean).join(" · "));
    const ready = replicas.filter((replica) => stateOf(replica).rank === 0).length;
    setText(at("ready-count"), `${exact(ready)} of ${exact(replicas.length)} ready`);
    const lost = replicas.filter(inTrouble).length;
    document.title = `${word === "ready" && !lost ? "" : `${lost ? `${lost} in trouble` : word} · `}Doherty${proxy.region ? ` ${proxy.region}` : ""}`;
    for (const window of document.querySelectorAll(".window"))
      setText(window, `last ${Math.round(view.window_s)} s`);
    setAttribute(at("at"), "title", moment(view.at_s));
  }

  #state(id, tone, shape, word, title) {
    const root = at(id);
    setAttribute(root, "data-tone", tone);
    setAttribute(root.querySelector("use"), "href", `#glyph-${shape}`);
    setText(root.querySelector(".word"), word);
    setAttribute(root, "title", title || null);
  }

  #concerns(view) {
    const found = concerns(view);
    const [tone, words] = found[0] ?? ["good", "Nothing needs a look."];
    this.#state("concern", tone, tone === "good" ? "ready" : "trouble", words, words);
    setText(at("concern-more"), found.length > 1 ? `and ${found.length - 1} more` : " ");
    setAttribute(at("concerns"), "data-none", found.length > 1 ? null : "yes");
    const list = found.map(([, line]) => line).join("\n");
    if (list === this.listed) return;
    this.listed = list;
    at("concern-list").replaceChildren(
      ...found.map(([kind, line]) => node("li", { "data-tone": kind }, line)),
    );
  }

  #linked(state) {
    const before = this.link.name;
    this.link = state;
    if (state.name === "denied")
      this.#askKey(state.tried ? "That key is not the admin key." : state.why);
    if (state.name !== before) {
      if (state.name === "waiting" && before === "live") this.#speak(["The connection is lost"]);
      if (state.name === "live" && this.lost) this.#speak(["The connection is back"]);
      if (state.name === "waiting") this.lost = true;
      if (state.name === "live") this.lost = false;
    }
    this.#linkWords();
  }

  // Live, or how old is what is seen, and when it is tried again.
  #linkWords() {
    const { name, until_ms: until, why } = this.link;
    const age_ms = Date.now() - this.heard_ms;
    const old = this.heard_ms && age_ms > STALE_MS;
    const left_s = Math.max(0, Math.ceil((until - Date.now()) / 1000));
    const shown = {
      live: old
        ? ["warn", "draining", `stale, ${duration(Math.round(age_ms / 1000))} old`]
        : ["good", "live", "live"],
      connecting: ["busy", "starting", this.heard_ms ? "reconnecting" : "connecting"],
      waiting: ["bad", "trouble", left_s ? `reconnecting in ${left_s} s` : "reconnecting"],
      denied: ["warn", "stopped", "admin key wanted"],
      paused: ["rest", "asleep", "paused"],
    }[name];
    this.#state("link-state", ...shown, why ?? "");
    setHidden(at("retry"), name !== "waiting" && name !== "paused");
    setAttribute(
      document.body,
      "data-stale",
      old || this.fault || (this.heard_ms && name !== "live" && name !== "connecting")
        ? "yes"
        : null,
    );
    const words =
      name === "waiting" && why
        ? `No view comes: ${why}. ${this.heard_ms ? `What you see is ${duration(Math.round(age_ms / 1000))} old.` : ""}`
        : this.fault;
    setHidden(at("stale"), !words);
    if (words) setText(at("stale"), words);
  }

  #tick() {
    if (document.visibilityState === "visible") this.#linkWords();
  }

  #seen() {
    clearTimeout(this.unseen);
    if (document.visibilityState === "hidden") {
      this.unseen = setTimeout(() => this.feed.pause(), UNSEEN_MS_MAX);
    } else if (this.link.name === "paused" || this.link.name === "waiting") {
      this.feed.start();
    }
  }

  // A reader hears what is added; a line at a time, and the old ones go.
  #speak(lines) {
    if (!lines.length) return;
    const log = at("spoken");
    for (const line of lines) log.append(node("p", {}, line));
    while (log.childElementCount > 8) log.firstElementChild.remove();
  }

  #buttons() {
    at("retry").addEventListener("click", () => this.feed.start());
    at("key").addEventListener("click", () => this.#askKey(""));
    at("look").addEventListener("click", () => {
      this.replicas.choose("trouble");
      at("replicas").scrollIntoView();
    });
    at("key-form").addEventListener("submit", () => {
      const key = at("key-value").value;
      at("key-value").value = "";
      adminKey.set(key);
      this.feed.start();
    });
    for (const button of document.querySelectorAll("[data-close]")) {
      button.addEventListener("click", () => button.closest("dialog").close());
    }
    at("key-forget").addEventListener("click", () => {
      adminKey.set("");
      at("key-dialog").close();
      this.feed.start();
    });
    at("drain-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#wish();
    });
  }

  #askKey(why) {
    setText(at("key-why"), why || " ");
    setHidden(at("key-why"), !why);
    setHidden(at("key-forget"), !adminKey.get());
    if (!at("key-dialog").open) at("key-dialog").showModal();
  }

  // What draining it means for those who remain is said before it is done.
  #confirm(replica, wish) {
    this.wanted = { name: replica.replica_id, wish };
    setText(at("drain-title"), `${wish === "drain" ? "Drain" : "Undrain"} ${replica.replica_id}?`);
    const others = this.view.replicas.filter(
      (one) =>
        one.replica_id !== replica.replica_id &&
        one.state === "ready" &&
        !one.suspect &&
        replica.models.every((model) => one.models.includes(model)),
    );
    const left = others.length
      ? `${exact(others.length)} other ${others.length === 1 ? "replica is" : "replicas are"} ready for ${replica.models.join(", ") || "its model"}.`
      : `No other replica is ready for ${replica.models.join(", ") || "its model"}: requests for it will wait or be refused.`;
    setText(
      at("drain-words"),
      wish === "undrain"
        ? "It takes new requests again."
        : `It takes no new requests. Those that it has, ${exact(replica.inflight)}, run to their end.`,
    );
    setText(at("drain-others"), wish === "drain" ? left : " ");
    setAttribute(
      at("drain-others"),
      "data-tone",
      wish === "drain" && !others.length ? "bad" : null,
    );
    setText(at("drain-go"), wish === "drain" ? "Drain" : "Undrain");
    setHidden(at("drain-failed"), true);
    at("drain-dialog").showModal();
  }

  async #wish() {
    const { name, wish } = this.wanted;
    at("drain-go").disabled = true;
    try {
      const response = await ask(`replicas/${encodeURIComponent(name)}/${wish}`, {
        method: "POST",
      });
      if (response.ok) {
        at("drain-dialog").close();
        this.#speak([`${wish === "drain" ? "Drain" : "Undrain"} of ${name} is under way`]);
        return;
      }
      const why = await refusal(response);
      if (response.status === 401) {
        at("drain-dialog").close();
        this.#askKey(why);
      } else {
        this.#failed(why);
      }
    } catch {
      this.#failed("the admin listener cannot be reached");
    } finally {
      at("drain-go").disabled = false;
    }
  }

  #failed(why) {
    setText(at("drain-failed"), `It was not done: ${why}`);
    setHidden(at("drain-failed"), false);
  }

  #theme() {
    const choices = ["auto", "light", "dark"];
    const button = at("theme");
    const show = () => setText(at("theme-word"), document.documentElement.dataset.theme ?? "auto");
    button.addEventListener("click", () => {
      const now = document.documentElement.dataset.theme ?? "auto";
      const next = choices[(choices.indexOf(now) + 1) % choices.length];
      if (next === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = next;
      try {
        localStorage.setItem("doherty-theme", next);
      } catch {
        // Storage is closed to this page: the choice is this visit's.
      }
      show();
    });
    show();
  }
}

export const page = new Page();
