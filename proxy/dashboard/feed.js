// The stream of views, read by fetch: an EventSource could not send the admin key. A stream that
// ends, fails or falls silent is begun again, later each time, at most every 15 s.
//
// The events are read as HTML's section 9.2.6 (server-sent events) says, as far as they are used
// here: lines end in LF or CRLF, `data` lines of one event are joined, comments keep it alive.

const SILENCE_MS_MAX = 10_000; // views come every second, comments too: ten of them are missing
const WAIT_MS_MIN = 500;
const WAIT_MS_MAX = 15_000;
const EVENT_CHARS_MAX = 16 * 1024 * 1024; // no view is so long; what is, is no view
const KEY_NAME = "doherty-admin-key";

// The admin key, for as long as this tab is open.
export const adminKey = {
  get() {
    try {
      return sessionStorage.getItem(KEY_NAME) ?? "";
    } catch {
      return "";
    }
  },
  set(key) {
    try {
      if (key) sessionStorage.setItem(KEY_NAME, key);
      else sessionStorage.removeItem(KEY_NAME);
    } catch {
      // Storage is closed to this page: the key is asked for again when it is wanted.
    }
  },
};

// Ask the admin listener; the address is relative, so the page works below any path.
export function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = adminKey.get();
  // A field's value is octets; a key may be any text, and is sent as its UTF-8.
  if (key) {
    const octets = new TextEncoder().encode(key);
    headers.set("authorization", `Bearer ${String.fromCharCode(...octets)}`);
  }
  return fetch(path, { cache: "no-store", credentials: "same-origin", ...options, headers });
}

// What a refusal says of itself, in one line.
export async function refusal(response) {
  try {
    const said = await response.json();
    const message = said?.error?.message;
    if (typeof message === "string" && message) return message;
  } catch {
    // Not JSON: its status has to do.
  }
  return `the admin listener answered ${response.status}`;
}

export class Feed {
  // `onView(view, size)` with every view; `onState(state)` with {name, until_ms, why}, where name is
  // connecting, live, waiting, denied or paused.
  constructor({ onView, onState }) {
    this.onView = onView;
    this.onState = onState;
    this.failures = 0;
    this.timer = 0;
    this.running = null;
  }

  start() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.running = new AbortController();
    this.onState({ name: "connecting" });
    void this.#run(this.running);
  }

  pause() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.running = null;
    this.onState({ name: "paused" });
  }

  async #run(control) {
    let why = "the stream ended";
    try {
      why = (await this.#read(control)) ?? why;
    } catch (error) {
      if (this.running !== control) return; // another has begun, or it was paused
      why =
        control.signal.reason instanceof Silence ? "nothing was heard for 10 s" : reasonOf(error);
    }
    if (this.running !== control || why === DENIED) return;
    const most_ms = Math.min(WAIT_MS_MAX, WAIT_MS_MIN * 2 ** this.failures);
    // Half of it by lot, so that pages do not come back all at once after a restart.
    const wait_ms = most_ms / 2 + (Math.random() * most_ms) / 2;
    this.failures = Math.min(this.failures + 1, 10);
    this.timer = setTimeout(() => this.start(), wait_ms);
    this.onState({ name: "waiting", until_ms: Date.now() + wait_ms, why });
  }

  async #read(control) {
    let watchdog = 0;
    const heard = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => control.abort(new Silence()), SILENCE_MS_MAX);
    };
    heard();
    try {
      const response = await ask("view/watch", {
        signal: control.signal,
        headers: { accept: "text/event-stream" },
      });
      if (response.status === 401) {
        const why = await refusal(response);
        if (this.running === control)
          this.onState({ name: "denied", why, tried: adminKey.get() !== "" });
        return DENIED;
      }
      if (!response.ok || response.body === null) return await refusal(response);
      const events = new Events();
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return null;
        heard();
        for (const data of events.take(value)) this.#view(data, control);
      }
    } finally {
      clearTimeout(watchdog);
    }
  }

  #view(data, control) {
    if (this.running !== control) return;
    const view = JSON.parse(data);
    this.failures = 0;
    this.onState({ name: "live" });
    this.onView(view, data.length);
  }
}

const DENIED = "denied";

class Silence extends Error {}

function reasonOf(error) {
  if (error instanceof TypeError) return "the admin listener cannot be reached";
  if (error instanceof SyntaxError) return "what came was no view";
  return String(error?.message ?? error);
}

// Server-sent events out of pieces of text; only those named `view`, or not at all, are told of.
export class Events {
  constructor() {
    this.rest = "";
    this.data = [];
    this.name = "";
  }

  *take(text) {
    this.rest += text;
    if (this.rest.length > EVENT_CHARS_MAX) throw new SyntaxError("an event without an end");
    let begin = 0;
    for (;;) {
      const end = this.rest.indexOf("\n", begin);
      if (end < 0) break;
      const line = this.rest.slice(
        begin,
        this.rest[end - 1] === "\r" && end > begin ? end - 1 : end,
      );
      begin = end + 1;
      if (line === "") {
        const whole = this.data.join("\n");
        const meant = this.name === "" || this.name === "view";
        this.data = [];
        this.name = "";
        if (whole && meant) yield whole;
      } else {
        this.#line(line);
      }
    }
    this.rest = this.rest.slice(begin);
  }

  #line(line) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "data") this.data.push(value);
    else if (field === "event") this.name = value;
  }
}
