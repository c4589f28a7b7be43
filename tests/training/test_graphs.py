"""How many graphs the compiler makes while the sizes of batches change: no more than for one plain network."""

from __future__ import annotations

import logging

import graphs
import pytest

import functorch_ens as fe

SIZES = (8, 8, 5, 8, 3, 1, 9)
WAYS = [
    (network, way)
    for network, way in graphs.pairs(list(graphs.NETWORKS))
    if way != graphs.PLAIN and (network in ("mlp", "lstm") or "vmap" in way or way == "BatchEnsemble, loop")
]
"""Of the larger networks the loop once; `benchmarks/graphs.py` counts all."""


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
@pytest.mark.parametrize(("network", "way"), WAYS)
def test_other_sizes_make_no_more_graphs_than_those_of_a_plain_network(network: str, way: str) -> None:
    """torch has no graph of an LSTM, so there a step is several; but they are made at the same sizes."""
    logging.getLogger(fe.__name__).setLevel(logging.ERROR)  # it tells of this
    theirs = graphs.made(network, graphs.PLAIN, SIZES)
    mine = graphs.made(network, way, SIZES)
    if network == "lstm":
        mine, theirs = ([int(count > 0) for count in counts] for counts in (mine, theirs))
    assert all(own <= other for own, other in zip(mine, theirs, strict=True)), (mine, theirs)


@pytest.mark.compile
def test_the_last_batch_of_an_epoch_makes_one_graph_for_all_epochs() -> None:
    assert graphs.made("mlp", "BatchEnsemble, vmap", (8, 8, 5, 8, 8, 5, 8, 8, 5)) == [1, 0, 1, 0, 0, 0, 0, 0, 0]
