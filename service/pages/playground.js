// The playground: takes a picture from wherever it comes, asks the service once, and lets a person look at the answer.

import { ServiceError, countdown, detect, listModels, useKey } from "./api.js";
import { Camera, decodeUpright, drawn, save } from "./picture.js";
import { Results, summary } from "./results.js";
import { copyText, curlSnippet, pythonSnippet } from "./snippets.js";
import { Stage } from "./stage.js";
import { showTiming } from "./timing.js";

const LOWEST_SCORE = 0.05; // the graph keeps everything above it; the slider starts there
const RETRIES = 5;
const FIRST_WAIT_S = 1; // where an overloaded service names no time

const $ = (id) => document.getElementById(id);

/** What is on the screen: the picture that was sent, and the answer to it. */
const shown = { blob: null, name: "", answer: null, language: "curl", needsKey: false };
let running = new AbortController();
let camera = null;

const stage = new Stage(
  { frame: $("frame"), canvas: $("picture"), boxes: $("boxes") },
  { point: activate, pick: (index) => (index === null ? activate(null) : results.focus(index)) },
);

const results = new Results(
  {
    threshold: $("threshold"), thresholdValue: $("threshold-value"), classes: $("classes"), chips: $("chips"),
    tablePlace: $("table-place"), rows: $("rows"), count: $("count"), empty: $("empty"),
  },
  { change: redraw, point: activate },
);

function activate(index) {
  stage.activate(index);
  results.activate(index);
}

function redraw() {
  if (!shown.answer) return;
  stage.showBoxes(results.visible, shown.answer.image);
  stage.describe(`${shown.name}. ${summary(results.visible)}.`);
  drawSnippet();
}

// notices

function tell(sentence, { kind = "", small = "", actions = [] } = {}) {
  const notice = document.createElement("div");
  notice.className = `notice ${kind}`;
  const text = document.createElement("p");
  text.append(sentence);
  if (small) text.append(Object.assign(document.createElement("small"), { textContent: small }));
  notice.append(text, ...actions);
  $("notice-place").replaceChildren(notice);
  return text.firstChild;
}

function button(label, action) {
  const element = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  element.addEventListener("click", action);
  return element;
}

function askForKey(error) {
  const field = Object.assign(document.createElement("input"), { type: "password", autocomplete: "off" });
  field.setAttribute("aria-label", "API key");
  const use = button("Use this key", () => {
    useKey(field.value);
    shown.needsKey = true;
    run(shown.blob, shown.name);
    showModels();
  });
  field.addEventListener("keydown", (event) => event.key === "Enter" && use.click());
  tell(error.message, { actions: [field, use] });
  field.focus();
}

function showError(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ServiceError)) return void tell(error.message);
  if (error.status === 401) return void askForKey(error);
  const small = [error.code, error.requestId && `request ${error.requestId}`].filter(Boolean).join(" · ");
  tell(error.message, { small, actions: error.passing ? [button("Try again", () => run(shown.blob, shown.name))] : [] });
}

function busy(is) {
  $("progress").hidden = !is;
  $("stage").setAttribute("aria-busy", String(is));
  for (const one of document.querySelectorAll("[data-do^=save]")) one.disabled = is || !shown.answer;
}

// one picture

function stopWaiting() {
  running.abort();
  results.clear("Not asked");
  $("notice-place").replaceChildren();
}

/** Ask until the service has room: an overloaded one says when to come back, and the page waits that long in plain sight. */
async function detectPatiently(blob, signal) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await detect(blob, { threshold: LOWEST_SCORE, model: chosenModel(), signal });
    } catch (error) {
      if (!(error.status === 429 || error.status === 503) || attempt >= RETRIES) throw error;
      const text = tell(error.message, { kind: "wait", small: error.code, actions: [button("Stop waiting", stopWaiting)] });
      const tick = (left) => (text.data = `${error.message} Trying again in ${left} s.`);
      await countdown(error.retryAfterS ?? FIRST_WAIT_S * attempt, tick, signal);
      $("notice-place").replaceChildren();
    }
  }
}

function showPicture(bitmap, frame) {
  $("welcome").hidden = true;
  $("toolbar").hidden = false;
  stage.showPicture(bitmap, frame);
}

function showNoAnswer() {
  results.clear("No answer");
  for (const id of ["timing", "snippet"]) $(id).hidden = true; // they tell of the picture before
}

/** What came is no picture that can be shown; without this the one before it would stay, under a message about another. */
function showWelcome() {
  stage.hide();
  $("toolbar").hidden = true;
  $("welcome").hidden = false;
}

function showAnswer({ answer, roundTripMs }) {
  shown.answer = answer;
  results.show(answer.detections);
  for (const id of ["timing", "snippet"]) $(id).hidden = false;
  showTiming({ bar: $("timing-bar"), legend: $("timing-legend"), total: $("timing-total") }, answer.timing_ms, roundTripMs);
}

