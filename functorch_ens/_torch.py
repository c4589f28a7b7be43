"""Every private name of torch that eager code needs: one function each, with a fallback for a torch that lacks it.

`PRIVATE` lists the names, which torch 2.11 to 2.14 all have, and the one feature that is lost without each. Neither the
import nor any answer depends on them: a test deletes each name in a process of its own, and trains. Methods of layers
are not in that list, because torch's own layers call them; they have tests in tests/test_torch.py.

Three things have no fallback, because torch itself rests on them: the module `torch.utils._pytree`, the class
`TorchDispatchMode`, and the dicts in which every `nn.Module` registers its parameters, buffers and hooks.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.autograd.forward_ad
import torch.nn.utils.parametrizations
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "pytree"]

log = logging.getLogger(__name__)

_NO_CHECKS = "bad values in labels and logits are not reported"
_MORE_MEMORY = "under torch.func.grad a chunk that is computed again keeps its intermediate values"
_FEWER_MODELS = "under autograd only operations that torch.func can follow are computed again for a chunk"
_NO_FLAGS = "models that set requires_grad of a tensor are computed by the loop"
_NO_HOOKS = "after a compilation that fails in torch.func.grad, torch.utils.checkpoint fails"
_LIBRARIES = "at a first call, gradients through operators of other libraries that have none of their own"
_AFTER_CTRL_C = "Ctrl-C at a certain moment leaves this thread inside vmap or a mode, as in torch itself"
_WHOLE_UPDATES = "large members are updated all at once, not part by part"

PRIVATE: dict[tuple[str, str], str] = {
    ("torch._C._functorch", "is_batchedtensor"): f"eager products take no short cut for a shared input; {_NO_CHECKS}",
    ("torch._C._functorch", "is_functorch_wrapped_tensor"): _NO_CHECKS,
    ("torch._C._functorch", "get_unwrapped"): f"{_NO_CHECKS}; what vmap hides from a model is not noticed",
    ("torch._C._functorch", "maybe_get_bdim"): "an activation that a hook keeps under vmap cannot be used afterwards",
    ("torch._C._functorch", "peek_interpreter_stack"): f"{_FEWER_MODELS}; {_MORE_MEMORY}",
    ("torch._C._functorch", "is_gradtrackingtensor"): _MORE_MEMORY,
    ("torch._C._functorch", "maybe_get_level"): _MORE_MEMORY,
    ("torch._C._functorch", "_unwrap_for_grad"): _MORE_MEMORY,
    ("torch._C._functorch", "get_inplace_requires_grad_allowed"): _NO_FLAGS,
    ("torch._C._functorch", "set_inplace_requires_grad_allowed"): _NO_FLAGS,
    ("torch._C._functorch", "get_dynamic_layer_stack_depth"): _AFTER_CTRL_C,
    ("torch._C._functorch", "pop_dynamic_layer_stack_and_undo_to_depth"): _AFTER_CTRL_C,
    ("torch._C", "_len_torch_function_stack"): _AFTER_CTRL_C,
    ("torch._C", "_pop_torch_function_stack"): _AFTER_CTRL_C,
    ("torch._C", "_DisableFuncTorch"): "a tensor that a model overwrites in its attributes may not be restored",
    ("torch.autograd.forward_ad", "_current_level"): "a forward with chunk_size has no forward-mode derivative",
    ("torch._C._autograd", "_saved_tensors_hooks_get_disabled_error_message"): _NO_HOOKS,
    ("torch._C._autograd", "_saved_tensors_hooks_enable"): _NO_HOOKS,
    ("torch._C._autograd", "_saved_tensors_hooks_disable"): _NO_HOOKS,
    ("torch.utils.checkpoint", "_checkpoint_without_reentrant_generator"): "models that checkpoint, with torch 2.11",
    ("torch.utils.checkpoint", "_checkpoint_without_reentrant_generator_impl"): "models that checkpoint",
    ("torch.utils._python_dispatch", "_disable_current_modes"): _LIBRARIES,
    ("torch.optim.optimizer", "_global_optimizer_pre_hooks"): _WHOLE_UPDATES,
    ("torch.optim.optimizer", "_global_optimizer_post_hooks"): _WHOLE_UPDATES,
    ("torch._guards", "detect_fake_mode"): "make_fx with symbolic sizes traces the loop",
    ("torch.nn.utils.parametrizations", "_SpectralNorm"): "spectral_norm in training is computed by the loop",
}
"""`{(module, name): what is lost without it}`."""

_private: dict[tuple[str, str], Any] = {
    (module, name): getattr(sys.modules.get(module), name, None) for module, name in PRIVATE
}
"""The same names to their values; None where this torch lacks one."""


# --------------------------------------------------------------------------------------------------------------------
# Transforms of torch.func

_is_batchedtensor = _private["torch._C._functorch", "is_batchedtensor"]
_is_wrapped = _private["torch._C._functorch", "is_functorch_wrapped_tensor"]
_get_unwrapped = _private["torch._C._functorch", "get_unwrapped"]
_bdim_of = _private["torch._C._functorch", "maybe_get_bdim"]
_peek = _private["torch._C._functorch", "peek_interpreter_stack"]
_is_gradtracking = _private["torch._C._functorch", "is_gradtrackingtensor"]
_level_of = _private["torch._C._functorch", "maybe_get_level"]
_unwrap_for_grad = _private["torch._C._functorch", "_unwrap_for_grad"]
_hooks_forbidden = _private["torch._C._autograd", "_saved_tensors_hooks_get_disabled_error_message"]
_allow_hooks = _private["torch._C._autograd", "_saved_tensors_hooks_enable"]
_forbid_hooks = _private["torch._C._autograd", "_saved_tensors_hooks_disable"]
_flags_allowed = _private["torch._C._functorch", "get_inplace_requires_grad_allowed"]
_allow_flags = _private["torch._C._functorch", "set_inplace_requires_grad_allowed"]
_disable = _private["torch._C", "_DisableFuncTorch"]


def is_batched(tensor: Tensor) -> bool:
    """Whether the outermost wrapper of `tensor` is that of vmap. Fallback: False."""
    return _is_batchedtensor is not None and _is_batchedtensor(tensor)


def is_under_vmap(tensor: Tensor) -> bool:
    """Whether any wrapper of `tensor` is that of vmap, so that Python cannot read its values. Fallback: True."""
    if _is_batchedtensor is None or _is_wrapped is None or _get_unwrapped is None:
        return True
    while _is_wrapped(tensor):
        if _is_batchedtensor(tensor):
            return True
        tensor = _get_unwrapped(tensor)  # a vmap may be below grad's wrapper
    return False


def is_wrapped(tensor: Tensor) -> bool:
    """Whether `tensor` is a wrapper of any transform. Fallback: False."""
    return _is_wrapped is not None and _is_wrapped(tensor)


def below_vmap(tensor: Tensor) -> Tensor:
    """`tensor` without the wrappers of vmap around it. Fallback: `tensor` itself."""
    while _get_unwrapped is not None and is_batched(tensor):
        tensor = _get_unwrapped(tensor)
    return tensor


def unwrap_in_place(tensor: Tensor) -> None:
    """Make a batched tensor, wherever it is kept, the tensor that it wraps, with the mapped axis first.

    Fallback: it stays as it is.
    """
    if _get_unwrapped is None or _bdim_of is None:
        return
    try:
        with outside_transforms():
            inner = _get_unwrapped(tensor).movedim(_bdim_of(tensor), 0)  # a view, for torch swaps none that others hold
        torch.utils.swap_tensors(tensor, inner)
    except RuntimeError as error:  # torch swaps no tensor that something in C++ holds
        log.warning("a tensor that the model keeps from a call by vmap cannot be used afterwards: %s", error)


def inside_transform() -> bool:
    """Whether a transform of torch.func is in force. Fallback: True, and what torch.func cannot follow then fails."""
    return _peek is None or _peek() is not None


_depth = _private["torch._C._functorch", "get_dynamic_layer_stack_depth"]
_pop_to_depth = _private["torch._C._functorch", "pop_dynamic_layer_stack_and_undo_to_depth"]
_function_modes = _private["torch._C", "_len_torch_function_stack"]
_pop_function_mode = _private["torch._C", "_pop_torch_function_stack"]
# torch itself reads these names, and those of its operators, wherever it dispatches.
_pop_dispatch_mode: Any = getattr(torch.utils._python_dispatch, "_pop_mode", None)
_dispatch_modes: Any = getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", None)


def modes_in_force() -> list[Any]:
    """The modes that see every operator of this thread, the innermost last. Fallback: none are known."""
    return [] if _dispatch_modes is None else list(_dispatch_modes())


def layers_in_force() -> tuple[int, int, int]:
    """How many transforms and modes of each kind this thread is in. Fallback, for each: 0."""
    return (
        0 if _depth is None else int(_depth()),
        0 if _function_modes is None else int(_function_modes()),
        len(modes_in_force()),
    )


def leave_layers_beyond(layers: tuple[int, int, int]) -> None:
    """Leave the transforms and modes that an interrupt has kept in force. Fallback: they stay."""
    if None in (_pop_to_depth, _pop_function_mode, _pop_dispatch_mode):
        return
    depth, functions, dispatches = layers
    while layers_in_force()[1] > functions:
        _pop_function_mode()
    while layers_in_force()[2] > dispatches:
        _pop_dispatch_mode()
    if layers_in_force()[0] > depth:
        _pop_to_depth(depth)


def below_grad(tensor: Tensor) -> Tensor:
    """`tensor` without the innermost `torch.func.grad` around it, if that wraps it. Fallback: `tensor` itself."""
    if _peek is None or _is_gradtracking is None or _level_of is None or _unwrap_for_grad is None:
        return tensor
    innermost = _peek()
    if innermost is None or not _is_gradtracking(tensor) or _level_of(tensor) != innermost.level():
        return tensor
    return _unwrap_for_grad(tensor, innermost.level())


def outside_transforms() -> AbstractContextManager[Any]:
    """A context in which operations act on the tensors themselves, whatever transform is in force. Fallback: none."""
    return nullcontext() if _disable is None else _disable()


@contextmanager
def flags_can_be_set() -> Iterator[None]:
    """Inside, `requires_grad` of a tensor can be set, which torch refuses under a transform. Fallback: it does."""
    if _flags_allowed is None or _allow_flags is None:
        yield
        return
    before = _flags_allowed()
    _allow_flags(True)
    try:
        yield
    finally:
        _allow_flags(before)


@contextmanager
def saved_tensor_hooks_kept() -> Iterator[None]:
    """Afterwards hooks on saved tensors, which checkpointing needs, are allowed or forbidden as they were before.

    `torch.func.grad` forbids them while it works. torch.compile may leave it so where it fails. Fallback: they stay so.
    """
    if _hooks_forbidden is None or _allow_hooks is None or _forbid_hooks is None:
        yield
        return
    before = _hooks_forbidden()
    try:
        yield
    finally:
        if _hooks_forbidden() != before:
            _allow_hooks() if before is None else _forbid_hooks(before)


def is_compiling() -> bool:
    """Whether this thread is traced by a compiler or by torch.export; `torch.compiler.is_compiling` is for all threads.

    Fallback: in all threads, while one traces without Dynamo.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and is_traced(())


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether a compiler or make_fx traces operations on `tensors`. Fallback: whether a compiler does."""
    if torch.compiler.is_dynamo_compiling():
        return True
    detect = _private["torch._guards", "detect_fake_mode"]
    return torch.compiler.is_compiling() if detect is None else detect(tensors) is not None


_CALL = nn.Module.__call__


def wait_for_traces(error: Exception, seconds: float = 60) -> bool:
    """Whether another thread's tracing has raised `error` here, and is over now.

    While torch.fx traces in any thread, it has its own function in the place of `nn.Module.__call__`, for all threads.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if not isinstance(error, NameError) or trace is None or "_symbolic_trace" not in trace.tb_frame.f_code.co_filename:
        return False
    end = time.monotonic() + seconds
    while nn.Module.__call__ is not _CALL and time.monotonic() < end:
        time.sleep(1e-3)
    return nn.Module.__call__ is _CALL


