// One colour a class name, the same in every picture, page and drawn answer: FNV-1a (32 bit) of the UTF-8 name, modulo 12.
// service/drawing.py holds the same list; a test compares the two.

export const PALETTE = [
  "#c2410c", "#22a565", "#9a5cf5", "#d4a100", "#00a0a8", "#f5820b",
  "#e0459b", "#7a9a1c", "#e5484d", "#0ea5e9", "#2563eb", "#8d6e63",
];

const encoder = new TextEncoder();

export function fnv1a(text) {
  let hash = 0x811c9dc5;
  for (const byte of encoder.encode(text)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash;
}

export function colourOf(className) {
  return PALETTE[fnv1a(className) % PALETTE.length];
}

function channel(hex, at) {
  const value = parseInt(hex.slice(at, at + 2), 16) / 255;
  return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
}

/** Black or white, whichever reads better on `hex` (WCAG relative luminance; 0.179 is where both contrast alike). */
export function inkOn(hex) {
  const luminance = 0.2126 * channel(hex, 1) + 0.7152 * channel(hex, 3) + 0.0722 * channel(hex, 5);
  return luminance > 0.179 ? "#000000" : "#ffffff";
}
