// All that the view says of one replica, exact and in words, for as long as its dialog is open.

import { Keyed, node, setText } from "./dom.js";
import { duration, exact, percent, times } from "./format.js";
import { reasonOf, stateOf } from "./states.js";

const yes = (claim) => (claim ? "yes" : "no");
const unknown = (words) => words || "not told";

function factsOf(one, rings) {
  const prefixes = rings.flatMap((ring) => ring.prefixes);
  const home = prefixes.filter((prefix) => prefix.home === one.replica_id).length;
  const held = prefixes.filter((prefix) => prefix.holders?.includes(one.replica_id)).length;
  const room = one.inflight_max ? ` of at most ${exact(one.inflight_max)}` : ", without a limit";
  const source =
    one.cache_source === "events"
      ? `the engine's events, ${duration(one.cache_source_age_s)} ago`
      : "the proxy's own record";
  return [
    ["State", `${stateOf(one).word}${reasonOf(one) ? `: ${reasonOf(one)}` : ""}`],
    ["Reached by the workers", yes(!one.suspect)],
    ["Drained by an operator", yes(one.held)],
    ["Restarts", exact(one.restarts)],
    ["Models", unknown(one.models.join(", "))],
    ["Pool", unknown(one.pool)],
    ["Region", unknown(one.region)],
    ["Engine", unknown([one.engine, one.engine_version].filter(Boolean).join(" "))],
    ["GPUs", unknown(one.gpus.join(", "))],
    ["Data-parallel ranks", exact(one.dp_size)],
    ["Requests there", `${exact(one.inflight)}${room}`],
    ["Of these decoding", exact(Math.round(one.decoding))],
    ["Engine runs", exact(one.running)],
    ["Engine has waiting", exact(one.waiting)],
    ["Prompt tokens queued", exact(one.queued_tokens)],
    ["Wait for a new request", duration(one.wait_s)],
    ["Prefill speed", `${exact(Math.round(one.prefill_tokens_per_s))} tokens a second`],
    ["Requests a second", String(one.requests_per_s)],
    ["KV cache used", percent(one.kv_used_ratio)],
    ["KV cache", `${exact(one.cache_tokens)} tokens`],
    ["What is in it is known by", source],
    ["Prompt tokens found there", percent(one.cached_ratio)],
    ["Share of the ring", percent(one.ring_ratio)],
    ["Hot prefixes", `home of ${times(home, "prefix", "prefixes")}, holds ${exact(held)}`],
  ];
}

export class Detail {
  constructor(dialog) {
    this.dialog = dialog;
    this.name = "";
    this.rows = new Keyed(dialog.querySelector("dl"), ([label]) => {
      const value = node("dd");
      const root = node("div", {}, node("dt", {}, label), value);
      return { root, update: ([, words]) => setText(value, words) };
    });
  }

  open(replica, view) {
    this.name = replica.replica_id;
    setText(this.dialog.querySelector("h2"), this.name);
    this.show(view);
    this.dialog.showModal();
  }

  show(view) {
    const one = view.replicas.find((replica) => replica.replica_id === this.name);
    const facts = one ? factsOf(one, view.rings) : [["State", "it is gone"]];
    this.rows.show(facts, ([label]) => label);
  }
}
