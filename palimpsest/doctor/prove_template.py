"""python -m palimpsest.doctor.prove_template RUN.toml [--SECTION.KEY=VALUE ...]

Load the chat renderer of a run's model, as a worker does at its start, and print the result as JSON. This program needs
the packages of a worker; the doctor calls it with the Python that has them.
"""

from __future__ import annotations

import json
import os
import sys

from palimpsest.doctor.facts import TemplateProof


def main() -> None:
    """Print a TemplateProof as JSON."""
    try:
        proof = prove(sys.argv[1:])
    except ImportError as error:
        proof = TemplateProof(model="", unproven=f"the package {error.name or error} is missing")
    print(json.dumps(proof._asdict()))


def prove(words: list[str]) -> TemplateProof:
    """Return the proof for the run that the words name. Raises ImportError without the packages of a worker."""
    from palimpsest.common.config import load
    from palimpsest.common.model_limits import refuse_tokenizer
    from palimpsest.common.user_error import UserError
    from palimpsest.services.rollout.chat_renderer import ChatRenderer

    try:
        model = load(words, os.environ, program="palimpsest doctor").config.model
    except UserError:
        return TemplateProof(model="", unproven="the run file cannot be used; `palimpsest check` prints the reason")
    try:
        renderer = ChatRenderer.load(model.path, dict(model.chat_template_options), model.chat_template)
        refuse_tokenizer(model.path, template=renderer.template)
    except UserError as error:
        return TemplateProof(model.path, model.chat_template, refused=str(error))
    return TemplateProof(
        model.path, model.chat_template, ends=renderer.stop_texts, refuses_system=renderer.refuses_system() or ""
    )


if __name__ == "__main__":
    main()
