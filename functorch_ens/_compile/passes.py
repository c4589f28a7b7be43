"""What is changed in the graphs of compiled steps before torch.compile makes kernels of them."""

from __future__ import annotations

from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from functorch_ens._compile import lookups, rank1_gradients


class Passes(CustomGraphPass):
    """All of them, as inductor takes them."""

    def __call__(self, graph: Graph) -> None:
        """Change `graph`."""
        lookups.compare_lookups(graph)
        rank1_gradients.join_rank1_gradients(graph)

    def uuid(self) -> Any:
        """What the compiler's cache knows these passes by."""
        return get_hash_for_files((__file__, lookups.__file__, rank1_gradients.__file__))
