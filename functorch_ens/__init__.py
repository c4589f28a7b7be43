"""Ensembles of any PyTorch model, classic (deep) ones and BatchEnsemble, as pure functions of a parameter pytree."""

from functorch_ens import rules as _rules  # noqa: F401  it puts the fast rules into the registry
from functorch_ens.checkpoint import load_checkpoint, save_checkpoint
from functorch_ens.describe import Description, describe
from functorch_ens.fitting import Fitted, fit
from functorch_ens.forward import Forward, make_forward
from functorch_ens.losses import cross_entropy, member_losses
from functorch_ens.optimisers import param_groups
from functorch_ens.params import EnsembleParams, batchensemble_params, ensemble_buffers, ensemble_params
from functorch_ens.prediction import predict
from functorch_ens.rank1 import Layout, Rank1, rank1_layout, rank1_rule
from functorch_ens.sampling import bootstrap, index_batches
from functorch_ens.stacking import member_params, stack_buffers, stack_params
from functorch_ens.training import Gradients, TrainStep, make_train_step

__all__ = [
    "Description",
    "EnsembleParams",
    "Fitted",
    "Forward",
    "Gradients",
    "Layout",
    "Rank1",
    "TrainStep",
    "batchensemble_params",
    "bootstrap",
    "cross_entropy",
    "describe",
    "ensemble_buffers",
    "ensemble_params",
    "fit",
    "index_batches",
    "load_checkpoint",
    "make_forward",
    "make_train_step",
    "member_losses",
    "member_params",
    "param_groups",
    "predict",
    "rank1_layout",
    "rank1_rule",
    "save_checkpoint",
    "stack_buffers",
    "stack_params",
]
__version__ = "0.1.0"
