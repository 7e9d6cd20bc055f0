// Sorting, filters, and the details of single answers; the page is complete without it.
"use strict";
const make = (name, text, parent) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const text = (cell.dataset.value ?? cell.textContent).trim();
    const value = parseFloat(text);
    return text === "" ? null : Number.isNaN(value) ? text : value;
  };
  // What has no value comes last, whichever way the rest is sorted.
  const compare = (a, b, down) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return down ? -order : order;
  };
  table.querySelectorAll("thead th").forEach((heading, column) => {
    const button = make("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      // What a paper prints stays below the measured row that it belongs to.
      const blocks = [];
      for (const row of body.rows) {
        if (row.classList.contains("printed") && blocks.length) blocks.at(-1).push(row);
        else blocks.push([row]);
      }
      const keyed = blocks.map((block) => [keyOf(block[0], column), block]);
      keyed.sort((a, b) => compare(a[0], b[0], down));
      body.append(...keyed.flatMap((pair) => pair[1]));
    });
  });
}

const list = document.getElementById("list");
const filters = document.getElementById("filters");
const matches = document.getElementById("matches");
const filter = () => {
  const wanted = [...new FormData(filters)].filter(([, value]) => value !== "");
  let count = 0;
  for (const row of list.tBodies[0].rows) {
    const fits = wanted.every(([name, value]) => name === "text"
      ? row.textContent.toLowerCase().includes(value.toLowerCase())
      : row.dataset[name].split("\n").includes(value));
    row.hidden = !fits;
    count += fits;
  }
  matches.textContent = `${count} of ${list.tBodies[0].rows.length}`;
};
filters.hidden = false;
for (const name of ["input", "change"]) filters.addEventListener(name, filter);
filters.addEventListener("submit", (event) => event.preventDefault());
filter();

const details = JSON.parse(document.getElementById("details").textContent);
const dialog = document.getElementById("detail");

const facts = (title, values, parent) => {
  const entries = Object.entries(values ?? {}).filter(([, value]) => value !== null && value !== "");
  if (!entries.length) return;
  make("h3", title, parent);
  const list = make("dl", undefined, parent);
  list.className = "facts";
  for (const [name, value] of entries) {
    make("dt", name.replaceAll("_", " "), list);
    make("dd", typeof value === "object" ? JSON.stringify(value) : String(value), list);
  }
};

const SVG = "http://www.w3.org/2000/svg";
const curve = (name, values, parent) => {
  const known = values.filter((value) => value !== null);
  if (known.length < 2) return;
  const low = Math.min(...known), high = Math.max(...known);
  const y = (value) => high === low ? 30 : 56 - 52 * (value - low) / (high - low);
  const figure = make("figure", undefined, parent);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 200 60");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name}: ${known.length} values from ${known[0]} to ${known.at(-1)}`);
  const base = document.createElementNS(SVG, "line");
  for (const [key, value] of Object.entries({ x1: 0, x2: 200, y1: 58, y2: 58 })) base.setAttribute(key, value);
  const path = document.createElementNS(SVG, "path");
  let pen = "M";
  const steps = values.map((value, index) => {
    if (value === null) { pen = "M"; return ""; }
    const step = `${pen}${(200 * index / (values.length - 1)).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
    return step;
  });
  path.setAttribute("d", steps.join(""));
  svg.append(base, path);
  figure.append(svg);
  make("figcaption", `${name.replaceAll("_", " ")}: ${known[0]} to ${known.at(-1)} (lowest ${low}, highest ${high}, ${values.length} steps)`, figure);
};

const curves = (title, courses, parent) => {
  const entries = Object.entries(courses);
  if (!entries.length) return;
  make("h3", title, parent);
  const grid = make("div", undefined, parent);
  grid.className = "curves";
  for (const [name, values] of entries) curve(name, values, grid);
};

const open = (key) => {
  const detail = details[key];
  const body = document.getElementById("detail-body");
  document.getElementById("detail-title").textContent = detail.title;
  body.replaceChildren();
  const state = make("span", detail.status, make("p", undefined, body));
  state.className = `state ${detail.status}`;
  if (detail.older) make("p", detail.older, body);
  if (detail.problem) make("pre", detail.problem, body);
  for (const [when, rates] of Object.entries(detail.rates)) facts(when, rates, body);
  facts("Found", detail.found, body);
  facts("Set options", detail.set, body);
  facts("Notes of the method", detail.notes, body);
  curves("Courses", detail.series, body);
  curves("Filters pruned in the order of the scores: oracle (uses the trigger)", detail.oracle, body);
  if (detail.log.length) {
    make("h3", "Log", body);
    make("pre", detail.log.join("\n"), body);
  }
  facts("Cost", detail.cost, body);
  facts("The model", detail.trained, body);
  make("h3", "Again", body);
  make("pre", detail.command, body);
  const more = make("details", undefined, body);
  make("summary", "All options, question and circumstances", more);
  facts("Options", detail.settings, more);
  facts("Question", detail.cell, more);
  facts("Circumstances", detail.circumstances, more);
  show();
};
const show = () => {
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
};
// The answers behind an entry of a table: the one there is, or a choice.
const choose = (keys) => {
  if (keys.length === 1) return open(keys[0]);
  const body = document.getElementById("detail-body");
  document.getElementById("detail-title").textContent = `${keys.length} answers`;
  body.replaceChildren();
  const answers = make("ul", undefined, body);
  for (const key of keys) {
    const detail = details[key];
    const words = `${detail.title}, ${detail.cell.clean_images} images, seed ${detail.cell.seed}: ${detail.status}`;
    const button = make("button", words, make("li", undefined, answers));
    button.type = "button";
    button.className = "open";
    button.addEventListener("click", () => open(key));
  }
  show();
};
list.addEventListener("click", (event) => {
  const button = event.target.closest("button.open");
  if (button) open(button.closest("tr").dataset.key);
});
document.getElementById("tables").addEventListener("click", (event) => {
  const button = event.target.closest("button.open");
  if (button) choose(button.dataset.keys.split(" "));
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
