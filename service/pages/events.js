// What happened between two scrapes, as sentences.

const PROVIDERS = { cpu: "CPU", cuda: "CUDA", tensorrt: "TensorRT" };

/** What a model runs on, as people write it. */
export function providerName(provider) {
  return PROVIDERS[provider] ?? provider;
}

function versions(series) {
  const found = new Map();
  for (const { name, labels, value } of series.values()) {
    if (name === "detector_model_info" && value === 1) found.set(`${labels.model} version ${labels.version}`, labels);
  }
  return found;
}

function total(series, wanted, label, word) {
  let sum = 0;
  for (const { name, labels, value } of series.values()) if (name === wanted && labels[label] === word) sum += value;
  return sum;
}

function one(series, wanted) {
  for (const { name, value } of series.values()) if (name === wanted) return value;
  return null;
}

/** @returns {string[]}  oldest first */
export function eventsBetween(before, after) {
  const events = [];
  const started = [one(before, "process_start_time_seconds"), one(after, "process_start_time_seconds")];
  if (started[0] !== null && started[1] !== null && started[0] !== started[1]) events.push("The service was restarted.");
  const [old, now] = [versions(before), versions(after)];
  for (const [name, { provider }] of now) if (!old.has(name)) events.push(`${name} went into service on ${providerName(provider)}.`);
  for (const name of old.keys()) if (!now.has(name)) events.push(`${name} left service.`);
  const failed = (series) => total(series, "detector_reloads_total", "outcome", "failed");
  if (failed(after) > failed(before)) events.push("A new version failed to load; the old one stays in service.");
  for (const kind of ["out_of_memory", "lost", "bad_output", "other"]) {
    const errors = (series) => total(series, "detector_device_errors_total", "kind", kind);
    if (errors(after) > errors(before)) events.push(`The device reported an error: ${kind.replaceAll("_", " ")}.`);
  }
  return events;
}
