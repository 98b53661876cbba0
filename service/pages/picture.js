// Pictures in and out of the browser: decode upright, grab from the camera, draw boxes for a download.

import { colourOf, inkOn } from "./palette.js";

const SHOWN_SIDE_PX = 2400; // long side kept for the screen
const SAVED_PIXELS = 16_000_000; // canvases beyond this fail on phones
const CAMERA_SIDE_PX = 1280;

/** The picture as a person sees it (EXIF orientation applied), or null where this browser cannot decode its type. */
export async function decodeUpright(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    return null;
  }
}

/** Draw `bitmap` on `canvas`, no larger than the screen needs. */
export function paint(canvas, bitmap) {
  const scale = Math.min(1, SHOWN_SIDE_PX / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

function drawBox(pen, detection, scale, unit) {
  const [x1, y1, x2, y2] = detection.box.map((value) => value * scale);
  const colour = colourOf(detection.class);
  pen.lineWidth = unit * 4;
  pen.strokeStyle = "rgb(0 0 0 / 35%)";
  pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
  pen.lineWidth = unit * 2;
  pen.strokeStyle = colour;
  pen.strokeRect(x1, y1, x2 - x1, y2 - y1);

  const text = `${detection.class} ${detection.score.toFixed(2)}`;
  const width = pen.measureText(text).width + unit * 10;
  const height = unit * 18;
  const left = Math.max(0, Math.min(x1 - unit, pen.canvas.width - width));
  const top = y1 >= height ? y1 - height : y1;
  pen.fillStyle = colour;
  pen.fillRect(left, top, width, height);
  pen.fillStyle = inkOn(colour);
  pen.fillText(text, left + unit * 5, top + height / 2);
}

/**
 * The picture with its boxes, at its own size (at most 16 Mpx).
 *
 * @param {Blob} blob  the picture that was sent
 * @param {{width: number, height: number}} frame  the frame of the boxes: the upright picture
 * @param {object[]} detections
 * @returns {Promise<Blob>} JPEG for a JPEG, PNG otherwise
 */
export async function drawn(blob, frame, detections) {
  const scale = Math.min(1, Math.sqrt(SAVED_PIXELS / (frame.width * frame.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(frame.width * scale));
  canvas.height = Math.max(1, Math.round(frame.height * scale));
  const pen = canvas.getContext("2d");
  const bitmap = await decodeUpright(blob);
  if (bitmap) pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap?.close();
  const unit = Math.max(1, Math.max(canvas.width, canvas.height) / 1000);
  pen.font = `600 ${unit * 12}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  for (const detection of [...detections].reverse()) drawBox(pen, detection, scale, unit);
  const type = blob.type === "image/jpeg" ? "image/jpeg" : "image/png";
  return new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
}

/** Offer `blob` as a download. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const CAMERA_SENTENCES = {
  NotAllowedError: "The browser may not use the camera. Allow it beside the address and try again.",
  NotFoundError: "No camera was found on this device.",
  NotReadableError: "The camera is in use by another program.",
};

/** An open camera; `grab` gives what it sees now as a JPEG. */
export class Camera {
  #video = document.createElement("video");
  #canvas = document.createElement("canvas");

  async open() {
    if (!navigator.mediaDevices) throw new Error("A camera works only over https or on localhost. Choose a file instead.");
    try {
      this.#video.srcObject = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment", width: { ideal: CAMERA_SIDE_PX } },
      });
    } catch (error) {
      throw new Error(CAMERA_SENTENCES[error.name] ?? `The camera did not open: ${error.message}.`);
    }
    this.#video.muted = true;
    this.#video.playsInline = true;
    await this.#video.play();
  }

  grab() {
    const { videoWidth, videoHeight } = this.#video;
    const scale = Math.min(1, CAMERA_SIDE_PX / Math.max(videoWidth, videoHeight));
    this.#canvas.width = Math.round(videoWidth * scale);
    this.#canvas.height = Math.round(videoHeight * scale);
    this.#canvas.getContext("2d").drawImage(this.#video, 0, 0, this.#canvas.width, this.#canvas.height);
    return new Promise((resolve) => this.#canvas.toBlob(resolve, "image/jpeg", 0.9));
  }

  close() {
    for (const track of this.#video.srcObject?.getTracks() ?? []) track.stop();
    this.#video.srcObject = null;
  }
}
