// "Where would this request go, and why": a form over POST /debug/route. Nothing is sent to a replica.

import { node, setAttribute, setHidden, setText } from "./dom.js";
import { ask, refusal } from "./feed.js";
import { count, duration, exact, octets, times } from "./format.js";
import { reasonWords } from "./panels.js";

const ROWS = 20;

// The terms of a price, in the order of `core/cost.py`, and what each is for.
const TERMS = [
  ["wait_s", "Wait", "work that is before it there"],
  ["prefill_s", "Prefill", "its own tokens that are not cached"],
  ["recompute_s", "Recompute", "what those cost whoever comes next, and what they displace"],
  ["stall_s", "Stall", "the streams there that it holds up"],
  ["extra_s", "Extra", "a first token beyond its prefill; in another region, a start"],
  ["shortage_s", "Shortage", "a slot or room in the KV cache"],
  ["adapter_s", "Adapter", "loading its adapter"],
  ["pace_s", "Pace", "an answer that would be slower than it wants"],
  ["round_trip_s", "Round trip", "the way to another region, and what that must be cheaper by"],
];

// The body of a request with this prompt, as the path wants it.
export function bodyOf(path, model, prompt) {
  if (path.endsWith("/chat/completions"))
    return { model, messages: [{ role: "user", content: prompt }] };
  if (path.endsWith("/messages"))
    return { model, max_tokens: 256, messages: [{ role: "user", content: prompt }] };
  if (path.endsWith("/completions")) return { model, prompt };
  return { model, input: prompt };
}

// Header fields as they are written, one to a line. Raises an Error that says which is none.
export function fieldsOf(text) {
  const headers = new Headers();
  for (const line of text
    .split("\n")
    .map((each) => each.trim())
    .filter(Boolean)) {
    const colon = line.indexOf(":");
    try {
      headers.append(line.slice(0, Math.max(0, colon)), line.slice(colon + 1).trim());
    } catch {
      throw new Error(`“${line}” is no header field: write NAME: VALUE, one to a line`);
    }
  }
  if (headers.has("authorization")) {
    throw new Error(
      "authorization is this page's own to the admin listener: name the client's key as x-api-key",
    );
  }
  return headers;
}

