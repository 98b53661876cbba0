// The operations page: reads /metrics every two seconds and shows what changed. It knows only what it has seen since it was opened.

import { eventsBetween, providerName } from "./events.js";
import { History, parseMetrics } from "./prometheus.js";
import { Sparkline } from "./sparkline.js";

const EVERY_MS = 2000;
const GIVE_UP_MS = 4000;
const NOW_S = 10;
const MINUTE_S = 60;
const SPAN_S = 300;
const EVENTS_KEPT = 100;

const LATENCY = "detector_http_request_duration_seconds";
const ANSWERED = { route: /detect|infer/, status: /^2/ };
const STAGE = "detector_stage_duration_seconds";
const STAGES = ["read", "decode", "queue", "assemble", "infer", "postprocess", "serialise"];
/** The client's: each was answered with what to do. Who has no key is refused before there is a picture. */
const PICTURE_MISTAKES = /^(bad_image|bad_request|too_large|too_many_pixels)$/;
const MISTAKES = new RegExp(`${PICTURE_MISTAKES.source}|^unauthorised$`);
const REASONS = [
  ["detector_rejected_total", "reason", "refused: "],
  ["detector_cancelled_total", "phase", "client left while "],
  ["detector_device_errors_total", "kind", "device: "],
];

const $ = (id) => document.getElementById(id);
const history = new History(SPAN_S + 30);
const points = [];
let lastSeen = null;
let down = false;

// numbers as people read them

const dash = "–";
const seconds = () => performance.now() / 1000;

function decimal(value) {
  if (value === null || value === undefined) return dash;
  return value >= 100 ? value.toFixed(0) : value >= 10 || value === 0 ? value.toFixed(1) : value.toFixed(2);
}

function milliseconds(value) {
  if (value === null) return dash;
  const ms = value * 1000;
  return ms >= 100 ? ms.toFixed(0) : ms >= 1 ? ms.toFixed(1) : ms.toFixed(2);
}

function quantileMs(found) {
  if (!found) return dash;
  return `${found.beyond ? "> " : ""}${milliseconds(found.value)}`;
}

function span(value) {
  if (value === null) return dash;
  return value < 1 ? `${Math.round(value * 1000)} ms` : value < 120 ? `${value.toFixed(1)} s` : longSpan(value);
}

function longSpan(value) {
  const [days, hours, minutes] = [Math.floor(value / 86400), Math.floor(value / 3600) % 24, Math.floor(value / 60) % 60];
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : `${minutes} min`;
}

/** How much of the wanted time was really watched: the page may be younger than that. */
function covered(window, wantedS) {
  const watched = Math.min(window.seconds, wantedS);
  return watched < wantedS - 5 && watched < 100 ? `${Math.round(watched)} s` : `${Math.round(watched / 60)} min`;
}

// drawing

const lines = [
  new Sparkline($("fps-line"), { title: "Frames per second", spanS: SPAN_S, lines: [(p) => p.fps, (p) => p.offered], format: decimal, least: 1 }),
  new Sparkline($("latency-line"), {
    title: "Latency p95", spanS: SPAN_S, lines: [(p) => p.p95, (p) => p.p50], format: (value) => `${milliseconds(value)} ms`, least: 0.01,
  }),
  new Sparkline($("queue-line"), { title: "Images waiting", spanS: SPAN_S, lines: [(p) => p.depth], format: (value) => value.toFixed(0), least: 4 }),
  new Sparkline($("refused-line"), { title: "Not answered", spanS: SPAN_S, lines: [(p) => p.refused], format: (value) => `${decimal(value)} %`, least: 1 }),
];

function row(...cells) {
  const element = document.createElement("tr");
  element.append(
    ...cells.map(([content, className = ""], at) => {
      const cell = document.createElement(at === 0 ? "th" : "td");
      if (at === 0) cell.scope = "row";
      cell.className = className;
      cell.append(content);
      return cell;
    }),
  );
  return element;
}

function bar(share) {
  const [track, fill] = [document.createElement("div"), document.createElement("i")];
  track.className = "meter";
  track.setAttribute("aria-hidden", "true");
  fill.style.width = `${(100 * share).toFixed(1)}%`;
  track.append(fill);
  return track;
}

function pair(name, value) {
  const [group, term, detail] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
  term.textContent = name;
  detail.textContent = value;
  group.append(term, detail);
  return group;
}

// measuring

function outcomes(window) {
  const by = (outcome) => window.increase("detector_images_total", { outcome });
  const [ok, rejected, failed, cancelled] = ["ok", "rejected", "failed", "cancelled"].map(by);
  const all = ok + rejected + failed + cancelled;
  const mistakes = Math.min(rejected, window.increase("detector_rejected_total", { reason: PICTURE_MISTAKES }));
  return { ok, refused: rejected - mistakes, mistakes, failed, cancelled, all, lost: all ? (100 * (all - ok - mistakes)) / all : null };
}

