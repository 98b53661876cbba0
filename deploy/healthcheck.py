"""Exit 0 when the service in this container is ready, else 1 with its own sentence. Needs no curl and no third-party package."""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 2.0


def main() -> int:
    """Ask /readyz on the port that the settings name."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("DETECTOR_PORT", "8000")), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        text = answer.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        text, ready = f"no answer: {error}", False
    else:
        ready = answer.status == http.HTTPStatus.OK
    finally:
        connection.close()
    print(text)
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
