"""The log a run's configuration names."""

from common.bus.port import Bus
from common.bus.sqlite import SqliteBus
from common.config.schema import RunConfig
from common.messages import CONTROL, DEAD_LETTERS, TASKS, TRAJECTORIES, WORKERS
from common.refusal import Refusal


def open_bus(config: RunConfig) -> Bus:
    """The run's log, its topics created. Raises Refusal when they stand there with other partitions."""
    bus = SqliteBus(config.bus_path)
    try:
        bus.create_topics(
            {
                TASKS: config.bus.task_partitions,
                TRAJECTORIES: config.bus.trajectory_partitions,
                CONTROL: 1,
                WORKERS: 1,
                DEAD_LETTERS: 1,
            }
        )
    except ValueError as error:
        bus.close()
        raise Refusal(
            f"{error}: set bus.task_partitions and bus.trajectory_partitions back, or use a new run"
        ) from None
    return bus
