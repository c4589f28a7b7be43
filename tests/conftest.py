from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A compilation or a first call can take a second; how long an example takes says nothing here.
settings.register_profile("project", deadline=None, max_examples=100, print_blob=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """Every test starts from the same seed, with no compiled code of other tests."""
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
