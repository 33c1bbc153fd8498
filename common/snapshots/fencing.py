"""What the store refuses to a learner that was replaced, as errors that end the process with a sentence."""

import httpx

from palimpsest.common.user_error import ExitCode, UserError


class Fenced(UserError):
    """Another learner took the run over: this one must not write, announce or train any further."""


def raise_if_refused(reply: httpx.Response) -> None:
    """Raise Fenced, or a UserError when the store never issued the epoch. Any other reply is let pass."""
    if reply.status_code != 409:
        return
    said = reply.json()
    if said["code"] == "fenced":
        raise Fenced(
            f"another learner took this run over: {said['message']}. What this one computed since then is not stored, "
            f"and the run goes on without it; if that was not meant, stop the other one and start this one again",
            ExitCode.REPLACED,
        )
    if said["code"] == "writer_unknown":
        raise UserError(
            f"the snapshot store at {reply.request.url.copy_with(path='/')} is not the one this learner began with: "
            f"{said['message']}. Was it emptied, or put back from an older copy? Restore it, or start a new run",
            ExitCode.DAMAGED,
        )
