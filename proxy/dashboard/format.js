// Numbers for people: three digits that matter, a unit, and a dash for what nobody knows.
// All of it is pure; `null` (nobody knows) is not zero and never reads like it.

export const UNKNOWN = "–";

const SCALES = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];
const GROUPED = new Intl.NumberFormat("en");

function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}

// Three significant digits, without zeros that say nothing: 0.42, 4.2, 42, 420.
function digits(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.01) return "<0.01";
  if (size < 10) return String(Number(value.toFixed(size < 1 ? 2 : 1)));
  return String(Math.round(value));
}

// A number of things: 0.42, 4.2, 420, 12.3k.
export function count(value) {
  if (!known(value)) return UNKNOWN;
  if (Math.abs(value) < 999.5) return digits(value);
  for (const [size, letter] of SCALES) {
    if (Math.abs(value) >= size * 0.9995) {
      const scaled = value / size;
      return `${scaled < 99.95 ? scaled.toFixed(1) : Math.round(scaled)}${letter}`;
    }
  }
  return UNKNOWN;
}

export function exact(value) {
  return known(value) ? GROUPED.format(value) : "not known";
}

export function octets(value) {
  if (!known(value)) return UNKNOWN;
  if (value < 1000) return `${Math.round(value)} B`;
  for (const [size, letter] of SCALES) {
    if (value >= size) {
      const scaled = value / size;
      return `${scaled < 9.95 ? scaled.toFixed(1) : Math.round(scaled)} ${letter}B`;
    }
  }
  return UNKNOWN;
}

export function percent(ratio) {
  if (!known(ratio)) return UNKNOWN;
  const value = ratio * 100;
  if (value > 0 && value < 0.1) return "<0.1 %";
  return `${value > 0 && value < 9.95 ? Number(value.toFixed(1)) : Math.round(value)} %`;
}

// A length of time: 420 µs, 38 ms, 2.41 s, 3 m 12 s, 5 h 2 m.
export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  if (size < 0.000_9995) return `${Math.round(seconds * 1e6)} µs`;
  if (size < 0.009_995) return `${(seconds * 1e3).toFixed(1)} ms`;
  if (size < 0.9995) return `${Math.round(seconds * 1e3)} ms`;
  if (size < 9.995) return `${seconds.toFixed(2)} s`;
  if (size < 119.5) return `${size < 99.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const whole = Math.round(size);
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${whole % 60} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} m`;
  return `${Math.round(minutes / 1440)} days`;
}

// An age, in steps that do not flicker: 12 s ago, 3 m ago.
export function ago(age_s) {
  if (!known(age_s)) return "never";
  if (age_s < 1.5) return "now";
  if (age_s < 90) return `${Math.round(age_s)} s ago`;
  if (age_s < 5400) return `${Math.round(age_s / 60)} m ago`;
  if (age_s < 48 * 3600) return `${Math.round(age_s / 3600)} h ago`;
  return `${Math.round(age_s / 86400)} days ago`;
}

export function moment(at_s) {
  return known(at_s)
    ? new Date(at_s * 1000).toLocaleString("en-GB", { timeZoneName: "short" })
    : "";
}

export function times(number, one, many) {
  return `${count(number)} ${number === 1 ? one : many}`;
}
