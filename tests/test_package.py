"""The front door: what is exported, that it is documented, and which way imports point."""

from __future__ import annotations

import re
from pathlib import Path

import functorch_ens

ROOT = Path(__file__).parent.parent


def test_the_exports_are_sorted_unique_there_and_documented() -> None:
    names = functorch_ens.__all__
    assert list(names) == sorted(set(names))
    for name in names:
        documentation = getattr(functorch_ens, name).__doc__ or ""
        assert len(documentation) > 40 and not documentation.startswith(f"{name}("), (
            f"{name} has no docstring of its own"
        )


def test_imports_point_one_way() -> None:
    """No module of the package imports one that, at any remove, imports it."""
    files = {path.stem: path for path in (ROOT / "functorch_ens").glob("*.py")}
    imports = {
        stem: set(re.findall(r"from functorch_ens\.(\w+) import", path.read_text())) for stem, path in files.items()
    }
    assert imports["forward"] and imports["params"]
    order: list[str] = []
    while len(order) < len(imports):
        ready = [stem for stem in imports if stem not in order and imports[stem] <= set(order)]
        assert ready, f"a circle among {sorted(set(imports) - set(order))}"
        order += ready
