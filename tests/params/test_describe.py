"""describe: what is shared, what is stacked, which rule computes it, and the sums."""

from __future__ import annotations

import math

import pytest
import torch
from cases import MODELS, model_case
from torch import Tensor, nn
from zoo_written import Tied

import functorch_ens as fe
from functorch_ens.layers.weight import Rank1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["classic", "BatchEnsemble"])
def test_the_sums_are_those_of_the_tensors(name: str, kind: str) -> None:
    model = model_case(name).model
    params = fe.batchensemble_params(model, 3) if kind == "BatchEnsemble" else fe.ensemble_params(model, 3, reset=False)
    found = fe.describe(model, params)
    tensors = [*params.shared.values(), *params.stacked.values()]
    assert found.parameters == sum(tensor.numel() for tensor in tensors)
    assert found.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.model_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [row.module + "." * bool(row.module) + row.name for row in found.rows] == [
        n for n, _ in model.named_parameters()
    ]
    assert {row.rule for row in found.rows} <= ({"none"} if kind == "classic" else {"none", "fast", "fallback"})


def test_the_rules_named_are_those_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is multiplied out exactly where the table says "fallback"."""
    multiplied: list[int] = []
    own = Rank1.materialise

    def materialise(self: Rank1) -> Tensor:
        multiplied.append(1)
        return own(self)

    monkeypatch.setattr(Rank1, "materialise", materialise)
    for name in MODELS:
        case = model_case(name)
        params = fe.batchensemble_params(case.model, 2)
        rules = [row.rule for row in fe.describe(case.model, params).rows]
        multiplied.clear()
        fe.make_forward(case.model, strategy="loop")(params, *case.args)
        reads_directly = name == "direct access"  # the table tells what the layer's own forward does
        assert bool(multiplied) == ("fallback" in rules or reads_directly), name


def test_it_reads_as_a_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    text = str(fe.describe(model, fe.batchensemble_params(model, 5, stacked="3.weight")))
    lines = text.splitlines()
    assert (
        lines[0] == "Sequential, E = 5" and repr(fe.describe(model, fe.ensemble_params(model, 2))).count("stacked") == 6
    )
    table = [line for line in lines[1:-1] if not line.startswith("-")]
    assert len({len(line) for line in table}) == 1, "columns do not line up"
    cells = {tuple(line.split()[-6:]) for line in table}
    assert any("fast" in row for row in cells) and "[8, 3, 3, 3]" in text and "shared + r, s" in text
    assert "5 separate models" in text and "times the size of one model" in lines[-1]


def test_a_tied_weight_is_listed_once() -> None:
    model = Tied()
    rows = fe.describe(model, fe.batchensemble_params(model, 2)).rows
    assert [row.name for row in rows] == ["weight", "weight", "bias"]
    assert rows[0].module == "embed" and rows[0].rule == "fast" and rows[0].held == "shared + r, s"


def test_params_of_another_model_are_an_error() -> None:
    with pytest.raises(ValueError, match="params: Linear"):
        fe.describe(nn.Linear(2, 2), fe.ensemble_params(nn.PReLU(2), 2, reset=False))


@pytest.mark.filterwarnings("ignore:init. all members start equal:UserWarning")
def test_how_far_members_are_apart() -> None:
    model = nn.Sequential(nn.Conv1d(40, 60, 3, bias=False), nn.Flatten(), nn.Linear(60, 50, bias=False))
    for make, low, high in (
        (fe.ensemble_params, 1.3, 1.5),
        (lambda m, E: fe.batchensemble_params(m, E, flip=0.5), 1.3, 1.5),
        (lambda m, E: fe.batchensemble_params(m, E, r_std=0.1, s_std=0.1), 0.15, 0.25),
        (lambda m, E: fe.batchensemble_params(m, E, r_std=0.01, s_std=0.01), 0.015, 0.025),
        (lambda m, E: fe.batchensemble_params(m, E, init="ones"), 0.0, 0.0),
        (fe.lora_params, 0.0, 0.0),
    ):
        params = make(model, 3)
        found = fe.describe(model, params)
        members = [
            torch.cat([w.detach().flatten() for w in fe.member_params(model, params, i).values()]) for i in range(3)
        ]
        pairs = [(members[i] - members[i + 1]).norm() for i in range(2)]
        assert found.distance == pytest.approx(
            float(sum(pairs)) / float(members[1].norm() + members[2].norm()), rel=1e-4
        )
        assert low <= found.distance <= high
        assert ("the members' weights differ by only" in str(found)) is (high < 0.05 and make is not fe.lora_params)
    one = fe.describe(model, fe.ensemble_params(model, 1))
    assert math.isnan(one.distance) and "differ" not in str(one)
    with torch.device("meta"):
        shape_only = nn.Linear(3, 2)
    meta = fe.EnsembleParams(
        dict(shape_only.named_parameters()),
        {"weight_r": torch.ones(2, 2, device="meta"), "weight_s": torch.ones(2, 3, device="meta")},
    )
    assert math.isnan(fe.describe(shape_only, meta).distance)


def test_what_members_share_or_nothing_trains_does_not_count_in_the_distance() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    model[0].requires_grad_(False)
    model.register_parameter("steps", nn.Parameter(torch.tensor([1, 2**40]), requires_grad=False))
    for params in (
        fe.ensemble_params(model, 3, stacked="1.*"),
        fe.ensemble_params(model, 3, stacked=["*.weight", "*.bias", "steps"]),
        fe.batchensemble_params(model, 3, flip=0.5, layers="1"),
    ):
        assert 1.2 < fe.describe(model, params).distance < 1.6
