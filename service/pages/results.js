// The panel of detections: score slider, class filter, table. Filters without asking the service again.

import { colourOf } from "./palette.js";

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function swatch(className) {
  const element = make("i", "swatch");
  element.style.setProperty("--class", colourOf(className));
  return element;
}

function countBy(detections) {
  const counts = new Map();
  for (const { class: name } of detections) counts.set(name, (counts.get(name) ?? 0) + 1);
  return counts;
}

/** "14 detections: 10 RBC, 3 WBC, 1 Platelets" */
export function summary(detections) {
  if (!detections.length) return "No detections";
  const parts = [...countBy(detections)].sort((one, other) => other[1] - one[1]).map(([name, count]) => `${count} ${name}`);
  return `${detections.length} ${detections.length === 1 ? "detection" : "detections"}: ${parts.join(", ")}`;
}

export class Results {
  #elements;
  #on;
  #detections = [];
  #hidden = new Set();
  #visible = [];

  /**
   * @param {Record<string, HTMLElement>} elements  threshold, thresholdValue, classes, chips, tablePlace, rows, count, empty
   * @param {{change: () => void, point: (index: number|null) => void}} on
   */
  constructor(elements, on) {
    this.#elements = elements;
    this.#on = on;
    elements.threshold.addEventListener("input", () => this.#filter());
    elements.rows.addEventListener("keydown", (event) => this.#walk(event));
    elements.rows.addEventListener("focusin", (event) => on.point(Number(event.target.closest("tr").dataset.index)));
    elements.rows.addEventListener("focusout", () => on.point(null));
    elements.rows.addEventListener("pointerover", (event) => event.pointerType === "mouse" && on.point(Number(event.target.closest("tr").dataset.index)));
    elements.rows.addEventListener("pointerleave", () => on.point(this.#focusedIndex()));
  }

  get threshold() {
    return Number(this.#elements.threshold.value);
  }

  /** What passes the filters, best score first. */
  get visible() {
    return this.#visible;
  }

  /** Classes that are shown, or null when none is filtered out. */
  get shownClasses() {
    if (!this.#hidden.size) return null;
    return [...countBy(this.#detections).keys()].filter((name) => !this.#hidden.has(name));
  }

  /** @param {{box: number[], class: string, score: number}[]} detections */
  show(detections) {
    this.#detections = detections.map((detection, index) => ({ ...detection, index }));
    this.#filter();
  }

  clear(text) {
    this.#detections = this.#visible = [];
    this.#elements.classes.hidden = this.#elements.tablePlace.hidden = true;
    this.#elements.count.textContent = text;
  }

  activate(index) {
    for (const row of this.#elements.rows.children) {
      const active = row.dataset.index === String(index);
      row.classList.toggle("active", active);
      row.setAttribute("aria-selected", String(active));
    }
  }

  /** Bring the row of one detection into view and focus it. */
  focus(index) {
    const row = [...this.#elements.rows.children].find((one) => one.dataset.index === String(index));
    row?.focus({ preventScroll: true });
    row?.scrollIntoView({ block: "nearest" });
  }

  #focusedIndex() {
    const row = document.activeElement?.closest?.("tr[data-index]");
    return row ? Number(row.dataset.index) : null;
  }

  #filter() {
    const threshold = this.threshold;
    const above = this.#detections.filter(({ score }) => score >= threshold);
    this.#visible = above.filter(({ class: name }) => !this.#hidden.has(name));
    this.#elements.thresholdValue.textContent = threshold.toFixed(2);
    this.#drawChips(countBy(above));
    this.#drawRows();
    this.#on.change();
  }

  /** Chips stay in place while the slider moves: classes come from all detections, counts from those above the score. */
  #drawChips(counts) {
    const { chips, classes } = this.#elements;
    const names = [...countBy(this.#detections).keys()].sort((one, other) => one.localeCompare(other));
    classes.hidden = names.length === 0;
    if (names.join("\n") !== [...chips.children].map((chip) => chip.dataset.name).join("\n")) {
      chips.replaceChildren(...names.map((name) => this.#chip(name)));
    }
    for (const chip of chips.children) chip.querySelector("span").textContent = String(counts.get(chip.dataset.name) ?? 0);
  }

  #chip(name) {
    const box = make("input");
    box.type = "checkbox";
    box.checked = !this.#hidden.has(name);
    box.addEventListener("change", () => {
      if (box.checked) this.#hidden.delete(name);
      else this.#hidden.add(name);
      this.#filter();
    });
    const label = make("label", "", box, swatch(name), make("b", "", name), make("span"));
    label.dataset.name = name;
    return label;
  }

  #drawRows() {
    const { rows, count, empty, tablePlace } = this.#elements;
    const focused = this.#focusedIndex();
    rows.replaceChildren(...this.#visible.map((detection, at) => this.#row(detection, at === 0)));
    if (focused !== null) this.focus(focused);
    const number = this.#visible.length;
    tablePlace.hidden = number === 0;
    empty.hidden = number > 0;
    empty.textContent = this.#detections.length
      ? `All ${this.#detections.length} detections are filtered out. Lower the score or show more classes.`
      : "The detector found nothing in this picture.";
    count.textContent = number === 1 ? "1 object" : `${number} objects`;
  }

  #row(detection, first) {
    const [x1, y1, x2, y2] = detection.box.map(Math.round);
    const row = make(
      "tr", "",
      make("td", "", swatch(detection.class), detection.class),
      make("td", "number", detection.score.toFixed(2)),
      make("td", "number", `${x1}, ${y1}`),
      make("td", "number", `${x2 - x1} × ${y2 - y1}`),
    );
    row.dataset.index = detection.index;
    row.tabIndex = first ? 0 : -1;
    row.setAttribute("aria-selected", "false");
    return row;
  }

  #walk(event) {
    const row = event.target.closest("tr");
    const { firstElementChild: first, lastElementChild: last } = this.#elements.rows;
    const next = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling, Home: first, End: last }[event.key];
    if (event.key === "Escape") row.blur();
    if (!next) return;
    event.preventDefault();
    for (const one of this.#elements.rows.children) one.tabIndex = one === next ? 0 : -1;
    next.focus();
  }
}
