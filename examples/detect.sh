#!/bin/sh
# Every way to ask for detections with curl. Start the service first (`make serve`), then:
#
#   sh examples/detect.sh [URL] [PICTURE] [FOLDER FOR THE DRAWN PICTURE]
set -eu

URL=${1:-http://127.0.0.1:8000}
PICTURE=${2:-$(dirname "$0")/blood_smear.jpg}
OUT=${3:-$(mktemp -d)}
say() { printf '\n== %s\n' "$1"; }
ask() { curl --silent --show-error --fail-with-body "$@"; }

say "the picture itself is the body"
ask -H 'Content-Type: image/jpeg' --data-binary "@$PICTURE" "$URL/v1/detect?score_threshold=0.6&max_detections=3"

say "a form, with options as fields"
ask -F "image=@$PICTURE" -F max_detections=3 -F box_format=xywh "$URL/v1/detect"

say "JSON with base64"
base64 <"$PICTURE" | tr -d '\n' | sed 's/^/{"max_detections": 3, "image": "/; s/$/"}/' |
    ask -H 'Content-Type: application/json' --data-binary @- "$URL/v1/detect"

say "many pictures in one request"
ask -F "images=@$PICTURE" -F "images=@$PICTURE" "$URL/v1/detect/batch?max_detections=1"

say "the picture with its boxes drawn, as PNG: $OUT/drawn.png"
ask -H 'Accept: image/png' -H 'Content-Type: image/jpeg' --data-binary "@$PICTURE" -o "$OUT/drawn.png" "$URL/v1/detect?format=image"

say "which models answer, and which classes they know"
ask "$URL/v1/models"

say "a busy service answers 429 with Retry-After, which curl honours"
ask --retry 5 -H 'Content-Type: image/jpeg' --data-binary "@$PICTURE" "$URL/v1/detect?max_detections=1"

say "the Open Inference Protocol: the body alone is the picture"
MODEL=$(ask -X POST "$URL/v2/repository/index" | sed 's/.*"name":"\([^"]*\)".*/\1/; s/_tensor$//')
ask -H 'Inference-Header-Content-Length: 0' --data-binary "@$PICTURE" -o "$OUT/answer.bin" "$URL/v2/models/$MODEL/infer"
head -c 300 "$OUT/answer.bin" | tr -cd '[:print:]'
echo
