"""python -m bench NAME [OPTIONS]"""

import importlib
import json
import sys

PROGRAMS = {
    "loop": "the embedded run: tokens per second, waiting times, pauses, bytes on the log",
    "bus": "publishing and reading through the log, kafka-python and confluent-kafka on a real Kafka",
    "log_share": "the share of a version's time that the log on Kafka takes, in a real run",
    "ingest": "1,000 simulated rollout streams into one learner: trajectories per second, lag, memory",
    "memory": "log-probs and their gradients from all logits and in chunks: peak memory, tokens per second",
    "mismatch": "a toy trained with exact old log-probs and with each surrogate: masks, clips, rewards",
    "tail": "lognormal tool times in virtual time: tokens lost and trajectories dropped, by the rule for batches",
    "gateway": "steps through the gateway beside a bare echo: latency, processor time, memory",
    "peers": "the embedded run beside GRPO of TRL: tokens per second, processor time, seconds to success",
    "worlds": "what the solution and lazy policies earn in the customer-service worlds",
    "learner": "a training step, replicated and sharded, beside a bare FSDP2 loop: tokens per second, memory, bytes",
    "snapshots": "versions as deltas: bytes stored, time to encode, time to move a copy, memory",
    "rollout": "a rollout worker alone against the bare engine (AsyncLLM) on the same model, in one run",
    "routes": "cost of old log-probs by each route: seconds, bytes, pauses of workers",
}


def main() -> int:
    """Run a program. Prints its result as the last line on standard output, as JSON."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        print("usage: python -m bench NAME [OPTIONS]\n" + "\n".join(f"  {n:9} {what}" for n, what in PROGRAMS.items()))
        return 0 if sys.argv[1:2] in ([], ["--help"], ["-h"]) else 2
    program = importlib.import_module(f"bench.{sys.argv[1]}")
    print(json.dumps(program.main(sys.argv[2:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
