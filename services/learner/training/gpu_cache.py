"""Memory of the GPU that torch keeps for later tensors."""

import torch


def release_gpu_cache() -> None:
    """Return what torch keeps but does not use, so that another process can take it. Does nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
