"""A resources server of NeMo Gym that echoes: `python nemo_gym_echo.py PORT`, in the environment of nemo-gym."""

import sys
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.server_utils import ServerClient
from pydantic import BaseModel


class Text(BaseModel):
    """What the model says."""

    text: str


class Echo(SimpleResourcesServer):  # type: ignore[misc]
    """One tool, `echo`. Each session is worth 0."""

    config: BaseResourcesServerConfig

    def setup_webserver(self) -> FastAPI:
        """Return the application."""
        app: FastAPI = super().setup_webserver()
        app.post("/echo")(self.echo)
        return app

    async def echo(self, body: Text) -> dict[str, str]:
        """Return the text."""
        return {"text": body.text}

    async def verify(self, body: BaseVerifyRequest) -> BaseVerifyResponse:
        """Return the reward."""
        return BaseVerifyResponse(**body.model_dump(), reward=0.0)


if __name__ == "__main__":
    port = int(sys.argv[1])
    config = BaseResourcesServerConfig(host="127.0.0.1", port=port, entrypoint="", name="echo")
    client = ServerClient.model_construct(head_server_config=None, global_config_dict=SimpleNamespace())
    server = Echo.model_construct(config=config, server_client=client)
    uvicorn.run(server.setup_webserver(), host="127.0.0.1", port=port, log_level="warning")
