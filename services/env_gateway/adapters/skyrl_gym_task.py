"""Environments of SkyRL-Gym. Their tasks are the rows of a JSONL or Parquet file: `prompt`, and what the environment
expects as `extras`, such as `reward_spec`."""

from collections.abc import Sequence
from typing import Any

from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.authoring.rows import read_rows
from palimpsest.common.environments.port import Message
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable, TextAdapter


class SkyRlGymTask(TextAdapter):
    """See port.py. `id` is that of skyrl_gym.make, such as `gsm8k`; `tasks` is the file."""

    version = "skyrl_gym"
    extra = "skyrl-gym"

    def begin(self, seed: int) -> Sequence[Message]:
        self.needed("id", "tasks")
        gym = self.imported("skyrl_gym")
        try:
            splits = read_rows(self.settings.tasks)
        except UserError as error:
            raise AdapterUnusable(str(error)) from None
        if self.settings.split not in splits:
            raise AdapterUnusable(
                f"{self.settings.tasks} has no split {self.settings.split!r}, only {', '.join(splits)}"
            )
        rows = splits[self.settings.split]
        self._count = len(rows)
        row = rows[row_of(seed, len(rows), 0)]
        self._environment = gym.make(self.settings.id, env_config={}, extras=row)
        prompt = row.get("prompt")
        first = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not first:
            raise AdapterUnusable(f"a row of {self.settings.tasks} has no prompt")
        messages, _ = self._environment.init(first)
        return _messages(messages)

    def act(self, text: str) -> tuple[Sequence[Message], float, bool]:
        found = self._environment.step(text)
        return _messages(found["observations"]), float(found["reward"]), bool(found["done"])

    def about(self) -> str:
        return f"{self.settings.id} of SkyRL-Gym, {self._count} tasks"

    def close(self) -> None:
        if hasattr(self, "_environment"):
            self._environment.close()


def _messages(found: Any) -> list[Message]:
    return [Message(role=one["role"], content=str(one["content"])) for one in found]
