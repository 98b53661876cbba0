// Prometheus exposition text: parsed, and turned into rates, means and quantiles from differences of counters.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const GROWS = /_(?:total|bucket|sum|count)$/;

function number(text) {
  if (text === "+Inf" || text === "Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}

function unescaped(text) {
  return text.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
}

/**
 * @param {string} text  the body of /metrics
 * @returns {Map<string, {name: string, labels: Record<string, string>, value: number}>}  by series
 */
export function parseMetrics(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const [, name, rawLabels = "", value] = match;
    const labels = {};
    for (const [, key, raw] of rawLabels.matchAll(LABEL)) labels[key] = unescaped(raw);
    series.set(`${name}{${rawLabels}}`, { name, labels, value: number(value) });
  }
  return series;
}

/**
 * The q-quantile of a histogram, linear inside its bucket.
 *
 * @param {[number, number][]} buckets  [upper bound, cumulative count], the last bound Infinity
 * @returns {{value: number, beyond: boolean} | null}  null without observations; beyond: the value lies above the last finite bound
 */
export function quantile(q, buckets) {
  const sorted = [...buckets].sort((one, other) => one[0] - other[0]);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null;
  const rank = q * total;
  const at = sorted.findIndex(([, count]) => count >= rank && count > 0);
  const [lower, below] = at > 0 ? sorted[at - 1] : [0, 0];
  const [upper, count] = sorted[at];
  if (upper === Infinity) return { value: lower, beyond: true };
  return { value: lower + ((upper - lower) * (rank - below)) / (count - below), beyond: false };
}

function matches(labels, where) {
  return Object.entries(where).every(([name, wanted]) => (wanted instanceof RegExp ? wanted.test(labels[name] ?? "") : labels[name] === wanted));
}

/** What the counters did in a stretch of time. */
class Window {
  #layout;
  #grown = new Map();

  constructor(steps, layout) {
    this.#layout = layout;
    this.seconds = steps.reduce((sum, step) => sum + step.seconds, 0);
    for (const step of steps) {
      for (const [key, growth] of step.grown) this.#grown.set(key, (this.#grown.get(key) ?? 0) + growth);
    }
  }

  *#select(name, where) {
    for (const [key, series] of this.#layout) {
      if (series.name === name && matches(series.labels, where)) yield [series.labels, this.#grown.get(key) ?? 0];
    }
  }

  increase(name, where = {}) {
    let sum = 0;
    for (const [, growth] of this.#select(name, where)) sum += growth;
    return sum;
  }

  /** Per second, or null where nothing was measured yet. */
  rate(name, where = {}) {
    return this.seconds > 0 ? this.increase(name, where) / this.seconds : null;
  }

  mean(histogram, where = {}) {
    const count = this.increase(`${histogram}_count`, where);
    return count > 0 ? this.increase(`${histogram}_sum`, where) / count : null;
  }

  /** [upper bound, cumulative count] in rising order, summed over the series that match. */
  buckets(histogram, where = {}) {
    const counts = new Map();
    for (const [labels, growth] of this.#select(`${histogram}_bucket`, where)) {
      const bound = number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + growth);
    }
    return [...counts].sort((one, other) => one[0] - other[0]);
  }

  quantile(q, histogram, where = {}) {
    return quantile(q, this.buckets(histogram, where));
  }
}

/** Scrapes of the last `keepS` seconds, as steps between one scrape and the next. A counter that fell was restarted from 0. */
export class History {
  #steps = [];
  #keepS;
  #previous = null;

  constructor(keepS) {
    this.#keepS = keepS;
  }

  /** The newest scrape. */
  get series() {
    return this.#previous?.series ?? new Map();
  }

  /** @param {number} at  seconds */
  add(at, series) {
    if (this.#previous) this.#steps.push({ at, seconds: at - this.#previous.at, grown: this.#growth(series) });
    this.#previous = { at, series };
    while (this.#steps.length && this.#steps[0].at < at - this.#keepS) this.#steps.shift();
  }

  #growth(series) {
    const grown = new Map();
    for (const [key, { name, value }] of series) {
      if (!GROWS.test(name)) continue;
      const before = this.#previous.series.get(key)?.value ?? 0;
      const growth = value >= before ? value - before : value;
      if (growth) grown.set(key, growth);
    }
    return grown;
  }

  /** The steps that ended in the last `seconds` before the newest scrape. */
  window(seconds) {
    const from = (this.#previous?.at ?? 0) - seconds + 1e-3;
    return new Window(this.#steps.filter(({ at }) => at > from), this.series);
  }

  /** The sum of a gauge over its series, or null where it is missing. */
  gauge(name, where = {}) {
    const found = this.rows(name).filter(({ labels }) => matches(labels, where));
    return found.length ? found.reduce((sum, { value }) => sum + value, 0) : null;
  }

  /** Every series of a metric in the newest scrape. */
  rows(name) {
    return [...this.series.values()].filter((series) => series.name === name);
  }
}
