"""Batches of row numbers, which say what each member sees; the data itself is held once."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from functorch_ens.checks import (
    check_bool,
    check_device,
    check_generator,
    check_has_values,
    check_option,
    check_positive_int,
    check_tensor,
)


def bootstrap(
    N: int,
    E: int,
    *,
    size: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a sample of the rows for each member, with replacement: bagging.

    >>> import torch, functorch_ens as fe
    >>> rows = fe.bootstrap(1000, E=5, generator=torch.Generator().manual_seed(0))
    >>> rows.shape, bool(580 < len(rows[0].unique()) < 680)  # about 1 - 1/e of the rows
    (torch.Size([5, 1000]), True)

    Args:
        N: the number of rows.
        E: the number of members.
        size: the number of rows for each member, at most N. None: N.
        generator: the source of randomness; None is torch's global one. It may be on another device.
        device: of the result. None: the CPU.

    Returns: row numbers `[E, size]`, int64. Draw them once, and give them to `index_batches` for every epoch.

    Raises: TypeError or ValueError where N, E or `size` is no positive whole number, or `size` > N.

    Source: Breiman 1996, Bagging predictors.
    """
    N, E = check_positive_int(N, "N"), check_positive_int(E, "E")
    size = N if size is None else check_positive_int(size, "size")
    if size > N:
        raise ValueError(f"size: a bootstrap sample is no larger than the data of {N} rows, got {size}")
    check_generator(generator)
    check_device(device)
    source = generator.device if generator is not None else None
    return torch.randint(N, (E, size), generator=generator, device=source).to(device or "cpu")


def index_batches(
    rows: int | Tensor,
    batch_size: int,
    *,
    E: int | None = None,
    sees: str = "same",
    drop_last: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """One epoch of shuffled batches, as row numbers.

    >>> import torch, functorch_ens as fe
    >>> [batch.shape for batch in fe.index_batches(70, 32)]
    [torch.Size([32]), torch.Size([32])]
    >>> fe.index_batches(70, 32, E=4, sees="own")[0].shape
    torch.Size([4, 32])
    >>> fe.index_batches(70, 32, E=4, sees="split")[0].shape
    torch.Size([4, 8])

    A train step takes them as its batch, with `make_forward(model, member_inputs=sees != "same")` and
    `prepare=lambda i: (images[i], labels[i])`.

    Args:
        rows: the number of rows, N; or row numbers `[N]`; or row numbers of each member, `[E, N]` (`bootstrap`), which
            implies `sees="own"`.
        batch_size: the number of rows in a step, B.
        E: the number of members; needed unless all see the `"same"`.
        sees: `"same"`: all members see one batch, `[B]`. `"own"`: each member sees all rows in its own order, `[E, B]`.
            `"split"`: each member sees its share of one batch, `[E, B / E]`, at the cost of one network.
        drop_last: leave out the rows that do not fill a batch. False: they are a smaller last batch, whose size must be
            a multiple of E with `"split"`.
        generator: the source of randomness. None: torch's global one.
        device: of the batches. None: that of `rows`, or the CPU.

    Returns: the batches, int64.
    Raises: TypeError or ValueError for an argument of the wrong kind, no full batch, or a share that is not whole.
    Source: `"split"` is section 3 of Wen, Tran & Ba 2020, arXiv:2002.06715.
    """
    check_option(sees, ("same", "own", "split"), "sees")
    check_bool(drop_last, "drop_last")
    check_generator(generator)
    check_device(device)
    size = check_positive_int(batch_size, "batch_size")
    E = None if E is None else check_positive_int(E, "E")
    table, sees, E = _table(rows, sees, E)
    N = table.shape[-1]
    if drop_last and N < size:
        raise ValueError(f"batch_size: expected at most {N}, the number of rows, got {size} (or drop_last=False)")
    if sees == "split":
        assert E is not None
        for part, argument in ((size, "batch_size"), (0 if drop_last else N % size, "rows: the last batch")):
            if part % E:
                raise ValueError(f"{argument}: expected a multiple of E = {E} for equal shares, got {part}")
    source = generator.device if generator is not None else None

    def shuffled() -> Tensor:
        return torch.randperm(N, generator=generator, device=source).to(table.device)

    if sees == "own":
        assert E is not None
        order = torch.stack([shuffled() for _ in range(E)])
        order = table.gather(1, order) if table.ndim == 2 else table[order]
    else:
        order = table[shuffled()]
    order = order.to(device if device is not None else table.device)
    batches = list(order[..., : N - N % size if drop_last else N].split(size, dim=-1))
    return [rearrange(batch, "(e b) -> e b", e=E) for batch in batches] if sees == "split" else batches


def _table(rows: Any, sees: str, E: int | None) -> tuple[Tensor, str, int | None]:
    """The row numbers `[N]` or `[E, N]`, and with them the final `sees` and `E`."""
    if isinstance(rows, Integral) and not isinstance(rows, bool):
        rows = torch.arange(check_positive_int(rows, "rows"))
    check_tensor(rows, "rows", "a positive int or a tensor of row numbers")
    check_has_values(rows, "rows")
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"rows: expected whole numbers, got {rows.dtype}")
    rows = rows.long()  # torch would take uint8 for a mask
    if rows.numel() and rows.min() < 0:
        raise ValueError(f"rows: expected numbers from 0, got {rows.min().item()}")
    if rows.ndim not in (1, 2) or rows.numel() == 0:
        raise ValueError(f"rows: expected [N] or, for each member its own, [E, N], got the shape {list(rows.shape)}")
    if rows.ndim == 2:
        if E not in (None, len(rows)):
            raise ValueError(f"E: the rows are those of {len(rows)} members, got {E}")
        if sees == "split":
            raise ValueError('sees: "split" deals one batch out to the members, but rows has each member its own')
        return rows, "own", len(rows)
    if sees != "same" and E is None:
        raise ValueError(f"E: the number of members is needed for sees={sees!r}")
    return rows, sees, E
