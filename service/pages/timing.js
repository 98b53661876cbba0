// Where the time of one answer went: a bar of its parts and their milliseconds.

const NAMES = { decode: "Decode", queue: "Queue", infer: "Infer", rest: "Everything else" };

/** The parts in milliseconds; what the service does not name (reading, answering) is the rest. */
export function timingParts(timing) {
  const known = { decode: timing.decode, queue: timing.queue, infer: timing.infer };
  const rest = timing.total - known.decode - known.queue - known.infer;
  return { ...known, rest: Math.max(0, rest) };
}

function milliseconds(value) {
  return `${value < 100 ? value.toFixed(1) : Math.round(value)} ms`;
}

/** Draw `timing_ms` of an answer into `elements` (bar, legend, total). */
export function showTiming(elements, timing, roundTripMs) {
  const parts = Object.entries(timingParts(timing));
  elements.bar.replaceChildren(
    ...parts.map(([part, value]) => {
      const segment = document.createElement("span");
      segment.className = `part-${part}`;
      segment.style.flexGrow = String(value);
      segment.title = `${NAMES[part]} ${milliseconds(value)}`;
      return segment;
    }),
  );
  elements.legend.replaceChildren(
    ...parts.map(([part, value]) => {
      const [row, mark, name, time] = ["div", "i", "dt", "dd"].map((tag) => document.createElement(tag));
      mark.className = `part-${part}`;
      mark.setAttribute("aria-hidden", "true");
      name.append(mark, NAMES[part]);
      time.textContent = milliseconds(value);
      row.append(name, time);
      return row;
    }),
  );
  elements.total.textContent = `${milliseconds(timing.total)} in the service, ${milliseconds(roundTripMs)} with the way there and back`;
}
