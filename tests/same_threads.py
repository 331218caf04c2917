"""A fixture for tests that change the number of threads: import it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads():
    """As many threads after a test as before it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
