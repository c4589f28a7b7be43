"""`predict`: the outputs of all members for a whole data set, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from functorch_ens._torch import pytree
from functorch_ens.checks import check_positive_int, shown
from functorch_ens.forward.forward import Forward
from functorch_ens.params.pytree import EnsembleParams
from functorch_ens.trees import Form, cut_rows, take_apart


def predict(
    forward: Forward,
    params: EnsembleParams,
    *inputs: Tensor,
    buffers: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    prepare: Callable[..., Any] | None = None,
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
        inputs: tensors `[N, ...]`, for all members.
        buffers: the buffers of the ensemble, `{name: [E, ...]}`; they are only read.
        batch_size: the number of rows that go through the model at once.
        prepare: `prepare(*batch)` returns the model's input, or a tuple of its inputs.
        kwargs: keyword arguments of the model. A tensor with N rows, also in a dict or a tuple, is cut along with them
            (with `member_inputs=True` also one `[E, N, ...]`); all else is given with every batch.

    Returns: the output, any pytree or dataclass of tensors `[E, N, ...]`. The model itself stays in its mode.

    Raises: TypeError or ValueError where `inputs` are not tensors of one length N > 0, where a tensor in the output is
        not `[E, B, ...]`, and as `forward` does.
    """
    size = check_positive_int(batch_size, "batch_size")
    if not isinstance(forward, Forward):
        raise TypeError(f"forward: expected the forward of an ensemble (from make_forward), got {forward!r}")
    wrong = [x for x in inputs if not isinstance(x, Tensor)]
    if wrong or not inputs:
        raise TypeError(f"inputs: expected tensors [N, ...], got {shown(wrong[0]) if wrong else 'none'}")
    shapes = [list(x.shape) for x in inputs]
    if len({tuple(shape[:1]) for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(f"inputs: expected tensors of one length [N, ...], N > 0, got the shapes {shapes}")
    forward.refresh()
    modes = forward.modes(training=False)
    E = forward.check(params, buffers, modes)
    parts: list[list[Tensor]] = []
    forms: list[Form] = []
    with torch.no_grad():
        N = shapes[0][0]
        for batch, named in zip(
            cut_rows(inputs, N, size), _cut(kwargs, N, size, E, forward.member_inputs), strict=True
        ):
            given = batch if prepare is None else prepare(*batch)
            given = given if isinstance(given, tuple) else (given,)
            if forward.member_inputs:
                given = pytree.tree_map_only(Tensor, lambda x: repeat(x, "... -> e ...", e=E), given)
            output = forward.called(params, given, named, buffers, modes)
            tensors, form = take_apart(output if buffers is None else output[0])
            rows = len(batch[0])
            strange = [list(tensor.shape) for tensor in tensors if tensor.shape[:2] != (E, rows)]
            if strange or (forms and form != forms[0]):
                raise ValueError(
                    f"output: expected tensors [{E}, {rows}, ...], a row for each input, and the same besides them for "
                    f"every batch, got the shapes {strange}; call forward for anything else"
                )
            parts.append(tensors)
            forms.append(form)
    return forms[0].rebuild(iter(torch.cat(each, 1) for each in zip(*parts, strict=True)))


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