_operators = tuple(
    kind for name in ("OpOverload", "OpOverloadPacket") if (kind := getattr(torch._ops, name, None)) is not None
)


def is_of_a_library(function: Any) -> bool:
    """Whether `function` is an operator that is registered in another library than torch's own. Fallback: False."""
    if not isinstance(function, _operators):
        return False
    packet: Any = getattr(function, "overloadpacket", function)
    return not getattr(packet, "_qualified_op_name", "aten::").startswith(("aten::", "prims::", "prim::"))


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """A context without the modes that see every operator. Fallback: with them."""
    disable = _private["torch.utils._python_dispatch", "_disable_current_modes"]
    return nullcontext() if disable is None else disable()


def arguments_of(operator: Any) -> list[Any]:
    """The arguments in the schema of an operator, each with its `name` and `default_value`. Fallback: none."""
    return list(getattr(getattr(operator, "_schema", None), "arguments", ()))


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken. Fallback: False."""
    level: int = getattr(torch.autograd.forward_ad, "_current_level", -1)  # read now: torch assigns to it
    return level >= 0


def version(tensor: Tensor) -> int:
    """The version counter of `tensor`, which every write in place raises.

    Tensors made in inference mode have none. Fallback, and theirs: 0, so that no write is noticed.
    """
    try:
        found: int = getattr(tensor, "_version", 0)
    except RuntimeError:
        return 0
    return found


def normal(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where it was made in inference mode, so that it can be trained later."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def has_symbolic_sizes(tensors: Iterable[Tensor]) -> bool:
    """Whether a compiler traces one of `tensors` with a symbol for one of its sizes. Dynamo can trace the question."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # not at the top: it imports sympy

    return any(not has_static_value(size) for tensor in tensors for size in tensor.shape)