export class ExplainPanel {
  // `denied(message)` is called when the admin key is wanted.
  constructor(root, { denied }) {
    this.find = (name) => root.querySelector(`[data-part="${name}"]`);
    this.denied = denied;
    this.form = this.find("form");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#ask();
    });
    for (const radio of this.form.elements.kind)
      radio.addEventListener("change", () => this.#kind());
    this.find("more").addEventListener("click", () => this.#candidates(this.said, Infinity));
    this.models = "";
    this.#kind();
  }

  #kind() {
    const whole = this.form.elements.kind.value === "body";
    setHidden(this.find("prompt-fields"), whole);
    setHidden(this.find("model-field"), whole); // a body names its own
    setHidden(this.find("body-fields"), !whole);
  }

  // The models that the form proposes.
  offer(models) {
    if (models.join("\n") === this.models) return;
    this.models = models.join("\n");
    this.find("models").replaceChildren(...models.map((model) => node("option", { value: model })));
    const { model } = this.form.elements;
    if (!model.value && models.length) model.value = models[0];
  }

  #request() {
    const { kind, path, model, prompt, body, fields } = this.form.elements;
    const headers = fieldsOf(fields.value);
    if (!headers.has("content-type")) headers.set("content-type", "application/json");
    const text =
      kind.value === "body"
        ? body.value
        : JSON.stringify(bodyOf(path.value, model.value, prompt.value));
    return [
      `debug/route?path=${encodeURIComponent(path.value)}`,
      { method: "POST", headers, body: text },
    ];
  }

  async #ask() {
    const submit = this.find("submit");
    this.#say("");
    submit.disabled = true;
    try {
      const response = await ask(...this.#request());
      if (response.status === 401 && response.headers.get("content-type")?.includes("json")) {
        const why = await refusal(response.clone());
        if (/admin/iu.test(why)) this.denied(why);
        this.#fail(why);
      } else if (response.ok) {
        this.#show(await response.json());
      } else {
        this.#fail(`${response.status}: ${await refusal(response)}`);
      }
    } catch (error) {
      this.#fail(
        error instanceof TypeError ? "The admin listener cannot be reached" : String(error.message),
      );
    } finally {
      submit.disabled = false;
    }
  }

  #say(words) {
    setText(this.find("answer"), words || " ");
    setAttribute(this.find("answer"), "data-tone", null);
  }

  #fail(words) {
    setHidden(this.find("result"), true);
    this.#say(words);
    setAttribute(this.find("answer"), "data-tone", "bad");
  }

  #show(said) {
    this.said = said;
    const { decision } = said;
    if (decision) {
      const why = reasonWords(decision.reason);
      this.#say(
        `Goes to ${decision.replica}: ${decision.reason}${why ? `, ${why}` : ""}. Price ${duration(decision.price_s)}.` +
          `${said.held ? " It would wait in the proxy first." : ""}`,
      );
    } else if (said.held) {
      this.#say(
        `Waits in the proxy, where ${times(said.waiting, "request waits", "requests wait")} now.`,
      );
    } else {
      this.#say(`Goes nowhere: ${said.error?.error?.message ?? "no replica can take it"}`);
      setAttribute(this.find("answer"), "data-tone", "bad");
    }
    setHidden(this.find("result"), false);
    this.#facts(said);
    this.#candidates(said, ROWS);
    this.#chain(said.chain);
    setText(this.find("raw"), JSON.stringify(said, null, 2));
  }

  #facts(said) {
    const { decision, session } = said;
    const facts = [
      ["Route", said.route],
      ["Model", said.model],
      ["Class", said.class],
      ["Tenant", said.tenant || "none"],
      ["Key", said.key_id || "none"],
      ["Policy", said.policy],
      ["Streamed", said.stream ? "yes" : "no"],
      ["Session", session ? `by ${session.given_by}${session.pinned ? ", pinned" : ""}` : "none"],
      [
        "Prompt",
        `${octets(said.chain?.prompt_octets)}${decision ? `, about ${count(decision.prompt_tokens)} tokens` : ""}`,
      ],
    ];
    if (decision) {
      facts.push(["Cached there", octets(decision.cached_octets)]);
      if (decision.hot_octets) facts.push(["Hot, as if everywhere", octets(decision.hot_octets)]);
    }
    this.find("facts").replaceChildren(
      ...facts.map(([name, value]) =>
        node("div", {}, node("dt", {}, name), node("dd", {}, String(value))),
      ),
    );
  }

  // A row for each candidate, a column for each term that is anything for anybody.
  #candidates(said, most) {
    const all = said.candidates ?? [];
    const rows = all.slice(0, most);
    const terms = TERMS.filter(([name]) => all.some((one) => one[name] > 0));
    const none = TERMS.filter((term) => !terms.includes(term)).map(([, label]) =>
      label.toLowerCase(),
    );
    const head = (label, hint, number = true) =>
      node("th", { scope: "col", class: number ? "number" : null, title: hint }, label);
    this.find("candidates-head").replaceChildren(
      head("Candidate", null, false),
      head("Price", "the sum of the terms"),
      ...terms.map(([, label, hint]) => head(label, hint)),
      head("Cached", "tokens of this prompt"),
      head("Uncached", "tokens of this prompt"),
      head("In flight", "requests there now"),
      head("Known by", "whence the proxy knows its cache", false),
    );
    const price = (one) => one.price_s ?? null;
    const dearest = Math.max(...rows.map((one) => one.price_s ?? 0), 0);
    this.find("candidates").replaceChildren(
      ...rows.map((one) => {
        const chosen = one.replica === said.decision?.replica;
        const largest = Math.max(...terms.map(([name]) => one[name] ?? 0));
        const number = (value, classes = "") => node("td", { class: `number ${classes}` }, value);
        const about = one.may_take
          ? chosen
            ? "chosen"
            : one.remote
              ? `region ${one.region}`
              : "may take it"
          : `cannot: ${one.reason}`;
        return node(
          "tr",
          { "data-chosen": chosen ? "yes" : null, "data-cannot": one.may_take ? null : "yes" },
          node(
            "th",
            { scope: "row" },
            node("span", { class: "first" }, one.replica),
            node("span", { class: "below" }, about),
          ),
          number(duration(price(one)), one.price_s === dearest ? "" : "strong"),
          ...terms.map(([name]) =>
            number(duration(one[name]), one[name] && one[name] === largest ? "strong" : ""),
          ),
          number(count(one.cached_tokens)),
          number(count(one.uncached_tokens)),
          number(count(one.inflight)),
          node(
            "td",
            {},
            one.remote ? "its summary" : one.cache_source === "events" ? "events" : "record",
          ),
        );
      }),
    );
    setText(this.find("zeros"), none.length ? `Nothing for anybody: ${none.join(", ")}.` : " ");
    setHidden(this.find("more"), rows.length === all.length);
    setText(this.find("more"), `Show all ${exact(all.length)}`);
  }

  #chain(chain) {
    const points = chain?.points ?? [];
    setText(
      this.find("chain-summary"),
      `Prefix chain: ${times(points.length, "point", "points")}, home key ${chain?.home_key ?? "none"}`,
    );
    this.find("chain").replaceChildren(
      ...points.map(({ octets: end, hash }) =>
        node(
          "tr",
          {},
          node("td", { class: "number" }, exact(end)),
          node("td", { class: "mono" }, hash),
        ),
      ),
    );
  }
}
