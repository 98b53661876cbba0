// Talks to the service. Every failure leaves here as a ServiceError whose message is a sentence for a person.

const DOWN = "The service does not answer. It may be restarting, or the network is down.";

let apiKey = "";

/** Use `key` for every later call; it lives in this page only. */
export function useKey(key) {
  apiKey = key;
}

export class ServiceError extends Error {
  constructor(sentence, { status = 0, code = "", retryAfterS = null, requestId = "" } = {}) {
    super(sentence);
    Object.assign(this, { status, code, retryAfterS, requestId });
  }

  /** Whether the same request may well succeed a little later. */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status === 503;
  }
}

/** Details may come without capital and full stop; people read them as sentences. */
function asSentence(text) {
  return text.replace(/^[a-z]/, (letter) => letter.toUpperCase()).replace(/[^.!?]$/, "$&.");
}

/** Without a body of problem+json (a proxy's page, say) the status is all there is. */
async function errorFrom(response) {
  const problem = await response.json().catch(() => ({}));
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ServiceError(asSentence(problem.detail || problem.title || `The service answered ${response.status} ${response.statusText}`), {
    status: response.status,
    code: problem.code ?? "",
    retryAfterS: Number.isFinite(retryAfter) ? retryAfter : null,
    requestId: problem.request_id ?? response.headers.get("X-Request-ID") ?? "",
  });
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(DOWN);
  }
  if (!response.ok) throw await errorFrom(response);
  return response;
}

/**
 * Detect once with the lowest score the page can show; the slider then filters without asking again.
 *
 * @param {Blob} picture  an encoded picture
 * @param {{threshold: number, model?: string, signal?: AbortSignal}} options
 * @returns {Promise<{answer: object, roundTripMs: number}>}
 */
export async function detect(picture, { threshold, model, signal }) {
  const query = new URLSearchParams({ score_threshold: String(threshold) });
  if (model) query.set("model", model);
  const started = performance.now();
  const response = await call(`v1/detect?${query}`, {
    method: "POST",
    body: picture,
    headers: { "Content-Type": picture.type || "application/octet-stream" },
    signal,
  });
  const answer = await response.json();
  return { answer, roundTripMs: performance.now() - started };
}

/** @returns {Promise<{name: string, versions: {name: string, version: string, state: string}[]}[]>} */
export async function listModels() {
  const response = await call("v1/models");
  return (await response.json()).models;
}

/** Resolves after `seconds`, telling `tick` how many are left; rejects with AbortError when `signal` fires. */
export function countdown(seconds, tick, signal) {
  return new Promise((resolve, reject) => {
    let left = Math.max(1, Math.ceil(seconds));
    tick(left);
    const timer = setInterval(() => {
      left -= 1;
      if (left > 0) return tick(left);
      clearInterval(timer);
      resolve();
    }, 1000);
    signal?.addEventListener("abort", () => {
      clearInterval(timer);
      reject(new DOMException("cancelled", "AbortError"));
    });
  });
}
