// What a state means, and what needs a look. Decided here once, for the table, the strip above it,
// the title of the page and what is spoken.

import { count, duration, times } from "./format.js";

// How each state is shown, by a shape besides its word, and how bad it is (0: as it should be).
const STATES = {
  ready: { glyph: "ready", tone: "good", rank: 0 },
  asleep: { glyph: "asleep", tone: "rest", rank: 1 },
  starting: { glyph: "starting", tone: "busy", rank: 2 },
  draining: { glyph: "draining", tone: "warn", rank: 3 },
  stopping: { glyph: "draining", tone: "warn", rank: 3 },
  stopped: { glyph: "stopped", tone: "rest", rank: 4 },
  backoff: { glyph: "trouble", tone: "bad", rank: 6, phrase: "in backoff" },
};
const OTHER = { glyph: "stopped", tone: "rest", rank: 4 };
const SUSPECT = { glyph: "trouble", tone: "bad", rank: 7 };

export const GROUPS = [
  ["all", "All", () => true],
  ["ready", "Ready", (replica) => replica.state === "ready" && !replica.suspect],
  ["trouble", "In trouble", (replica) => inTrouble(replica)],
  [
    "draining",
    "Draining",
    (replica) => replica.state === "draining" || replica.state === "stopping",
  ],
  ["coming", "Starting", (replica) => replica.state === "starting"],
  ["rest", "At rest", (replica) => replica.state === "asleep" || replica.state === "stopped"],
];

export function stateOf(replica) {
  if (replica.suspect && replica.state === "ready") return { ...SUSPECT, word: "unreachable" };
  return {
    ...(Object.hasOwn(STATES, replica.state) ? STATES[replica.state] : OTHER),
    word: replica.state,
  };
}

export function inTrouble(replica) {
  return replica.suspect || replica.state === "backoff";
}

// As it stands in a sentence.
function phraseOf(replica) {
  const { phrase, word } = stateOf(replica);
  return `${replica.replica_id} is ${phrase ?? word}`;
}

// Why, in words: what the manager says, and who drained it.
export function reasonOf(replica) {
  if (replica.reason) return replica.reason;
  if (replica.held) return "drained by an operator";
  return replica.suspect ? "the workers cannot reach it" : "";
}

const LAG_S = 0.1; // a tick later than this is felt by streams that run
const FLEET_AGE_S = 30; // managers are heard of far more often
const OLDEST_S = 10;

// What needs a look, the worst first, each as [tone, words].
export function concerns(view) {
  const { proxy, replicas } = view;
  const found = [];
  if (proxy.not_ready) found.push(["bad", `The proxy is not ready: ${proxy.not_ready}`]);
  if (proxy.draining)
    found.push(["warn", "The proxy is draining: it takes no new connections and will end"]);
  const lost = replicas.filter(inTrouble);
  for (const replica of lost.slice(0, 5)) {
    const reason = reasonOf(replica);
    found.push(["bad", `${phraseOf(replica)}${reason ? `: ${reason}` : ""}`]);
  }
  if (lost.length > 5)
    found.push(["bad", `${count(lost.length - 5)} more replicas are in trouble`]);
  if (!replicas.length) found.push(["warn", "There is no replica: requests wait or are refused"]);
  if (proxy.errors_per_s > 0) {
    found.push([
      "bad",
      `${count(proxy.errors_per_s)} answers a second are errors of 500 and above, or were cut`,
    ]);
  }
  if (proxy.manager_url && (proxy.fleet_age_s === null || proxy.fleet_age_s > FLEET_AGE_S)) {
    const when =
      proxy.fleet_age_s === null
        ? "has never been heard of"
        : `was last heard of ${duration(proxy.fleet_age_s)} ago`;
    found.push(["warn", `The manager ${when}: the proxy goes on with the replicas it knew`]);
  }
  for (const pool of view.pools ?? []) {
    if (pool.waiting)
      found.push([
        "warn",
        `${pool.pool} wants ${times(pool.desired, "replica", "replicas")}: ${pool.waiting}`,
      ]);
  }
  for (const line of view.classes ?? []) {
    if (line.refused_per_s > 0)
      found.push([
        "warn",
        `${line.work_class}: ${count(line.refused_per_s)} requests a second are refused`,
      ]);
    if (line.work_class !== "offline" && (line.oldest_s ?? 0) > OLDEST_S) {
      found.push([
        "warn",
        `${line.work_class}: the oldest request has waited ${duration(line.oldest_s)}`,
      ]);
    }
  }
  for (const remote of view.regions ?? []) {
    if (!remote.linked)
      found.push(["warn", `The link with region ${remote.region} (${remote.peer}) is down`]);
  }
  if ((proxy.loop_lag_s ?? 0) > LAG_S) {
    found.push(["warn", `A worker's event loop was ${duration(proxy.loop_lag_s)} late`]);
  }
  return found;
}

// What has changed between two views that is worth saying aloud, in a few words.
export function changes(before, after) {
  const told = [];
  if (Boolean(before.proxy.not_ready) !== Boolean(after.proxy.not_ready)) {
    told.push(
      after.proxy.not_ready
        ? `The proxy is not ready: ${after.proxy.not_ready}`
        : "The proxy is ready",
    );
  }
  if (!before.proxy.draining && after.proxy.draining) told.push("The proxy is draining");
  const states = new Map(
    before.replicas.map((replica) => [replica.replica_id, stateOf(replica).word]),
  );
  const moved = [];
  for (const replica of after.replicas) {
    const { word } = stateOf(replica);
    if (states.get(replica.replica_id) !== word) moved.push(phraseOf(replica));
    states.delete(replica.replica_id);
  }
  for (const name of states.keys()) moved.push(`${name} is gone`);
  if (moved.length > 3) told.push(`${count(moved.length)} replicas have changed their state`);
  else told.push(...moved);
  return told;
}

// May it be drained or brought back? Null: neither is for an operator to say now.
export function wishFor(replica) {
  if (replica.held) return "undrain";
  if (replica.state === "draining" || replica.state === "stopping" || replica.state === "stopped")
    return null;
  return "drain";
}