# --------------------------------------------------------------------------------------------------------------------
# Modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict in which `module` registers its own parameters; a read through it passes properties of the class by."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict in which `module` registers its own buffers."""
    return module._buffers


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether backward hooks are registered on `module` itself."""
    return any(getattr(module, name, None) for name in ("_backward_hooks", "_backward_pre_hooks"))


def forward_hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward hooks of `module`, those before and those after its forward. Fallback: none."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    return [hook for name in names for hook in getattr(module, name, {}).values()]


def every_module_has_backward_hooks() -> bool:
    """Whether backward hooks are registered on all modules at once; every call of a module reads these names itself."""
    names = ("_global_backward_hooks", "_global_backward_pre_hooks")
    return any(getattr(torch.nn.modules.module, name, None) for name in names)


def hooks_of(tensor: Tensor) -> list[Callable[[Tensor], Any]]:
    """The hooks on the gradient of `tensor`, in their order. Fallback: none."""
    return list((getattr(tensor, "_backward_hooks", None) or {}).values())


def any_has_hooks(tensors: Iterable[Tensor]) -> bool:
    """Whether one of `tensors` has hooks on its gradient, asked fast."""
    return any(getattr(tensor, "_backward_hooks", None) for tensor in tensors)


def has_late_hooks(tensor: Tensor) -> bool:
    """Whether hooks run after a gradient is accumulated in `tensor.grad`. Fallback: False."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


