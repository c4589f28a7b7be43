"""lora_params: what is in them, how members start, what is trained, and every tool that takes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, MixtralExperts, model_case, randn, small_net, source
from oracle import assert_same, assert_untouched, compiler, loop, low_rank, member_weights, snapshot, tensors_of
from plain import with_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo_written import Matrices, Tied

import functorch_ens as fe

# --------------------------------------------------------------------------------------------------------------------
# What is in them


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_kinds(name: str) -> None:
    model = model_case(name).model
    own, before = dict(model.named_parameters()), snapshot(model)
    params = fe.lora_params(model, 3, rank=1)
    assert params.E == 3 and all(torch.equal(params.shared[k], own[k]) for k in own) and set(params.shared) == set(own)
    weights = {key.removesuffix("_r") for key in fe.batchensemble_params(model, 3).stacked if key.endswith("_r")}
    assert set(params.stacked) == {f"{weight}_lora_{each}" for weight in weights for each in "AB"}
    for weight in weights:
        A, B = params.stacked[f"{weight}_lora_A"], params.stacked[f"{weight}_lora_B"]
        first = own[weight].shape[:2].numel() if weight.startswith("experts") else len(own[weight])
        rest = own[weight].numel() // first
        assert A.shape[:2] == (3, 1) and B.shape[::2] == (3, 1) and {A.shape[2], B.shape[1]} == {first, rest}
        assert A.abs().min() > 0 and not B.any() and not torch.equal(A[0], A[1])
    for tensor in params.stacked.values():
        assert tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float64 and tensor.is_contiguous()
    for key, tensor in params.shared.items():
        assert tensor.is_leaf and not tensor.requires_grad and tensor.data_ptr() != own[key].data_ptr()
    assert_untouched(before, model)


def test_the_sides_of_each_layer() -> None:
    layers: dict[str, tuple[nn.Module, list[int], list[int]]] = {
        "linear": (nn.Linear(5, 7), [2, 3, 5], [2, 7, 3]),
        "conv": (nn.Conv2d(4, 6, 3, groups=2), [2, 3, 18], [2, 6, 3]),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), [2, 3, 4], [2, 27, 3]),
        "embedding": (nn.Embedding(9, 4), [2, 3, 9], [2, 4, 3]),
        "bilinear": (nn.Bilinear(3, 4, 5), [2, 3, 12], [2, 5, 3]),
    }
    for layer, A, B in layers.values():
        stacked = fe.lora_params(layer, 2, rank=3).stacked
        assert [list(stacked[f"weight_lora_{each}"].shape) for each in "AB"] == [A, B]
    attention = fe.lora_params(nn.MultiheadAttention(4, 2), 2, rank=3, layers="").stacked
    assert {name: list(x.shape) for name, x in attention.items()} == {
        "in_proj_weight_lora_A": [2, 3, 4],
        "in_proj_weight_lora_B": [2, 12, 3],
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_member_starts_as_the_network_itself(name: str) -> None:
    case = model_case(name)
    params = fe.lora_params(case.model, 2, rank=1)
    for strategy in ("auto", "loop"):
        got = fe.make_forward(case.model, strategy=strategy)(params, *case.args)
        assert_same(got, loop(case.model, fe.ensemble_params(case.model, 2, reset=False), *case.args), tolerance=1e-14)


def test_one_member() -> None:
    model, x = small_net().double().eval(), randn(5, 3)
    params = low_rank(model, 1, 2, rank1=False)
    assert_same(fe.make_forward(model)(params, x), loop(model, params, x))


# --------------------------------------------------------------------------------------------------------------------
# How A starts


def test_the_generator_decides_alone_for_every_dtype() -> None:
    model, wide = small_net(), small_net().double()
    before = torch.get_rng_state()
    first, again, other = (fe.lora_params(model, 3, rank=2, generator=source(seed)).stacked for seed in (1, 1, 2))
    double = fe.lora_params(wide, 3, rank=2, generator=source(1)).stacked
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, double[name].float())
        assert name.endswith("_B") or not torch.equal(tensor, other[name])
    fe.lora_params(model, 3, rank=2)
    assert not torch.equal(torch.get_rng_state(), before), "the global generator did not advance"


@pytest.mark.parametrize(("init", "spread"), [("uniform", 3**-0.5), ("normal", 1.0)])
def test_the_inits(init: str, spread: float) -> None:
    for layer, terms in ((nn.Linear(400, 50), 400), (nn.Conv1d(40, 50, 10), 400), (nn.Embedding(400, 50), 1)):
        A = fe.lora_params(layer.double(), 5, init=init, generator=source()).stacked["weight_lora_A"].detach()
        assert abs(A.std().item() * terms**0.5 / spread - 1) < 0.02 and abs(A.mean().item()) < 0.02 * terms**-0.5
        assert bool(A.abs().max() * terms**0.5 <= 1) is (init == "uniform")


def test_each_expert_sums_its_own_inputs() -> None:
    model = MixtralExperts(4, 100, 50, transposed=True).double()  # [4, in, out]
    A = fe.lora_params(model, 5, init="normal", generator=source()).stacked["up_proj_lora_A"].detach()
    assert A.shape == (5, 8, 400) and abs(A.std().item() * 100**0.5 - 1) < 0.02


def test_an_init_of_the_users_own() -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def init(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        asked.append((name, shape))
        return torch.randn(shape, generator=generator) + 7

    model = small_net()
    stacked = fe.lora_params(model, 3, rank=2, init=init, generator=source(), layers="0").stacked
    assert asked == [("0.weight_lora_A", (3, 2, 3))] and stacked["0.weight_lora_A"].mean() > 5
    again = fe.lora_params(model, 3, rank=2, init=init, generator=source(), layers="0").stacked
    assert torch.equal(stacked["0.weight_lora_A"], again["0.weight_lora_A"])
    with pytest.raises(ValueError, match=r"init: expected a tensor \[3, 2, 3\] for 0.weight_lora_A, it returned \[2\]"):
        fe.lora_params(model, 3, rank=2, init=lambda name, shape, generator: torch.ones(2))
    with pytest.raises(TypeError, match="init: expected a function that returns a tensor"):
        fe.lora_params(model, 3, rank=2, init=lambda name, shape, generator: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("init", ["uniform", "normal", lambda name, shape, generator: torch.ones(shape)])
def test_alpha_scales_the_start_of_A_and_so_the_gradient_of_B(init: Any) -> None:
    model, x = nn.Linear(6, 5).double(), randn(7, 6)
    slopes = {}
    for alpha in (None, 4.0, 12.0):
        params = fe.lora_params(model, 2, rank=4, alpha=alpha, init=init, generator=source())
        fe.make_forward(model)(params, x).square().sum().backward()
        A, B = params.stacked["weight_lora_A"], params.stacked["weight_lora_B"]
        assert B.grad is not None and A.grad is not None and B.grad.abs().max() > 0 and not A.grad.any()
        slopes[alpha] = A.detach(), B.grad
    for none, same, thrice in zip(slopes[None], slopes[4.0], slopes[12.0], strict=True):
        assert torch.equal(none, same)
        assert_same(thrice, 3 * none)


def test_merged_weights_have_no_hidden_factor() -> None:
    model = nn.Linear(6, 5).double()
    params = fe.lora_params(model, 2, rank=4, alpha=12)
    A, B = params.stacked["weight_lora_A"], params.stacked["weight_lora_B"]
    with torch.no_grad():
        B.normal_()
    assert_same(fe.member_params(model, params, 1)["weight"], model.weight + B[1] @ A[1])


# --------------------------------------------------------------------------------------------------------------------
# Choosing


def test_layers_chooses_as_in_a_batchensemble() -> None:
    model = nn.ModuleDict({"net": small_net(), "attention": nn.MultiheadAttention(4, 2), "words": nn.Embedding(5, 4)})
    choices: list[Any] = ["net.0", ["attention*", "words"], lambda name, module: isinstance(module, nn.Linear)]
    for layers in choices:
        both = fe.batchensemble_params(model, 2, layers=layers).stacked
        found = fe.lora_params(model, 2, rank=1, layers=layers).stacked
        assert {n.partition("_lora")[0] for n in found} == {n.removesuffix("_r").removesuffix("_s") for n in both}


def test_stacked_is_a_trained_copy_for_each_member() -> None:
    model = small_net().requires_grad_(False)
    params = fe.lora_params(model, 3, rank=2, stacked="3.*")
    assert set(params.stacked) == {"0.weight_lora_A", "0.weight_lora_B", "3.weight", "3.bias"}
    assert all(torch.equal(member, model.get_parameter("3.weight")) for member in params.stacked["3.weight"])
    assert all(tensor.requires_grad for tensor in params.stacked.values())
    assert not any(tensor.requires_grad for tensor in params.shared.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"E": 0}, ValueError, "E: expected a positive int, got 0"),
        ({"rank": 0}, ValueError, "rank: expected a positive int, got 0"),
        ({"rank": 2.0}, TypeError, "rank: expected a positive int, got 2.0"),
        ({"rank": 4}, ValueError, "rank: expected at most 3, the largest rank that the chosen weights can have, got 4"),
        ({"alpha": 0}, ValueError, "alpha: expected a finite number > 0, got 0: A and B would both be 0"),
        ({"alpha": -1.0}, ValueError, "alpha: expected a finite number >= 0, got -1.0"),
        ({"alpha": "1"}, TypeError, "alpha: expected a finite number >= 0, got '1'"),
        ({"init": "ones"}, ValueError, r"init: expected one of \['uniform', 'normal'\], or a function .*, got 'ones'"),
        ({"init": lambda: None}, TypeError, "init: expected a function"),
        ({"layers": "nothing"}, ValueError, "layers: pattern 'nothing' chooses no weight"),
        ({"layers": []}, ValueError, "layers: no weight of Sequential would get lora_A and lora_B"),
        ({"stacked": "nothing"}, ValueError, "stacked: pattern 'nothing' matches none"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got 3"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fe.lora_params(small_net(), **{"E": 2, "rank": 2, **options})


def test_a_weight_smaller_than_the_rank_gets_it_too() -> None:
    params = fe.lora_params(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), 3)
    assert params.stacked["1.weight_lora_A"].shape == (3, 8, 8) and params.stacked["1.weight_lora_B"].shape == (3, 2, 8)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_side_of_no_numbers() -> None:
    stacked = fe.lora_params(nn.Sequential(nn.Linear(4, 4), nn.Linear(0, 4), nn.Linear(4, 0)), 3, rank=2).stacked
    assert stacked["1.weight_lora_A"].shape == (3, 2, 0) and stacked["2.weight_lora_B"].shape == (3, 0, 2)


def test_a_name_that_a_factor_would_take_is_an_error() -> None:
    model = nn.Linear(3, 3)
    model.weight_lora_A = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="already has a parameter named weight_lora_A; leave weight out of layers"):
        fe.lora_params(model, 2, rank=2)


# --------------------------------------------------------------------------------------------------------------------
# What takes them


@pytest.mark.parametrize("name", [name for name in MODELS if name != "weight norm"])
@pytest.mark.parametrize("rank1", [False, True])
def test_a_member_goes_back_into_an_ordinary_network(name: str, rank1: bool) -> None:
    case = model_case(name)
    params = low_rank(case.model, 2, 2, rank1)
    together = fe.make_forward(case.model)(params, *case.args)
    for i in range(2):
        case.model.load_state_dict(fe.member_params(case.model, params, i), strict=False)
        alone = case.model(*case.args)
        assert_same(torch.utils._pytree.tree_map(lambda stack, i=i: stack[i], together), alone)


def test_gradients_flow_through_member_params() -> None:
    model = nn.Linear(3, 4).double()
    params = low_rank(model, 2, 2, rank1=False)
    fe.member_params(model, params, 1)["weight"].sum().backward()
    A, B = params.stacked["weight_lora_A"], params.stacked["weight_lora_B"]
    assert A.grad is not None and B.grad is not None
    assert_same(A.grad[1], B.detach()[1].sum(0)[:, None].expand(2, 3))
    assert not A.grad[0].any() and not B.grad[0].any()


def test_describe_tells_the_rank_and_the_rule() -> None:
    model = nn.ModuleDict({"a": nn.Linear(9, 8), "b": nn.Bilinear(9, 9, 9), "c": nn.Linear(9, 2)})
    lora = fe.lora_params(model, 4, stacked="c.*")
    rows = {(row.module, row.name): row for row in fe.describe(model, lora).rows}
    assert (rows["a", "weight"].held, rows["a", "weight"].rule) == ("shared + lora 8", "fast")
    assert rows["a", "weight"].parameters == 72 + 4 * 8 * (9 + 8)
    assert (rows["b", "weight"].held, rows["b", "weight"].rule) == ("shared + lora 8", "fallback")
    assert (rows["c", "weight"].held, rows["c", "weight"].rule) == ("stacked", "none")
    both = fe.EnsembleParams(lora.shared, lora.stacked | fe.batchensemble_params(model, 4, layers="a").stacked)
    row = fe.describe(model, both).rows[0]
    assert (row.held, row.rule) == ("shared + r, s + lora 8", "fast")
    assert row.bytes == 4 * row.parameters == 4 * (72 + 4 * 8 * (9 + 8) + 4 * (9 + 8))


def test_param_groups_train_the_factors_and_heads_alone() -> None:
    model = small_net()
    lora = fe.lora_params(model, 3, rank=2, stacked="3.*")
    groups = fe.param_groups(lora, lr=0.1, weight_decay=0.2)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("lora", 0.2), ("stacked", 0.2)]
    held = [id(tensor) for group in groups for tensor in group["params"]]
    assert held == [id(tensor) for tensor in lora.stacked.values()]
    both = fe.EnsembleParams(lora.shared, lora.stacked | fe.batchensemble_params(model, 3, layers="0").stacked)
    names = [group["name"] for group in fe.param_groups(both, lr=0.1)]
    assert names == ["rank-1", "lora", "stacked"]
    sweep = fe.param_groups(lora, lr=[0.1, 0.2, 0.3])  # nothing that is shared is trained
    assert [group["name"] for group in sweep[:3]] == [f"lora of member {i}" for i in range(3)]
    assert [group["lr"] for group in sweep] == [0.1, 0.2, 0.3] * 2


def _plainly(model: nn.Module, params: fe.EnsembleParams, steps: list[Any], lr: float) -> list[dict[str, Tensor]]:
    """The merged weights of each member after SGD on its tensors, one member after another, in a plain loop."""
    stacks = {name: stack.detach().clone() for name, stack in params.stacked.items()}
    for x, y in steps:
        now = fe.EnsembleParams(params.shared, {name: x.clone().requires_grad_() for name, x in stacks.items()})
        losses = [
            F.cross_entropy(with_weights(model, member_weights(model, now, i), {})(x), y) for i in range(params.E)
        ]
        slopes = torch.autograd.grad(sum(losses), list(now.stacked.values()))  # type: ignore[arg-type]
        stacks = {name: x - lr * slope for (name, x), slope in zip(stacks.items(), slopes, strict=True)}
    return [member_weights(model, fe.EnsembleParams(params.shared, stacks), i) for i in range(params.E)]


def _trains(model: nn.Module, x: Tensor, rank1: bool, strategy: str, compile: Any) -> None:
    params = fe.lora_params(model, 3, rank=2, generator=source())
    if rank1:
        vectors = fe.batchensemble_params(model, 3, init="random_sign", generator=source()).stacked
        params = fe.EnsembleParams(params.shared, params.stacked | vectors)
    steps = [(x.roll(k, 0), torch.arange(len(x)) % 2) for k in range(3)]
    frozen = {name: tensor.clone() for name, tensor in params.shared.items()}
    want = _plainly(model, params, steps, lr=0.3)
    optimizer = torch.optim.SGD(fe.param_groups(params, lr=0.3))
    step = fe.make_train_step(fe.make_forward(model, strategy=strategy), F.cross_entropy, optimizer, compile=compile)
    for batch in steps:
        step(params, *batch)
    assert step.compiled_by == ("functorch_ens" if compile else "eager")
    for i in range(3):
        assert_same({name: x for name, x in fe.member_params(model, params, i).items() if name in want[i]}, want[i])
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in params.shared.items())
    first, second = (fe.member_params(model, params, i) for i in range(2))
    assert any(not torch.allclose(first[name], second[name]) for name in first), "the members did not part"


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("rank1", [False, True])
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_three_steps_train_as_merged_weights_do(rank1: bool, strategy: str) -> None:
    _trains(_mlp(), randn(8, 6), rank1, strategy, compile=False)
    conv = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)).double()
    _trains(conv, randn(8, 2, 3), rank1, strategy, compile=False)


@pytest.mark.compile
@pytest.mark.parametrize("rank1", [False, True])
def test_a_compiled_step_trains_as_merged_weights_do(rank1: bool) -> None:
    _trains(_mlp(), randn(8, 6), rank1, "auto", compile={"fullgraph": True, "backend": compiler()})


def test_tied_weights_and_bare_matrices_train_too() -> None:
    model = Tied().double()
    params = low_rank(model, 2, 2, rank1=False)
    x = torch.randint(5, (2, 3))
    assert_same(fe.make_forward(model)(params, x), loop(model, params, x))
    matrices = Matrices().double()
    assert any(name.endswith("lora_A") for name in fe.lora_params(matrices, 2, rank=1).stacked)


def test_a_shared_A_with_own_Bs() -> None:
    """A tensor is in `shared` or in `stacked`, as any other."""
    model, x = _mlp(), randn(8, 6)
    given = low_rank(model, 3, 2, rank1=False)
    shared = given.shared | {name: stack.detach()[0] for name, stack in given.stacked.items() if name.endswith("_A")}
    stacked = {name: stack for name, stack in given.stacked.items() if name.endswith("_B")}
    params = fe.EnsembleParams(shared, stacked)
    for strategy in ("vmap", "loop"):
        assert_same(fe.make_forward(model, strategy=strategy)(params, x), loop(model, params, x))


def test_fit_stops_members_and_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """Members share nothing that is trained, so each can stop alone and get its best parameters back."""
    model, x = _mlp(), randn(16, 6)
    y = torch.arange(16) % 4

    def run(epochs: int, checkpoint: Path | None, patience: int | None = None) -> tuple[fe.EnsembleParams, fe.Fitted]:
        params = fe.lora_params(model, 3, rank=2, generator=source())
        step = fe.make_train_step(
            fe.make_forward(model), F.cross_entropy, torch.optim.SGD(fe.param_groups(params, lr=0.5)), compile=False
        )
        scores = iter([[1.0, 1.0, 1.0], [0.5, 2.0, 0.5], [0.4, 2.0, 0.6], [0.3, 2.0, 0.2]])
        fitted = fe.fit(
            step,
            params,
            lambda g: [(x, y)],
            epochs=epochs,
            evaluate=lambda params, buffers: {"nll": torch.tensor(next(scores))},
            monitor="nll",
            patience=patience,
            checkpoint=checkpoint,
            generator=source(),
            progress=False,
        )
        return params, fitted

    whole, _ = run(4, None)
    run(2, tmp_path / "run.pt")
    resumed, _ = run(4, tmp_path / "run.pt")
    assert_same(tensors_of(resumed), tensors_of(whole))
    stopped, _ = run(4, None, patience=1)
    once, _ = run(1, None)
    assert_same(stopped.stacked["0.weight_lora_B"][1], once.stacked["0.weight_lora_B"][1])
    assert not torch.allclose(stopped.stacked["0.weight_lora_B"][0], once.stacked["0.weight_lora_B"][0])


def test_predict_and_a_saved_file(tmp_path: Path) -> None:
    model, x = _mlp(), randn(9, 6)
    params = low_rank(model, 3, 2, rank1=True)
    fe.save_checkpoint({"params": params}, tmp_path / "lora.pt")
    loaded = fe.load_checkpoint(tmp_path / "lora.pt")["params"]
    got = fe.predict(fe.make_forward(model, chunk_size=2), loaded, x, batch_size=4, progress=False)
    assert_same(got, loop(model, params, x).detach())


def test_hooks_on_a_weight_see_the_gradient_of_the_merged_one() -> None:
    model, x = nn.Linear(3, 4).double(), randn(5, 3)
    seen: list[Tensor] = []
    model.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    params = low_rank(model, 2, 2, rank1=True)
    output = fe.make_forward(model, strategy="loop")(params, x)
    assert_same(
        output, torch.stack([F.linear(x, member_weights(model, params, i)["weight"], model.bias) for i in (0, 1)])
    )
    output.sum().backward()
    want = torch.ones(5, 4, dtype=torch.float64).T @ x
    assert len(seen) == 2
    for gradient in seen:
        assert_same(gradient, want)


def test_made_in_inference_mode_they_can_be_trained() -> None:
    model = _mlp()
    with torch.inference_mode():
        params = fe.lora_params(model, 2, rank=2)
    fe.make_forward(model)(params, randn(4, 6)).sum().backward()
    assert all(tensor.grad is not None for tensor in tree_leaves(params.stacked))


def test_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.lora_params(small_net().requires_grad_(False), 2, rank=2)


def test_factors_that_nothing_could_train_are_refused_and_equal_ones_are_told() -> None:
    model = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="init: weight_lora_A starts at 0, as B does"):
        fe.lora_params(model, 3, rank=2, init=lambda name, shape, generator: torch.zeros(shape))
    with pytest.warns(UserWarning, match="all members start equal") as told:
        fe.lora_params(model, 3, rank=2, init=lambda name, shape, generator: torch.ones(shape))
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="E: got 1, and one member is no ensemble"):
        fe.lora_params(model, 1, rank=2)
