"""Ensembles of any PyTorch model, classic (deep) ones and BatchEnsemble, as pure functions of a parameter pytree."""

from functorch_ens import metrics, plots
from functorch_ens.anatomy import Layout, rank1_layout
from functorch_ens.compiling import compile
from functorch_ens.forward.forward import Forward, make_forward
from functorch_ens.layers.registry import rank1_rule
from functorch_ens.layers.weight import Rank1
from functorch_ens.params.describe import Description, describe
from functorch_ens.params.lora import lora_params
from functorch_ens.params.make import batchensemble_params, ensemble_buffers, ensemble_params
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.params.stack import member_params, stack_buffers, stack_params
from functorch_ens.predicting import predict
from functorch_ens.training.batches import bootstrap, index_batches
from functorch_ens.training.checkpoint import load_checkpoint, save_checkpoint
from functorch_ens.training.epochs import Fitted
from functorch_ens.training.fit import fit
from functorch_ens.training.gradients import Gradients
from functorch_ens.training.losses import cross_entropy, member_losses
from functorch_ens.training.optim import param_groups
from functorch_ens.training.step import TrainStep, make_train_step
from functorch_ens.uncertainty.measures import (
    Uncertainty,
    classification_uncertainty,
    disagreement,
    mean_log_probs,
    mean_probs,
    pairwise_kl,
    regression_uncertainty,
)
from functorch_ens.uncertainty.temperature import fit_temperature

__all__ = [
    "Description",
    "EnsembleParams",
    "Fitted",
    "Forward",
    "Gradients",
    "Layout",
    "Rank1",
    "TrainStep",
    "Uncertainty",
    "batchensemble_params",
    "bootstrap",
    "classification_uncertainty",
    "compile",
    "cross_entropy",
    "describe",
    "disagreement",
    "ensemble_buffers",
    "ensemble_params",
    "fit",
    "fit_temperature",
    "index_batches",
    "load_checkpoint",
    "lora_params",
    "make_forward",
    "make_train_step",
    "mean_log_probs",
    "mean_probs",
    "member_losses",
    "member_params",
    "metrics",
    "pairwise_kl",
    "param_groups",
    "plots",
    "predict",
    "rank1_layout",
    "rank1_rule",
    "regression_uncertainty",
    "save_checkpoint",
    "stack_buffers",
    "stack_params",
]
__version__ = "0.1.0"
