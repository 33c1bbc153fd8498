"""The section `tracking`."""

from typing import Literal

from palimpsest.common.config.section import Section


class TrackingConfig(Section):
    """Where the learner sends the values of each version besides its own history (docs/tracking.md)."""

    kind: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """`tensorboard` writes event files to `folder/id/tracking`. `wandb` and `mlflow` send to their servers. Each needs
    the extra of its name, for example `pip install 'palimpsest[tensorboard]'`."""
    project: str = "palimpsest"
    """Project of wandb; experiment of mlflow."""
    url: str = ""
    """mlflow: the tracking server, or a database (`sqlite:///FILE`). If empty, mlflow's own settings decide."""
