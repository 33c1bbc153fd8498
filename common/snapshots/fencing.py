"""Errors for a learner that another learner replaced: the store refuses its requests, and the process ends."""

import httpx

from palimpsest.common.user_error import ExitCode, UserError


class Fenced(UserError):
    """Raised if another learner took over the run. This learner must not write, announce or train any further."""


def raise_if_refused(reply: httpx.Response) -> None:
    """Raise Fenced, or a UserError if the store never issued the epoch. Other replies raise no error."""
    if reply.status_code != 409:
        return
    error = reply.json()
    if error["code"] == "fenced":
        raise Fenced(
            f"another learner took over this run: {error['message']}. The store does not accept later results of this "
            f"learner, and the run continues with the other one. If you did not intend this, stop the other learner "
            f"and start this one again",
            ExitCode.REPLACED,
        )
    if error["code"] == "writer_unknown":
        raise UserError(
            f"the snapshot store at {reply.request.url.copy_with(path='/')} is not the store with which this learner "
            f"started: {error['message']}. It may be empty or an older copy: restore it, or start a new run",
            ExitCode.DAMAGED,
        )
