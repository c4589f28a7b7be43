"""`predict`: the outputs of all members for a whole data set, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from tqdm import tqdm

from functorch_ens._torch import pytree
from functorch_ens.checks import (
    advice,
    check_bool,
    check_callable,
    check_compile,
    check_positive_int,
    check_tensor,
    first_line,
    shown,
)
from functorch_ens.compiling import compile as compile_function
from functorch_ens.forward.failures import OF_THE_MACHINE
from functorch_ens.forward.forward import Forward
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.trees import Form, cut_rows, length_of, take_apart

log = logging.getLogger(__name__)


def predict(
    forward: Forward,
    params: EnsembleParams,
    *inputs: Any,
    buffers: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    prepare: Callable[..., Any] | None = None,
    progress: bool | None = None,
    compile: bool | Mapping[str, Any] = False,
    **kwargs: Any,
) -> Any:
    """Compute every member's output for all of `inputs`, in eval mode and without gradients, in batches.

    >>> import torch, functorch_ens as fe
    >>> model = torch.nn.Linear(3, 2)
    >>> fe.predict(fe.make_forward(model), fe.ensemble_params(model, E=5), torch.ones(1000, 3)).shape
    torch.Size([5, 1000, 2])

    Args:
        forward: from `make_forward`; with `member_inputs=True`, every member gets the same inputs.
        params: the parameters of the ensemble.
        inputs: tensors `[N, ...]`, or dicts of them, for all members; or one DataLoader or other iterable of batches.
            A batch that is a tuple or a list gives its first entry, such as x of (x, y); a dict is the keyword
            arguments of the model.
        buffers: the buffers of the ensemble, `{name: [E, ...]}`; they are only read.
        batch_size: the number of rows of tensors that go through the model at once; a DataLoader has its own.
        prepare: `prepare(*batch)`, of all that is in the batch, returns the model's input, or a tuple of its inputs.
        progress: show a bar. None: at a terminal, once it has taken a second.
        compile: True, or a dict of options for torch.compile: batches of the first one's size, if that is `batch_size`
            or a loader's, are compiled. The code is kept for later calls. It is compared with eager code once.
        kwargs: keyword arguments of the model. A tensor with N rows, also in a dict or a tuple, is cut along with
            tensors (with `member_inputs=True` also one `[E, N, ...]`); all else is given with every batch.

    Returns: the output, any pytree or dataclass of tensors `[E, N, ...]`. The model itself stays in its mode.

    Raises: TypeError or ValueError where `inputs` are neither batches nor tensors of one length N > 0, where a tensor
        in the output is not `[E, B, ...]`, and as `forward` does.
    """
    size = check_positive_int(batch_size, "batch_size")
    if not isinstance(forward, Forward):
        raise TypeError(f"forward: expected the forward of an ensemble (from make_forward), got {shown(forward)}")
    check_compile(compile)
    forward.refresh()
    if progress is not None:
        check_bool(progress, "progress", or_else="or None")
    E = forward.check(params, buffers, forward.modes())  # a model in training mode was trained with buffers
    forward.check_kinds(params, buffers)
    are_batches = len(inputs) == 1 and isinstance(inputs[0], Iterable) and not isinstance(inputs[0], _NOT_BATCHES)
    if prepare is not None:
        check_callable(prepare, "prepare", "a function of the batch", None if are_batches else ["input"] * len(inputs))
    pieces = (
        _of_batches(inputs[0], prepare, kwargs, forward, E)
        if are_batches
        else _of_rows(inputs, prepare, kwargs, size, forward, E)
    )
    count = length_of(inputs[0]) if are_batches else -(-len(take_apart(inputs)[0][0]) // size)
    hidden = {"disable": True} if progress is False else {"disable": None, "delay": 1} if progress is None else {}
    call, whole = _called(forward, compile), None if are_batches else size
    work = tqdm(pieces, total=count, desc="predict", unit="batch", leave=False, **hidden)
    parts: list[list[Tensor]] = []
    forms: list[Form] = []
    with torch.no_grad():
        for rows, given, named in work:
            if forward.member_inputs:
                given = _repeated(given, E)
            whole = rows if whole is None else whole
            compute = call if rows == whole else forward.called
            output = compute(params, given, named, buffers, forward.modes(training=False))
            tensors, form = take_apart(output if buffers is None else output[0])
            strange = [list(tensor.shape) for tensor in tensors if tensor.shape[:2] != (E, rows)]
            if strange or (forms and form != forms[0]):
                raise ValueError(
                    f"output: expected tensors [{E}, {rows}, ...], a row for each input, and the same besides them for "
                    f"every batch, got the shapes {strange}; call forward for anything else"
                )
            parts.append(tensors)
            forms.append(form)
    if not forms:
        raise ValueError("inputs: expected at least one batch, got none")
    return forms[0].rebuild(iter(torch.cat(each, 1) for each in zip(*parts, strict=True)))


Call = Callable[..., Any]
"""`Forward.called`, compiled or not."""


def _called(forward: Forward, compile: Any) -> Call:
    """`forward.called`; compiled where the user asks for it, and then the same for every call of `predict`."""
    if compile is False:
        return forward.called
    options = {} if compile is True else dict(compile)
    key = forward.identity, repr(sorted(options.items()))
    if key not in forward.compiled:
        forward.compiled.clear()  # of an older revision, or of other options: compiled code is large
        forward.compiled[key] = _Checked(forward.called, options)
    return forward.compiled[key]


class _Checked:
    """A compiled function that is in use if its first result is that of eager code, which the first call returns."""

    def __init__(self, eager: Call, options: Mapping[str, Any]) -> None:
        self._eager = eager
        self._compiled: Call | None = compile_function(eager, **options)
        self._is_known = False

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            return self._eager(*arguments)
        want = None if self._is_known else self._eager(*arguments)
        try:
            got = self._compiled(*arguments)
            differs = "" if self._is_known else _difference(got, want)
        except OF_THE_MACHINE:
            raise
        except Exception as error:
            got = self._eager(*arguments) if self._is_known else want  # eager code raises what the model raises
            differs = first_line(getattr(error, "inner_exception", error))
        if differs:
            log.warning("predict does not use torch.compile here: %s", differs)
            self._compiled = None
        known, self._is_known = self._is_known, True
        return got if known else want


def _difference(got: Any, want: Any) -> str:
    """What of a compiled output is no rounding of the eager one; "" where nothing is."""
    (mine, form), (theirs, other) = take_apart(got), take_apart(want)
    if form != other or [x.shape for x in mine] != [x.shape for x in theirs]:
        return "the compiled output has another form"
    for one, two in zip(mine, theirs, strict=True):
        bound = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
        if one.dtype != two.dtype or not torch.allclose(
            one.double(), two.double(), rtol=bound, atol=bound * float(two.abs().amax()), equal_nan=True
        ):
            return f"an output of the compiled code differs from that of eager code by more than {bound:g}"
    return ""


_NOT_BATCHES = (Tensor, Mapping, str, bytes, EnsembleParams, nn.Module)

Piece = tuple[int, tuple[Any, ...], dict[str, Any]]
"""What one call of the forward computes: the number of rows, the inputs and the keyword arguments."""


def _of_rows(
    inputs: tuple[Any, ...],
    prepare: Callable[..., Any] | None,
    kwargs: dict[str, Any],
    size: int,
    forward: Forward,
    E: int,
) -> Iterator[Piece]:
    """The pieces of tensors `[N, ...]`; they are checked at once."""
    for x in inputs:
        tensors = list(x.values()) if isinstance(x, Mapping) else [x]
        for tensor in tensors or [x]:
            check_tensor(tensor, "inputs", "tensors [N, ...], dicts of them, or one iterable of batches")
    shapes = [list(x.shape) for x in take_apart(inputs)[0]]
    if not shapes:
        raise TypeError("inputs: expected tensors [N, ...], dicts of them, or one iterable of batches, got none")
    if len({tuple(shape[:1]) for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(f"inputs: expected tensors of one length [N, ...], N > 0, got the shapes {shapes}")
    N = shapes[0][0]

    def pieces() -> Iterator[Piece]:
        named = _cut(kwargs, N, size, E, forward.member_inputs)
        for i, (batch, own) in enumerate(zip(cut_rows(inputs, N, size), named, strict=True)):
            yield min(size, N - i * size), _as_tuple(batch if prepare is None else prepare(*batch)), own

    return pieces()


def _of_batches(
    batches: Iterable[Any],
    prepare: Callable[..., Any] | None,
    kwargs: dict[str, Any],
    forward: Forward,
    E: int,
) -> Iterator[Piece]:
    """The pieces of a loader's batches."""
    for batch in batches:
        tensors = [x for x in take_apart(batch)[0] if x.ndim]
        if not tensors:
            raise TypeError(f"inputs: expected batches of tensors [B, ...], got {shown(batch)}{advice(batch, 'it')}")
        rows, named = len(tensors[0]), kwargs
        if prepare is not None:
            given = _as_tuple(prepare(*batch) if isinstance(batch, tuple | list) else prepare(batch))
        elif isinstance(batch, Mapping):
            given, named = (), {**kwargs, **(_repeated(dict(batch), E) if forward.member_inputs else batch)}
        else:
            given = (batch[0],) if isinstance(batch, tuple | list) else (batch,)
        yield rows, given, named


def _repeated(tree: Any, E: int) -> Any:
    """`tree` with every tensor `[E, ...]`, the same for each member."""
    return pytree.tree_map_only(Tensor, lambda x: repeat(x, "... -> e ...", e=E), tree)


def _as_tuple(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def _cut(kwargs: dict[str, Any], N: int, size: int, E: int, member_inputs: bool) -> list[dict[str, Any]]:
    """The keyword arguments of each batch. With `member_inputs`, tensors `[N, ...]` are repeated for the members."""
    if member_inputs:
        tensors, form = take_apart(kwargs)
        are_shared = [x.shape[:1] == (N,) and x.shape[:2] != (E, N) for x in tensors]
        own = [
            repeat(x, "n ... -> e n ...", e=E) if shared else x for x, shared in zip(tensors, are_shared, strict=True)
        ]
        kwargs = form.rebuild(iter(own))
    return cut_rows(kwargs, N, size, axis=int(member_inputs))