function measure(at) {
  const now = history.window(NOW_S);
  const counts = outcomes(now);
  const measured = now.seconds > 0;
  return {
    at,
    fps: measured ? counts.ok / now.seconds : null,
    offered: measured ? counts.all / now.seconds : null,
    p50: now.quantile(0.5, LATENCY, ANSWERED)?.value ?? null,
    p95: now.quantile(0.95, LATENCY, ANSWERED)?.value ?? null,
    depth: history.gauge("detector_queue_depth"),
    refused: measured ? (counts.lost ?? 0) : null,
  };
}

function showTiles(point) {
  const minute = history.window(MINUTE_S);
  const longest = history.window(SPAN_S);
  const lost = outcomes(minute);
  const inflight = history.gauge("detector_inflight_requests");
  const perSecond = (count) => (minute.seconds > 0 ? `${decimal(count / minute.seconds)} /s` : dash);
  const texts = {
    fps: decimal(point.fps),
    "fps-1m-span": covered(minute, MINUTE_S),
    "fps-5m-span": covered(longest, SPAN_S),
    "fps-1m": decimal(minute.rate("detector_images_total", { outcome: "ok" })),
    "fps-5m": decimal(longest.rate("detector_images_total", { outcome: "ok" })),
    offered: decimal(point.offered),
    p95: quantileMs(history.window(NOW_S).quantile(0.95, LATENCY, ANSWERED)),
    p50: `${quantileMs(minute.quantile(0.5, LATENCY, ANSWERED))} ms`,
    p99: `${quantileMs(minute.quantile(0.99, LATENCY, ANSWERED))} ms`,
    inflight: inflight === null ? dash : Math.max(0, inflight - 1), // less the scrape itself
    depth: point.depth ?? dash,
    oldest: span(history.gauge("detector_queue_oldest_age_seconds")),
    "queue-p95": `${quantileMs(minute.quantile(0.95, STAGE, { stage: "queue" }))} ms`,
    refused: decimal(point.refused),
    "refused-rate": perSecond(lost.refused),
    "failed-rate": perSecond(lost.failed),
    "cancelled-rate": perSecond(lost.cancelled),
    "mistakes-rate": perSecond(lost.mistakes),
  };
  for (const [id, text] of Object.entries(texts)) $(id).textContent = String(text).replace(`${dash} ms`, dash);
  $("fps-5m").parentElement.hidden = longest.seconds <= minute.seconds;
  $("refused").parentElement.classList.toggle("bad", point.refused >= 1);
}

function showStages() {
  const minute = history.window(MINUTE_S);
  const means = STAGES.map((stage) => minute.mean(STAGE, { stage }));
  const longest = Math.max(...means.map((mean) => mean ?? 0), 1e-9);
  $("stages").replaceChildren(
    ...STAGES.map((stage, at) =>
      row([stage], [bar((means[at] ?? 0) / longest), "track"], [milliseconds(means[at]), "number"], [quantileMs(minute.quantile(0.95, STAGE, { stage })), "number"]),
    ),
  );
}

function showBatches() {
  const minute = history.window(MINUTE_S);
  const buckets = minute.buckets("detector_batch_size");
  const sizes = buckets.map(([bound, count], at) => {
    const below = at ? buckets[at - 1] : [0, 0];
    const from = below[0] + 1;
    const name = bound === Infinity ? `over ${below[0]}` : from >= bound ? String(bound) : `${from}–${bound}`;
    return [name, count - below[1]];
  });
  const used = sizes.filter(([name, count], at) => at < 5 || count > 0);
  const most = Math.max(...sizes.map(([, count]) => count), 1);
  $("batches").replaceChildren(...used.map(([name, count]) => row([name], [bar(count / most), "track"], [String(count), "number"])));
  const [mean, padding] = [minute.mean("detector_batch_size"), minute.mean("detector_batch_padding_ratio")];
  $("batch-mean").textContent = mean === null ? "none in the last minute" : `mean ${decimal(mean)}, ${Math.round(100 * (padding ?? 0))} % padding`;
}

function showReasons() {
  const minute = history.window(MINUTE_S);
  const found = REASONS.flatMap(([metric, label, prefix]) =>
    history.rows(metric).map(({ labels, value }) => {
      const mistake = label === "reason" && MISTAKES.test(labels.reason);
      const name = (mistake ? "client error: " : prefix) + labels[label].replaceAll("_", " ");
      return [name, minute.increase(metric, { [label]: labels[label] }), value, !mistake];
    }),
  ).filter(([, , total]) => total > 0);
  found.sort((one, other) => other[1] - one[1] || other[2] - one[2]);
  $("reasons").replaceChildren(...found.map(([name, recent, total, ours]) => row([name], [String(recent), recent && ours ? "number bad" : "number"], [String(total), "number"])));
  $("reasons").parentElement.hidden = found.length === 0;
  $("no-reasons").hidden = found.length > 0;
}