REGISTRIES = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"))
"""The attributes in which every module registers what it is made of."""


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` returned `module`: it is a wrapper around another module."""
    return compiled_from(module) is not None


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` was given, where it returned `module`; None for any other module."""
    return module._modules.get("_orig_mod") if "dynamo_ctx" in vars(module) else None


def reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """What initialises the parameters of `module`: `reset_parameters`, or the private form of it that attention has."""
    found: Callable[[], Any] | None = getattr(module, "reset_parameters", None)
    return found or getattr(module, "_reset_parameters", None)


def convolve(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution as `layer` does it, padding modes included, with another weight and bias."""
    return layer._conv_forward(input, weight, bias)


def output_padding(layer: Any, *arguments: Any) -> list[int]:
    """The output padding of the transposed convolution `layer`."""
    return layer._output_padding(*arguments)


CONVOLVES, PADS = "_conv_forward", "_output_padding"
"""The methods behind `convolve` and `output_padding`. Fallback, for layers without them: no fast rule, no pure form."""


def check_input_dim(layer: Any, input: Tensor) -> None:
    """ValueError where `input` has not the axes that a norm expects. Fallback: no check."""
    if hasattr(layer, "_check_input_dim"):
        layer._check_input_dim(input)


def common_base(*classes: type[nn.Module]) -> type[nn.Module]:
    """The nearest class that all `classes` inherit from: torch's own private bases, without their names."""
    first, *others = classes
    return next(base for base in first.__mro__ if all(issubclass(other, base) for other in others))


class _Here(threading.local):
    are_passed_over = False


_here = _Here()


def past_checkpoints(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `function`. Inside, `torch.utils.checkpoint` only calls what it is given; in this thread alone.

    Its second call of that, in the backward pass, would need one member's tensors, which the model holds for one call
    alone; and torch.func cannot follow it.
    """
    before = _here.are_passed_over
    try:
        _here.are_passed_over = True
        return function(*args, **kwargs)
    finally:
        _here.are_passed_over = before


def _no_hooks(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield  # checkpoint calls the function between the first and the second step


def _make_checkpoints_ask() -> None:
    """Once, when this module is imported: from then on checkpointing asks the thread whether it is passed over."""
    checkpoint: Any = torch.utils.checkpoint
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
        if original := getattr(checkpoint, name, None):
            setattr(checkpoint, name, _asking(original))
    reentrant = getattr(checkpoint, "CheckpointFunction", None)
    if reentrant is not None:

        def of_function(cls: Any, function: Any, preserve: bool, *args: Any) -> Any:
            if _here.are_passed_over:
                return function(*args)
            return super(reentrant, cls).apply(function, preserve, *args)

        reentrant.apply = classmethod(of_function)


def _asking(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def ask(*args: Any, **kwargs: Any) -> Any:
        return _no_hooks() if _here.are_passed_over else original(*args, **kwargs)

    return ask


_make_checkpoints_ask()


# --------------------------------------------------------------------------------------------------------------------
# Optimisers


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether any hook runs before or after `optimizer.step()`. Fallback: True."""
    of_all = [_private["torch.optim.optimizer", f"_global_optimizer_{when}_hooks"] for when in ("pre", "post")]
    own = [getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
    return any(hooks is None or len(hooks) > 0 for hooks in (*of_all, *own))
