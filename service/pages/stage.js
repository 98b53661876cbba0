// The picture and the boxes over it. Boxes are drawn by position in percent, so that they follow any size of the picture.

import { colourOf, inkOn } from "./palette.js";
import { paint } from "./picture.js";

const LABEL_WIDTH_PX = 80; // room that a label needs; with more boxes than fit side by side only the active one carries its label
const ENLARGE = 3; // small pictures grow up to this

function area([x1, y1, x2, y2]) {
  return (x2 - x1) * (y2 - y1);
}

function place(element, [x1, y1, x2, y2], frame) {
  const percent = (value, of) => `${((100 * value) / of).toFixed(3)}%`;
  element.style.left = percent(x1, frame.width);
  element.style.top = percent(y1, frame.height);
  element.style.width = percent(x2 - x1, frame.width);
  element.style.height = percent(y2 - y1, frame.height);
}

export class Stage {
  #elements;
  #frame = { width: 1, height: 1 };
  #visible = [];

  /**
   * @param {{frame: HTMLElement, canvas: HTMLCanvasElement, boxes: HTMLElement}} elements
   * @param {{point: (index: number|null) => void, pick: (index: number|null) => void}} on  index of the detection under the pointer
   */
  constructor(elements, on) {
    this.#elements = elements;
    elements.frame.addEventListener("pointermove", (event) => event.pointerType === "mouse" && on.point(this.#under(event)));
    elements.frame.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && on.point(null));
    elements.frame.addEventListener("click", (event) => on.pick(this.#under(event)));
  }

  /** Show `bitmap`, or an empty sheet of `frame`'s size where the browser cannot show the picture's type. */
  showPicture(bitmap, frame) {
    const { canvas } = this.#elements;
    if (bitmap) paint(canvas, bitmap);
    else [canvas.width, canvas.height] = [frame.width, frame.height];
    this.#setFrame(bitmap ?? frame);
    this.clear();
  }

  #setFrame({ width, height }) {
    const { frame } = this.#elements;
    this.#frame = { width, height };
    frame.hidden = false;
    frame.style.setProperty("--aspect", String(width / height));
    frame.style.maxWidth = `${width * ENLARGE}px`;
  }

  hide() {
    this.#elements.frame.hidden = true;
    this.clear();
  }

  clear() {
    this.#elements.boxes.replaceChildren();
    this.#visible = [];
  }

  /** @param {{index: number, box: number[], class: string, score: number}[]} visible  boxes in pixels of `frame` */
  showBoxes(visible, frame) {
    this.#frame = frame;
    this.#visible = visible;
    this.#elements.boxes.classList.toggle("labelled", visible.length * LABEL_WIDTH_PX <= this.#elements.frame.clientWidth);
    this.#elements.boxes.replaceChildren(...visible.map((detection) => this.#boxElement(detection)));
  }

  #boxElement(detection) {
    const colour = colourOf(detection.class);
    const element = document.createElement("div");
    element.className = "box";
    element.classList.toggle("below", detection.box[1] < this.#frame.height * 0.06);
    element.classList.toggle("leftward", detection.box[0] > this.#frame.width * 0.8);
    element.dataset.index = detection.index;
    element.style.setProperty("--class", colour);
    element.style.setProperty("--ink", inkOn(colour));
    place(element, detection.box, this.#frame);
    const label = document.createElement("span");
    label.textContent = `${detection.class} ${detection.score.toFixed(2)}`;
    element.append(label);
    return element;
  }

  activate(index) {
    this.#elements.boxes.classList.toggle("focused", index !== null);
    for (const element of this.#elements.boxes.children) element.classList.toggle("active", element.dataset.index === String(index));
  }

  describe(sentence) {
    this.#elements.canvas.setAttribute("aria-label", sentence);
  }

  /** The smallest box under the pointer, so that a cell inside a larger box can be reached. */
  #under(event) {
    const bounds = this.#elements.frame.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * this.#frame.width;
    const y = ((event.clientY - bounds.top) / bounds.height) * this.#frame.height;
    const hits = this.#visible.filter(({ box: [x1, y1, x2, y2] }) => x >= x1 && x <= x2 && y >= y1 && y <= y2);
    hits.sort((one, other) => area(one.box) - area(other.box));
    return hits.length ? hits[0].index : null;
  }
}
