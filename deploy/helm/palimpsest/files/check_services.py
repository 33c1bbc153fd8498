"""Wait until every URL answers 200: python check_services.py SECONDS URL ... Standard library only."""

import sys
import time
import urllib.error
import urllib.request

ANSWER_S = 10.0
PAUSE_S = 1.0


def problem(url: str) -> str | None:
    """Return why the URL does not answer 200, or None if it does."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as reply:  # noqa: S310
            return None if reply.status == 200 else f"status {reply.status}"
    except urllib.error.HTTPError as error:
        return f"status {error.code}: {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return str(error)


def main(limit_s: float, urls: list[str]) -> int:
    """Return 0 if every URL answers within the limit, else 1."""
    end, code = time.monotonic() + limit_s, 0
    for url in urls:
        while (why := problem(url)) is not None and time.monotonic() < end:
            time.sleep(PAUSE_S)
        print(f"{url}: {why or 'ready'}", flush=True)
        code |= why is not None
    return int(code)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