function showModels() {
  const models = history.rows("detector_model_info").filter(({ value }) => value === 1);
  $("models").replaceChildren(
    ...models.map(({ labels }) => {
      const print = Object.assign(document.createElement("code"), { textContent: labels.sha256.slice(0, 12), title: labels.sha256 });
      return row([labels.model], [labels.version], [providerName(labels.provider)], [print]);
    }),
  );
  const started = history.gauge("process_start_time_seconds");
  const cpu = history.window(NOW_S).rate("process_cpu_seconds_total");
  const memory = history.gauge("process_resident_memory_bytes");
  const lag = history.window(MINUTE_S).quantile(0.99, "detector_event_loop_lag_seconds");
  const process = [
    ["up for", started === null ? null : longSpan(Date.now() / 1000 - started)],
    ["processor", cpu === null ? null : `${decimal(cpu)} cores`],
    ["memory", memory === null ? null : `${Math.round(memory / 2 ** 20)} MiB`],
    ["event loop lag p99", lag === null ? null : `${quantileMs(lag)} ms`],
  ];
  $("process").replaceChildren(...process.filter(([, value]) => value !== null).map(([name, value]) => pair(name, value)));
}

function addEvents(sentences) {
  for (const sentence of sentences) {
    const [item, time] = [document.createElement("li"), document.createElement("time")];
    const now = new Date();
    time.dateTime = now.toISOString();
    time.textContent = now.toLocaleTimeString([], { hour12: false });
    item.append(time, sentence);
    $("events").prepend(item);
  }
  while ($("events").children.length > EVENTS_KEPT) $("events").lastElementChild.remove();
}

// polling

function tell(sentence) {
  const notice = Object.assign(document.createElement("p"), { className: "notice", textContent: sentence });
  if ($("notice-place").textContent !== (sentence ?? "")) $("notice-place").replaceChildren(...(sentence ? [notice] : []));
}

function showAge() {
  if (lastSeen === null) return;
  const age = Math.round(seconds() - lastSeen.at);
  $("seen").textContent = down ? `Last seen ${lastSeen.clock}, ${age < 120 ? `${age} s` : longSpan(age)} ago` : age < 3 ? "Live" : `Live, ${age} s ago`;
}

function setDown(is, sentence = "") {
  down = is;
  $("dashboard").classList.toggle("stale", is);
  $("pulse").dataset.state = is ? "down" : "live";
  tell(is ? sentence : null);
}

function onScrape(series) {
  const at = seconds();
  const events = lastSeen === null ? ["This page began to watch."] : eventsBetween(history.series, series);
  if (down && lastSeen) events.unshift("The service answers again.");
  history.add(at, series);
  lastSeen = { at, clock: new Date().toLocaleTimeString([], { hour12: false }) };
  setDown(false);
  points.push(measure(at));
  addEvents(events);
  showTiles(points.at(-1));
  for (const show of [showStages, showBatches, showReasons, showModels]) show();
  if (!history.rows("detector_model_info").some(({ value }) => value === 1)) tell("No model is in service yet, so every picture is refused.");
  document.title = `${decimal(points.at(-1).fps)} fps · faster-rcnn-service`;
}

function onSilence(why) {
  if (!down) addEvents([`The service stopped answering: ${why}.`]);
  const since = lastSeen ? `The numbers below are those of ${lastSeen.clock}.` : "This page has not reached it yet.";
  setDown(true, `The service does not answer (${why}). ${since} Trying every ${EVERY_MS / 1000} seconds.`);
  points.push({ at: seconds(), fps: null, offered: null, p50: null, p95: null, depth: null, refused: null });
  if (!lastSeen) $("seen").textContent = "Not reached";
  document.title = "No answer · faster-rcnn-service";
}

async function scrape() {
  const response = await fetch("metrics", { signal: AbortSignal.timeout(GIVE_UP_MS), cache: "no-store", headers: { Accept: "text/plain" } });
  if (response.status === 404) throw new Error("no /metrics on this port; it may have its own, DETECTOR_OPERATIONS_PORT");
  if (!response.ok) throw new Error(`/metrics answered ${response.status}`);
  return parseMetrics(await response.text());
}

async function poll() {
  let series = null;
  try {
    series = await scrape();
  } catch (error) {
    onSilence(error instanceof TypeError ? "no connection" : error.name === "TimeoutError" ? "no answer in time" : error.message);
  }
  if (series) onScrape(series);
  while (points.length && points[0].at < seconds() - SPAN_S) points.shift();
  for (const line of lines) line.show(points, seconds());
  showAge();
  setTimeout(poll, EVERY_MS);
}

setInterval(showAge, 1000);
poll();
