"""Ensembles of any PyTorch model, classic (deep) ones and BatchEnsemble, as pure functions of a parameter pytree."""

from functorch_ens import rules as _rules  # noqa: F401  it puts the fast rules into the registry
from functorch_ens.describe import Description, describe
from functorch_ens.forward import Forward, make_forward
from functorch_ens.params import EnsembleParams, batchensemble_params, ensemble_buffers, ensemble_params
from functorch_ens.rank1 import Layout, Rank1, rank1_layout, rank1_rule
from functorch_ens.stacking import member_params, stack_buffers, stack_params
from functorch_ens.training import TrainStep, make_train_step, member_losses

__all__ = [
    "Description",
    "EnsembleParams",
    "Forward",
    "Layout",
    "Rank1",
    "TrainStep",
    "batchensemble_params",
    "describe",
    "ensemble_buffers",
    "ensemble_params",
    "make_forward",
    "make_train_step",
    "member_losses",
    "member_params",
    "rank1_layout",
    "rank1_rule",
    "stack_buffers",
    "stack_params",
]
__version__ = "0.1.0"
