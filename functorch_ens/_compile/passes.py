"""The changes to the graphs of compiled steps, before inductor makes kernels of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from functorch_ens._compile.optional import optional

PASSES: list[Callable[[Graph], None]] = []
"""Those that this torch can make."""

with optional("comparisons in the place of scatters"):
    from functorch_ens._compile.lookups import compare_lookups

    PASSES.append(compare_lookups)
with optional("both gradients of a rank-1 layer out of one product"):
    from functorch_ens._compile.rank1_gradients import join_rank1_gradients

    PASSES.append(join_rank1_gradients)


class Passes(CustomGraphPass):
    """All passes, as one that inductor takes."""

    def __call__(self, graph: Graph) -> None:
        """Change `graph` in place."""
        for each in PASSES:
            with optional(each.__name__):
                each(graph)

    def uuid(self) -> Any:
        """The key of these passes in inductor's cache: their source, and which of them there are."""
        source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        names = " ".join(each.__name__ for each in PASSES)
        return hashlib.sha256(source + names.encode()).hexdigest()
