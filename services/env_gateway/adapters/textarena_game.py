"""Games of TextArena for one player. They draw from the global `random`, so each session needs its own process."""

from collections.abc import Sequence

from palimpsest.common.environments.port import Message
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable, TextAdapter, user


class TextArenaGame(TextAdapter):
    """See port.py. `id` is that of textarena.make, such as `GuessTheNumber-v0`."""

    version = "textarena"
    extra = "textarena"

    def begin(self, seed: int) -> Sequence[Message]:
        self.needed("id")
        arena = self.imported("textarena")
        try:
            self._game = arena.make(env_id=self.settings.id)
        except Exception as error:
            raise AdapterUnusable(
                f"textarena cannot make {self.settings.id}: {type(error).__name__}: {error}"
            ) from None
        self._game.reset(num_players=1, seed=seed % 2**31)
        return self._observed()

    def act(self, text: str) -> tuple[Sequence[Message], float, bool]:
        done, _ = self._game.step(action=text)
        if not done:
            return self._observed(), 0.0, False
        rewards, _ = self._game.close()
        return [], float(rewards[0]), True

    def about(self) -> str:
        return f"{self.settings.id} of TextArena"

    def _observed(self) -> list[Message]:
        _, observation = self._game.get_observation()
        parts = observation if isinstance(observation, str) else "\n".join(str(one[1]) for one in observation)
        return [user(parts)]
