// What WCAG 2.2 AA asks of a page and a program can see, as a list of complaints. Run in the page.
// Contrast by its relative luminance (SC 1.4.3, 1.4.11), size of targets (SC 2.5.8), and that ids,
// headings, tables and labels are as they should be (SC 1.3.1, 4.1.2).

const complaints = [];
const shown = (element) =>
  element.checkVisibility({ visibilityProperty: true, opacityProperty: false });
const unseen = (element) => element.closest(".unseen, .skip, .symbols") !== null;
const named = (element) =>
  `<${element.tagName.toLowerCase()} id="${element.id}" class="${element.getAttribute("class") ?? ""}">` +
  ` ${element.textContent.trim().slice(0, 40)}`;

// --- contrast -------------------------------------------------------------------------------------

const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
function channels(colour) {
  pixel.clearRect(0, 0, 1, 1);
  pixel.fillStyle = colour;
  pixel.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
const over = ([r, g, b, a], below) => [r, g, b].map((value, n) => value * a + below[n] * (1 - a));
function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function behind(element) {
  const layers = [];
  for (let at = element; at !== null; at = at.parentElement) {
    const layer = channels(getComputedStyle(at).backgroundColor);
    layers.push(layer);
    if (layer[3] === 1) break;
    if (at.tagName === "DIALOG") break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let texts = 0;
while (walker.nextNode()) {
  const { parentElement: element, data } = walker.currentNode;
  if (!data.trim() || !shown(element) || unseen(element) || element.closest("svg")) continue;
  if (["SCRIPT", "STYLE", "OPTION", "NOSCRIPT"].includes(element.tagName)) continue;
  texts += 1;
  const style = getComputedStyle(element);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  const below = behind(element);
  const found = contrast(over(channels(style.color), below), below);
  if (found < (large ? 3 : 4.5))
    complaints.push(`contrast ${found.toFixed(2)} of ${named(element)}`);
}
if (texts < 20) complaints.push(`only ${texts} texts were found to judge`);
for (const control of document.querySelectorAll(
  "button:not(.link, .sort, .chip), input, select, textarea",
)) {
  if (
    !shown(control) ||
    control.type === "radio" ||
    control.disabled ||
    control.getAttribute("aria-disabled")
  )
    continue;
  const style = getComputedStyle(control);
  const edge = over(channels(style.borderTopColor), behind(control.parentElement));
  const face = behind(control);
  const around = behind(control.parentElement);
  const found = Math.max(contrast(edge, around), contrast(face, around));
  if (found < 3) complaints.push(`edge ${found.toFixed(2)} of ${named(control)}`);
}
for (const glyph of document.querySelectorAll(".glyph")) {
  if (!shown(glyph)) continue;
  const below = behind(glyph.parentElement);
  const found = contrast(over(channels(getComputedStyle(glyph).color), below), below);
  if (found < 3) complaints.push(`glyph ${found.toFixed(2)} of ${named(glyph.parentElement)}`);
}

// --- structure ------------------------------------------------------------------------------------

if (!document.documentElement.lang) complaints.push("no language");
if (!document.title) complaints.push("no title");
const ids = [...document.querySelectorAll("[id]")].map(({ id }) => id);
for (const id of new Set(ids.filter((id, n) => ids.indexOf(id) !== n)))
  complaints.push(`id ${id} twice`);
for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for", "list"]) {
  for (const element of document.querySelectorAll(`[${attribute}]`)) {
    for (const id of element.getAttribute(attribute).split(/\s+/u)) {
      if (!document.getElementById(id))
        complaints.push(`${attribute} of ${named(element)} names nothing: ${id}`);
    }
  }
}
for (const link of document.querySelectorAll("a[href^='#']")) {
  if (!document.querySelector(link.getAttribute("href")))
    complaints.push(`${link.href} leads nowhere`);
}
for (const one of ["main", "header", "footer", "h1"]) {
  if (document.querySelectorAll(one).length !== 1) complaints.push(`not one ${one}`);
}
for (const section of document.querySelectorAll("section, nav, [role='region']")) {
  if (!section.hasAttribute("aria-labelledby") && !section.hasAttribute("aria-label"))
    complaints.push(`no name: ${named(section)}`);
}
let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
  if (heading.closest("dialog")) continue;
  const next = Number(heading.tagName[1]);
  if (next > level + 1) complaints.push(`after h${level} comes ${named(heading)}`);
  level = next;
}
for (const table of document.querySelectorAll("table")) {
  if (!table.caption?.textContent.trim()) complaints.push(`no caption: ${named(table)}`);
  for (const head of table.querySelectorAll("th"))
    if (!head.scope) complaints.push(`no scope: ${named(head)}`);
  for (const head of table.querySelectorAll("thead th")) {
    if (!head.textContent.trim()) complaints.push(`no words: ${named(head)} in ${named(table)}`);
  }
}
for (const image of document.querySelectorAll("img"))
  if (!image.hasAttribute("alt")) complaints.push(`no alt: ${image.src}`);
for (const svg of document.querySelectorAll("svg")) {
  const hidden = svg.closest("[aria-hidden='true']");
  if (!hidden && svg.getAttribute("role") !== "img")
    complaints.push(`neither image nor hidden: ${named(svg)}`);
}

// --- targets: 24 by 24, or so far from the next that circles of 24 do not touch ------------------------

// What its scrolling region does not show at the moment is nobody's neighbour.
const clipped = (element) => {
  const region = element.closest(".scroll")?.getBoundingClientRect();
  const { top, bottom } = element.getBoundingClientRect();
  return region !== undefined && (bottom > region.bottom || top < region.top);
};
const targets = [...document.querySelectorAll("a, button, input, select, textarea, summary")]
  .filter((element) => shown(element) && !unseen(element) && !element.disabled && !clipped(element))
  .map((element) => ({
    element,
    box: (element.type === "radio" ? element.closest("label") : element).getBoundingClientRect(),
  }));
const small = ({ box }) => box.width < 24 || box.height < 24;
for (const one of targets.filter(small)) {
  const x = one.box.x + one.box.width / 2;
  const y = one.box.y + one.box.height / 2;
  for (const other of targets) {
    if (other === one || other.element.contains(one.element) || one.element.contains(other.element))
      continue;
    const { box } = other;
    const near = small(other)
      ? Math.hypot(box.x + box.width / 2 - x, box.y + box.height / 2 - y) < 24
      : Math.hypot(
          Math.max(box.left - x, 0, x - box.right),
          Math.max(box.top - y, 0, y - box.bottom),
        ) < 12;
    if (near) complaints.push(`${named(one.element)} is small and near ${named(other.element)}`);
  }
}
return complaints;
