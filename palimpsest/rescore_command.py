"""Check the old log-probs of a recorded run with plain transformers, without the code of the services.

    palimpsest rescore runs/ID [--model FOLDER] [--every 10]

The run must be recorded (learner.record = true), and its store must still hold the versions. Two settings keep all of
them: learner.checkpoint.every = 1 with learner.checkpoint.keep = learner.versions, or, where checkpoints are large,
learner.checkpoint.every above learner.versions.

For every trained token with an old log-prob, the command loads the stored version that sampled the token into a plain
`AutoModelForCausalLM`, and scores the token

    alone         with its trajectory as one row without padding: how much do batch layouts differ?
    same layout   with the rows of the learner's pass: the values must be equal bit for bit

With learner.context_parallel above 1, ranks share the tokens of each row, and the tokens are compared alone only:
same_layout_tokens is 0.

The command scores on a GPU if it sees one, otherwise on the CPU. To score on the CPU, put CUDA_VISIBLE_DEVICES= before
the command. Expect equal values only on the kind of device that the learner used.

Versions in a bucket are downloaded first, with the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

Prints one JSON line: tokens, versions, alone_mean_abs and alone_max_abs (nats), same_layout_tokens (scored in
the batch; the values of replicas and of earlier scoring come with the rows) and same_layout_unequal (must be 0), and
for each staleness the mean |exact - behavior| and the same mean for the current weights in place of the old
ones.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def command(words: Sequence[str]) -> None:
    """Compare, and print one JSON line. Exits with 2 for arguments that cannot be used. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="palimpsest rescore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--model", help="folder of the model with config and tokenizer; default: model.path of the run")
    parser.add_argument("--every", type=int, default=1, help="check every n-th recorded version only")
    options = parser.parse_args(words)
    if options.every < 1:
        parser.error(f"--every {options.every}: must be at least 1")
    from palimpsest.services.report.folder import read_run_config

    config = read_run_config(options.run).model_dump(mode="json")
    from palimpsest.rescore import main  # imports torch, which takes seconds
    from palimpsest.rescore_records import Lacking

    try:
        result = main(options.run, config, options.model, options.every)
    except Lacking as error:
        parser.error(str(error))
    print(json.dumps(result))
