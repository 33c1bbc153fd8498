"""A resources server of NeMo Gym for tests: `python sums_nemo_gym.py PORT`, in the environment of nemo-gym.

The tool `add` counts up. The verification pays 1 if the sum is the row's `number`, else 0.
"""

import sys
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI, Request
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseSeedSessionRequest,
    BaseSeedSessionResponse,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.server_utils import SESSION_ID_KEY, ServerClient
from pydantic import BaseModel, Field


class Add(BaseModel):
    number: int


class Verify(BaseVerifyRequest):
    number: int


class Sums(SimpleResourcesServer):
    config: BaseResourcesServerConfig
    sums: dict[str, int] = Field(default_factory=dict)

    def setup_webserver(self) -> FastAPI:
        app = super().setup_webserver()
        app.post("/add")(self.add)
        return app

    async def seed_session(self, request: Request, body: BaseSeedSessionRequest) -> BaseSeedSessionResponse:
        self.sums[request.session[SESSION_ID_KEY]] = 0
        return BaseSeedSessionResponse()

    async def add(self, request: Request, body: Add) -> dict[str, int]:
        self.sums[request.session[SESSION_ID_KEY]] += body.number
        return {"sum": self.sums[request.session[SESSION_ID_KEY]]}

    async def verify(self, request: Request, body: Verify) -> BaseVerifyResponse:
        reward = float(self.sums[request.session[SESSION_ID_KEY]] == body.number)
        return BaseVerifyResponse(**body.model_dump(), reward=reward)


if __name__ == "__main__":
    port = int(sys.argv[1])
    config = BaseResourcesServerConfig(host="127.0.0.1", port=port, entrypoint="", name="sums")
    client = ServerClient.model_construct(head_server_config=None, global_config_dict=SimpleNamespace())
    server = Sums.model_construct(config=config, server_client=client, sums={})
    uvicorn.run(server.setup_webserver(), host="127.0.0.1", port=port, log_level="warning")
