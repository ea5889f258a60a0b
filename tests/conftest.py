"""Shared by all tests: one thread (two are slower on molecules of this size), no screen."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    for item in items:
        if "torchforce" in item.keywords:
            try:
                import openmmtorch  # noqa: F401
            except (ImportError, OSError):
                item.add_marker(pytest.mark.skip(reason="needs openmmtorch"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
