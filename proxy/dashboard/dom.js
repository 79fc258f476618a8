// The page's own ways with elements. Text goes in as text nodes and never as markup: replicas,
// models and reasons bear names that others chose. What has not changed is not touched.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, heard] of Object.entries(value)) element.addEventListener(event, heard);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function node(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

export function glyph(name) {
  return shape(
    "svg",
    { class: "glyph", "aria-hidden": "true", focusable: "false" },
    shape("use", { href: `#glyph-${name}` }),
  );
}

// Elements that are given text hold nothing else.
export function setText(element, text) {
  const first = element.firstChild;
  if (first === null) element.append(text);
  else if (first.data !== text) first.data = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, value);
  }
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

// A list of elements that follows a list of values, each known by its key. An entry that stays is
// updated where it is, so that focus, selection and hover outlive an update.
export class Keyed {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make; // (item) → { root, update(item) }
    this.entries = new Map();
  }

  show(items, keyOf) {
    const wanted = new Map();
    for (const item of items) {
      const key = keyOf(item);
      if (!wanted.has(key)) wanted.set(key, item);
    }
    for (const [key, entry] of this.entries) {
      if (wanted.has(key)) continue;
      entry.root.remove();
      this.entries.delete(key);
    }
    let next = this.parent.firstElementChild;
    for (const [key, item] of wanted) {
      let entry = this.entries.get(key);
      if (entry === undefined) {
        entry = this.make(item);
        this.entries.set(key, entry);
      }
      entry.update(item);
      if (entry.root === next) next = next.nextElementSibling;
      else this.parent.insertBefore(entry.root, next);
    }
  }
}

// A share as a bar; its width is its value, its words are beside it. `full` marks one of which
// hardly anything is left.
export function bar() {
  const fill = node("span", { class: "bar-fill" });
  const root = node("span", { class: "bar", "aria-hidden": "true" }, fill);
  let shown = "";
  return {
    root,
    show(ratio, full = false) {
      const known = typeof ratio === "number" && Number.isFinite(ratio);
      const width = known ? `${Math.round(Math.min(1, Math.max(0, ratio)) * 200) / 2}%` : "0%";
      setAttribute(root, "data-full", full ? "yes" : null);
      if (width === shown) return;
      shown = width;
      fill.style.width = width;
    },
  };
}