async function run(blob, name) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  Object.assign(shown, { blob, name, answer: null });
  $("notice-place").replaceChildren();
  results.clear("Looking …");
  stage.clear();
  busy(true);
  try {
    const asked = detectPatiently(blob, signal);
    asked.catch(() => {}); // reported below, also when the picture fails to show first
    const bitmap = await decodeUpright(blob);
    if (signal.aborted) return;
    if (bitmap) showPicture(bitmap);
    else showWelcome();
    const got = await asked;
    if (!bitmap) showPicture(null, got.answer.image);
    showAnswer(got);
    bitmap?.close();
    if (!bitmap) tell("This browser cannot show pictures of this type; the boxes are drawn on an empty sheet.", { kind: "wait" });
  } catch (error) {
    if (!signal.aborted) showNoAnswer();
    showError(error);
  } finally {
    if (running.signal === signal) busy(false);
  }
}

function take(files) {
  stopCamera();
  const file = files[0];
  if (file) run(file, file.name || "pasted.png");
}

async function takeSample() {
  stopCamera();
  try {
    const response = await fetch("static/sample.jpg");
    if (!response.ok) throw new ServiceError(`The sample picture is missing (${response.status}).`, { status: response.status });
    run(await response.blob(), "sample.jpg");
  } catch (error) {
    showError(error instanceof TypeError ? new ServiceError("The service does not answer.") : error);
  }
}

// camera: one picture in flight at a time, each shown with its own boxes

function stopCamera() {
  if (camera) busy(false); // a frame that was being grabbed may never come
  camera?.close();
  camera = null;
  $("camera-button").textContent = "Camera";
  $("camera-button").setAttribute("aria-pressed", "false");
}

async function cameraFrame(opened, signal) {
  const blob = await opened.grab();
  const got = await detectPatiently(blob, signal);
  if (camera !== opened) return;
  const bitmap = await decodeUpright(blob);
  showPicture(bitmap);
  bitmap.close();
  Object.assign(shown, { blob, name: "camera.jpg" });
  showAnswer(got);
}

async function startCamera() {
  if (camera) return stopCamera();
  running.abort();
  running = new AbortController();
  const opened = (camera = new Camera());
  $("notice-place").replaceChildren();
  try {
    await opened.open();
    $("camera-button").textContent = "Freeze";
    $("camera-button").setAttribute("aria-pressed", "true");
    while (camera === opened) await cameraFrame(opened, running.signal);
  } catch (error) {
    stopCamera();
    showError(error);
  } finally {
    busy(false);
  }
}

// what leaves the page

function stem() {
  return shown.name.replace(/\.[^.]*$/, "") || "picture";
}

function saveJson() {
  const detections = results.visible.map(({ index, ...detection }) => detection);
  save(new Blob([JSON.stringify({ ...shown.answer, detections }, null, 2)], { type: "application/json" }), `${stem()}.json`);
}

async function savePicture() {
  const blob = await drawn(shown.blob, shown.answer.image, results.visible);
  save(blob, `${stem()}-boxes.${blob.type === "image/jpeg" ? "jpg" : "png"}`);
}

function drawSnippet() {
  const request = {
    origin: new URL("./", location.href).href,
    name: shown.name,
    type: shown.blob.type || "application/octet-stream",
    threshold: results.threshold,
    classes: results.shownClasses,
    model: chosenModel(),
    needsKey: shown.needsKey,
  };
  $("snippet-code").textContent = shown.language === "curl" ? curlSnippet(request) : pythonSnippet(request);
}

async function copySnippet(event) {
  const copied = await copyText($("snippet-code").textContent);
  if (!copied) getSelection().selectAllChildren($("snippet-code"));
  event.target.textContent = copied ? "Copied" : "Selected: press Ctrl C";
  setTimeout(() => (event.target.textContent = "Copy"), 2000);
}

function chooseLanguage(language) {
  shown.language = language;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${language}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
  $("snippet-code").setAttribute("aria-labelledby", `tab-${language}`);
  drawSnippet();
}

// models

/** Empty where there is nothing to choose: the service then takes its only model. */
function chosenModel() {
  return $("model").hidden ? "" : $("model").value;
}

function titleOf({ name, version }) {
  return `${name} · version ${version}`;
}

async function showModels() {
  try {
    const models = await listModels();
    const versions = models.flatMap((one) => one.versions);
    $("model").replaceChildren(...versions.map((one) => new Option(titleOf(one), one.state === "active" ? one.name : `${one.name}@${one.version}`)));
    $("model").hidden = versions.length < 2;
    $("model-label").hidden = versions.length === 0;
    $("model-name").textContent = versions.length === 1 ? titleOf(versions[0]) : "";
  } catch (error) {
    $("model-name").textContent = error.status === 401 ? "needs an API key" : "not known";
  }
}

// wiring

const ACTIONS = {
  choose: () => $("file").click(),
  sample: takeSample,
  camera: startCamera,
  "save-json": saveJson,
  "save-picture": savePicture,
  copy: copySnippet,
};

for (const element of document.querySelectorAll("[data-do]")) element.addEventListener("click", ACTIONS[element.dataset.do]);
$("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = "";
});
$("model").addEventListener("change", () => shown.blob && run(shown.blob, shown.name));
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => chooseLanguage(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = tab.id === "tab-curl" ? "python" : "curl";
    chooseLanguage(other);
    $(`tab-${other}`).focus();
  });
}

addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop-veil").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop-veil").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop-veil").hidden = true;
  take(event.dataTransfer.files);
});

showModels();
