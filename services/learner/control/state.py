"""What people changed in a run: for its checkpoints, and folded from the records on the log. Pure."""

from typing import Any

from msgspec import Struct, structs

from palimpsest.common.config.settings import MAX_STALENESS
from palimpsest.common.control_messages import ControlChanged

TEMPERATURE = "sampling.temperature"


class ControlState(Struct, frozen=True, forbid_unknown_fields=True):
    """Changed settings and pauses."""

    number: int = 0
    """Number of recorded changes."""
    writer: int = 0
    """Epoch of the learner that recorded the last of them."""
    generation: int = 0
    """Number of changes of settings."""
    values: dict[str, Any] = {}
    """Key -> new value, for the keys that were changed."""
    temperatures: tuple[tuple[int, float], ...] = ()
    """Changes of sampling.temperature: index of the first group, temperature."""
    bounds: tuple[tuple[int, int], ...] = ()
    """Changes of learner.max_staleness: version at which it was changed, new number."""
    paused: dict[str, str] = {}
    """What is paused (`training`, `offers`) -> who paused it."""

    def after(self, record: ControlChanged) -> "ControlState":
        """Return the state after a recorded change, if it took effect."""
        if not record.follows(self.number, self.writer):
            return self
        values, paused, temperatures, bounds = dict(self.values), dict(self.paused), self.temperatures, self.bounds
        match record.what:
            case "settings":
                values |= record.after
                if (temperature := record.after.get(TEMPERATURE)) is not None:
                    temperatures = (*temperatures, (record.next_group, float(temperature)))
                if isinstance(number := record.after.get(MAX_STALENESS), int):
                    bounds = (*bounds, (record.version, number))
            case "pause":
                paused[record.after["what"]] = record.who
            case "resume":
                paused.clear()
        return structs.replace(
            self,
            number=record.number,
            writer=record.writer,
            generation=record.generation,
            values=values,
            paused=paused,
            temperatures=temperatures,
            bounds=bounds,
        )
