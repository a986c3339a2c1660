"""Where each test starts from, and which ones this machine cannot run."""

import os
from pathlib import Path

# One thread for each pytest-xdist worker, and for the commands that its tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("abe", deadline=None, derandomize=True)
settings.load_profile("abe")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")
    if item.get_closest_marker("real_data"):
        root = os.environ.get("ABE_DATA_ROOT")
        if root is None:
            pytest.skip("needs real photographs: set ABE_DATA_ROOT to their folder")
        if not Path(root).is_dir():
            pytest.skip(f"needs real photographs: ABE_DATA_ROOT={root} is not a folder")
