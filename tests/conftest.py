import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import register_random, settings

from functorch_ens.training import update as updates

# A compilation or a first call can take a second; how long an example takes says nothing here.
# The same examples at every run of CI; new ones at every other run.
settings.register_profile("project", deadline=None, max_examples=100, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("project")


class _TorchRandom:
    """torch's generator, for hypothesis to seed: an example then fails again when it is tried again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()
register_random(_torch_random)


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """Every test starts from the same seed, with no compiled code of other tests."""
    torch.manual_seed(0)
    torch.compiler.reset()
    yield


@pytest.fixture(scope="module")
def small_members_are_updated_in_parts() -> Iterator[None]:
    """As only large ones are elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALL", 0)
        yield
