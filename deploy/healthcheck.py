"""Asks the process in this container whether it is `live` or `ready`; exits with 0 if it is.

Runs inside the image, where there is no curl. Knows the port from STREAM_METRICS_PORT and
nothing else of Penchant.
"""

from __future__ import annotations

import http.client
import os
import sys

# Below the 5 s that the container engine grants, so that the reason is still printed.
TIMEOUT_S = 4.0


def main(probe: str) -> int:
    port = int(os.environ["STREAM_METRICS_PORT"])
    # http.client, not urllib: a proxy named in the environment is not asked about localhost.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", f"/healthz/{probe}")
        answer = connection.getresponse()
        print(answer.status, answer.read(500).decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer on port {port}: {error!r}")
        return 1
    return 0 if answer.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
