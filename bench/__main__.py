"""python -m bench NAME [OPTIONS]"""

import importlib
import json
import sys

PROGRAMS = {
    "loop": "the embedded run: tokens a second, who waits on whom, pauses, bytes on the log",
    "bus": "the log on a real Kafka beside kafka-python and confluent-kafka used bare: publishing, reading",
    "ingest": "1,000 simulated rollout streams into one learner: trajectories a second, lag, memory",
    "memory": "log-probs and their gradients from all logits and in chunks: peak memory, tokens a second",
    "mismatch": "a toy trained by exact old log-probs and by each surrogate: masks, clips, rewards",
    "routes": "what old log-probs cost by each route: seconds, bytes, workers standing still",
}


def main() -> int:
    """Run one program; its result as one JSON line on standard output, last."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        print("usage: python -m bench NAME [OPTIONS]\n" + "\n".join(f"  {n:8} {what}" for n, what in PROGRAMS.items()))
        return 0 if sys.argv[1:2] in ([], ["--help"], ["-h"]) else 2
    program = importlib.import_module(f"bench.{sys.argv[1]}")
    print(json.dumps(program.main(sys.argv[2:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
