"""The store's routes for the names of workers and replicas.

PUT    /v1/members/{role}/{name}    {"instance": id, "holder": text, "replaces": id}: take or renew the name; 409
                                    name_taken while another instance holds it
DELETE /v1/members/{role}/{name}    ?instance=id: free the name; no effect if another instance holds it
"""

from typing import Annotated

import msgspec
from fastapi import FastAPI, Path, Query, Request
from pydantic import BaseModel

from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError
from palimpsest.common.control.openapi import json_body
from palimpsest.services.snapshot_store.bodies import WRITE_ERRORS, decoded
from palimpsest.services.snapshot_store.kept_members import KeptMembers
from palimpsest.services.snapshot_store.members import LEASE_S, NameTaken

Role = Annotated[str, Path(pattern="^(rollout|replica)$")]
MemberName = Annotated[str, Path(pattern="^[a-z0-9][a-z0-9_-]{0,31}$")]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class TakeName(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PUT /v1/members/{role}/{name}."""

    instance: _Text
    holder: _Text
    replaces: Annotated[str, msgspec.Meta(max_length=300)] = ""


class NameLease(BaseModel):
    """Reply of PUT /v1/members/{role}/{name}."""

    lease_s: float


def routes(app: FastAPI, members: KeptMembers) -> None:
    """Add the routes."""

    @app.put(
        "/v1/members/{role}/{name}",
        responses={**WRITE_ERRORS, **documented(409)},
        openapi_extra=json_body(app, TakeName),
    )
    async def take_name(role: Role, name: MemberName, request: Request) -> NameLease:
        wanted = await decoded(request, TakeName, "bad_member")
        try:
            await members.take(f"{role}/{name}", wanted.instance, wanted.holder, replaces=wanted.replaces)
        except NameTaken as taken:
            current = taken.member
            raise HttpError(
                409,
                "name_taken",
                str(taken),
                retryable=True,
                instance=current.process.instance,
                holder=current.process.holder,
                renewals=current.renewals,
            ) from None
        return NameLease(lease_s=LEASE_S)

    @app.delete("/v1/members/{role}/{name}", status_code=204, responses=WRITE_ERRORS)
    async def free_name(
        role: Role, name: MemberName, instance: Annotated[str, Query(min_length=1, max_length=300)]
    ) -> None:
        await members.release(f"{role}/{name}", instance)
