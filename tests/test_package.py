"""The front door: what is exported, and that it is documented."""

from __future__ import annotations

import functorch_ens


def test_the_exports_are_sorted_unique_there_and_documented() -> None:
    names = functorch_ens.__all__
    assert list(names) == sorted(set(names))
    for name in names:
        documentation = getattr(functorch_ens, name).__doc__ or ""
        assert len(documentation) > 40 and not documentation.startswith(f"{name}("), (
            f"{name} has no docstring of its own"
        )
