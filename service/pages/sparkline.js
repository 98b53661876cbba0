// A line over the last minutes on a canvas: area under the first line, gaps where nothing is known, the value under the pointer.

const PAD = { top: 18, right: 2, bottom: 4, left: 2 };

/** The next of 1, 2, 5, 10, 20 ... at or above `value`: an upper end that does not twitch. */
export function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((end) => end >= value * 0.999);
}

/** Runs of neighbouring points that have a value. */
function stretches(points, pick) {
  const runs = [[]];
  for (const point of points) {
    if (pick(point) === null) runs.push([]);
    else runs.at(-1).push(point);
  }
  return runs.filter((run) => run.length);
}

export class Sparkline {
  #canvas;
  #options;
  #points = [];
  #to = 0;
  #pointer = null;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{title: string, spanS: number, lines: ((point: object) => number|null)[], format: (value: number) => string, least?: number}} options
   *   the first line is the main one; `least` is the smallest upper end of the axis
   */
  constructor(canvas, options) {
    this.#canvas = canvas;
    this.#options = options;
    canvas.setAttribute("role", "img");
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** @param {{at: number}[]} points  rising in time, seconds */
  show(points, to) {
    this.#points = points.filter(({ at }) => at >= to - this.#options.spanS);
    this.#to = to;
    this.#describe();
    this.draw();
  }

  #describe() {
    const { title, lines, format, spanS } = this.#options;
    const values = this.#points.map(lines[0]).filter((value) => value !== null);
    const text = values.length ? `now ${format(values.at(-1))}, highest ${format(Math.max(...values))}` : "nothing measured";
    this.#canvas.setAttribute("aria-label", `${title} over the last ${Math.round(spanS / 60)} minutes: ${text}`);
  }

  #point(x) {
    this.#pointer = x;
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    const pen = this.#canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    const plot = this.#plot(width, height);
    this.#drawGrid(pen, plot, colour, style.fontFamily);
    this.#options.lines.forEach((pick, order) => this.#drawLine(pen, plot, pick, order, colour));
    if (this.#pointer !== null) this.#drawReading(pen, plot, colour, style.fontFamily);
  }

  #plot(width, height) {
    const { lines, least = 0, spanS } = this.#options;
    const values = this.#points.flatMap((point) => lines.map((pick) => pick(point) ?? 0));
    const top = niceCeiling(Math.max(least, ...values));
    const [left, right] = [PAD.left, width - PAD.right];
    const [high, low] = [PAD.top, height - PAD.bottom];
    return {
      width, height, left, right, high, low, top,
      x: (at) => right - ((this.#to - at) / spanS) * (right - left),
      y: (value) => low - (value / top) * (low - high),
    };
  }

  #drawGrid(pen, plot, colour, family) {
    pen.font = `11px ${family}`;
    pen.fillStyle = colour("--muted");
    if (this.#points.length) pen.fillText(this.#options.format(plot.top).replace(/\.0+(?!\d)/, ""), plot.left, plot.high - 5);
    pen.strokeStyle = colour("--line");
    pen.lineWidth = 1;
    pen.beginPath();
    for (const y of [plot.high, plot.low]) {
      pen.moveTo(plot.left, Math.round(y) + 0.5);
      pen.lineTo(plot.right, Math.round(y) + 0.5);
    }
    pen.stroke();
  }

  #drawLine(pen, plot, pick, order, colour) {
    const main = order === 0;
    pen.strokeStyle = pen.fillStyle = main ? colour("--accent") : colour("--muted");
    pen.lineWidth = main ? 1.75 : 1;
    pen.lineJoin = "round";
    for (const run of stretches(this.#points, pick)) {
      const [first, last] = [run[0], run.at(-1)];
      pen.beginPath();
      for (const point of run) pen.lineTo(plot.x(point.at), plot.y(pick(point)));
      if (run.length === 1) pen.lineTo(plot.x(first.at) + 1, plot.y(pick(first)));
      pen.stroke();
      if (!main) continue;
      pen.lineTo(plot.x(last.at), plot.low);
      pen.lineTo(plot.x(first.at), plot.low);
      pen.globalAlpha = 0.12;
      pen.fill();
      pen.globalAlpha = 1;
    }
  }

  #nearest(plot) {
    const distance = ({ at }) => Math.abs(plot.x(at) - this.#pointer);
    return this.#points.reduce((best, point) => (best && distance(best) <= distance(point) ? best : point), null);
  }

  #drawReading(pen, plot, colour, family) {
    const point = this.#nearest(plot);
    if (!point) return;
    const x = plot.x(point.at);
    pen.fillStyle = colour("--line-strong");
    pen.fillRect(x, plot.high, 1, plot.low - plot.high);
    const { format, lines } = this.#options;
    const value = lines[0](point);
    const text = `${value === null ? "unknown" : format(value)} · ${Math.round(this.#to - point.at)} s ago`;
    pen.font = `12px ${family}`;
    const width = pen.measureText(text).width;
    const left = Math.max(plot.left, Math.min(x - width / 2, plot.right - width - 10));
    pen.fillStyle = colour("--surface");
    pen.fillRect(left, plot.high - 17, width + 10, 17);
    pen.fillStyle = colour("--text");
    pen.fillText(text, left + 5, plot.high - 5);
  }
}
