// "The same from code": the request that the page shows, as curl and as Python.

function query({ threshold, classes, model }) {
  const fields = { score_threshold: threshold.toFixed(2) };
  if (classes) fields.classes = classes.join(",");
  if (model) fields.model = model;
  return fields;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function curlSnippet(request) {
  const address = `${request.origin}v1/detect?${new URLSearchParams(query(request))}`;
  const lines = [`curl ${shellQuoted(address)}`, `-H ${shellQuoted(`Content-Type: ${request.type}`)}`];
  if (request.needsKey) lines.push(`-H "Authorization: Bearer $DETECTOR_API_KEY"`);
  lines.push(`--data-binary ${shellQuoted(`@${request.name}`)}`);
  return lines.join(" \\\n  ");
}

export function pythonSnippet(request) {
  const text = (value) => JSON.stringify(value);
  const headers = [`"Content-Type": ${text(request.type)}`];
  if (request.needsKey) headers.push(`"Authorization": f"Bearer {os.environ['DETECTOR_API_KEY']}"`);
  const params = Object.entries(query(request)).map(([name, value]) => `"${name}": ${name === "score_threshold" ? value : text(value)}`);
  return `${request.needsKey ? "import os\n" : ""}from pathlib import Path

import requests  # pip install requests

response = requests.post(
    ${text(`${request.origin}v1/detect`)},
    params={${params.join(", ")}},
    headers={${headers.join(", ")}},
    data=Path(${text(request.name)}).read_bytes(),
)
response.raise_for_status()
for detection in response.json()["detections"]:
    print(detection["class"], detection["score"], detection["box"])`;
}

/** Put `text` on the clipboard; false where the browser does not allow it (plain http beyond localhost). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
