"""Everything that touches random state: seeds, and draws from private generators in the place of torch's global ones.

All threads share torch's global generators. Setting one back would repeat what another thread has drawn in between, so
whatever has to draw the same numbers again draws them from copies.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from functorch_ens._torch import modes_in_force, outside_transforms, pytree, without_dispatch_modes
from functorch_ens.draws import Draws, device_of, taking_a_generator

MAX_SEED = 2**63 - 1


class RandomState(NamedTuple):
    """The states of the CPU's global generator, and of those of CUDA devices."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def of(cls, tensors: Any) -> RandomState:
        """The present state of the generators for the devices of a pytree of `tensors`: those that this thread uses."""
        if drawing := _innermost():
            return drawing.state
        devices = {leaf.device for leaf in pytree.tree_leaves(tensors)}
        cuda = sorted(device.index for device in devices if device.type == "cuda")
        return cls(_shared.own(_shared.read()), {index: torch.cuda.get_rng_state(index) for index in cuda})

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """The state of a CPU generator that has this seed."""
        return cls(torch.Generator().manual_seed(seed).get_state(), {})

    def restore(self) -> None:
        """Set the generators that this thread uses to this state."""
        if drawing := _innermost():
            drawing.state = self
            return
        _shared.write(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def equals(self, other: RandomState) -> bool:
        """Whether no random numbers have been drawn between the two states."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(state, other.cuda[index]) for index, state in self.cuda.items()
        )


# --------------------------------------------------------------------------------------------------------------------
# Draws from copies of the generators


_SEED = 8
"""The state of the CPU's generator begins with the seed that it remembers, of so many bytes."""


@contextmanager
def _on_states() -> Iterator[None]:
    """Around operations on states: they are no part of what a transform computes, nor of what a mode traces."""
    with outside_transforms(), without_dispatch_modes():
        yield


def _remembered(state: Tensor) -> bytes:
    with _on_states():
        return bytes(state[:_SEED].tolist())


class _Shared:
    """The CPU's global generator, which remembers a token instead of its seed while threads are in a `Drawing`.

    The upper half of a token says that it is one, the lower half counts. No token comes twice, and the last thread to
    leave puts the seed back, so no thread takes what another one writes for an act of its model.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._upper = os.urandom(_SEED // 2)
        self._count = itertools.count()
        self._inside: WeakSet[Drawing] = WeakSet()  # an interrupted one may not leave
        self._seed = _remembered(torch.get_rng_state())

    def is_token(self, seed: bytes) -> bool:
        return seed.endswith(self._upper)

    def read(self) -> Tensor:
        """The state, which no thread has borrowed."""
        with self.lock:
            return torch.get_rng_state()

    def own(self, state: Tensor) -> Tensor:
        """This state with the seed in the place of a token."""
        return self._with(self._seed, state) if self.is_token(_remembered(state)) else state

    def write(self, state: Tensor) -> bytes:
        """Set a state; with a new token where a thread is in a `Drawing`. Returns what is remembered now."""
        with self.lock:
            state = self.own(state)
            if self._inside:
                state = self._with((next(self._count) % 2**32).to_bytes(_SEED // 2, sys.byteorder) + self._upper, state)
            with _on_states():  # torch.func.grad would refuse to write to a tensor of its surroundings
                torch.set_rng_state(state)
            return _remembered(state)

    def _with(self, seed: bytes, state: Tensor) -> Tensor:
        with _on_states():  # else the new tensor is one of torch.func.grad, and no state
            return torch.cat([torch.tensor(list(seed), dtype=torch.uint8), state[_SEED:]])

    def enter(self, drawing: Drawing) -> Tensor:
        """The state at the beginning of `drawing`."""
        with self.lock:
            now = torch.get_rng_state()
            if not self._inside:
                self._seed = _remembered(self.own(now))
            self._inside.add(drawing)
            return now

    def leave(self, drawing: Drawing, state: Tensor | None) -> None:
        """Go back to `state`; with None, stay."""
        with self.lock:
            self._inside.discard(drawing)
            now = torch.get_rng_state()
            if state is not None or (not self._inside and self.is_token(_remembered(now))):
                self.write(now if state is None else state)


_shared = _Shared()


class Drawing(Draws):
    """This thread draws from copies of the generators in `state`; the global ones are not advanced.

    For an operator without a `generator` argument, the global generator takes the copy's state for that one call. Where
    the model saves the state of the global generator, sets it or seeds it (`fork_rng`), the copy does the same: after
    each draw that generator remembers a seed of ours, a token, by which a state is known again.

    Any number of threads may draw so at once, and afterwards the global generator is as it was. Until then its
    `initial_seed()` is a token. Not exact is this alone: the model of one thread saves, sets or seeds the global
    generator while another thread is in a `Drawing`; or a thread outside of any draws from it, or sets it, between the
    read and the write of a token.
    """

    def __init__(self, state: RandomState, *, follow: bool = True) -> None:
        """`follow`: whether the model may set or seed the global generator. If not, that generator is never set."""
        super().__init__()
        self._follows = follow
        self._cpu = torch.Generator()
        self._cuda = {index: torch.Generator(f"cuda:{index}") for index in state.cuda}
        self.state = self._start = state
        self._tokens: dict[bytes, Tensor] = {}
        """The states of the copy, by what the global generator then remembered as its seed."""
        self.was_seeded = False
        """Whether the model has seeded the global generator before a draw."""

    def __enter__(self) -> Any:
        self._outside = _shared.enter(self) if self._follows else _shared.read()
        self._was_set = False
        self._token = _remembered(self._outside)
        self._tokens = {self._token: self._start.cpu}
        if _is_fresh(self._outside):  # else the model could set this very state, and it would not show
            self._stamp()
        return super().__enter__()

    def __exit__(self, *of_error: Any) -> None:
        super().__exit__(*of_error)
        if self._follows:
            self.follow()
            _shared.leave(self, self._outside if self._was_set else None)

    @property
    def state(self) -> RandomState:
        """The state of the copies now."""
        return RandomState(self._cpu.get_state(), {index: each.get_state() for index, each in self._cuda.items()})

    @state.setter
    def state(self, state: RandomState) -> None:
        self._cpu.set_state(state.cpu)
        for index, generator in self._cuda.items():
            if index in state.cuda:
                generator.set_state(state.cuda[index])

    def drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.follow()
        try:
            return self._drawn(func, args, kwargs)
        finally:
            self._stamp()

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.native_dropout.default and args[0].device.type == "cpu":  # as the kernel does it
            x, share = args[0], 1 - args[1]
            mask = torch.empty(x.shape, dtype=torch.bool).bernoulli_(share, generator=self._cpu)
            return x.mul(mask).mul_(1 / share if share else 0), mask
        taking = taking_a_generator(func)
        generator = self._of(args, kwargs)
        if taking is None or generator is None:
            return self._lent(func, args, kwargs)
        return taking(*args, **{**kwargs, "generator": generator})

    def hand_back(self) -> None:
        """Let the generators of the surroundings go on from here, as if what was drawn had come from them.

        Where another thread has drawn in the meantime they stay where they are now, and draw one number.
        """
        outer = _innermost()
        if outer is not None:
            outer.drew = True
            outer.state = self.state
            outer._stamp()
            return
        now = RandomState.of([torch.empty(0, device=f"cuda:{index}") for index in self._cuda])
        cuda_stayed = all(torch.equal(state, self._start.cuda[index]) for index, state in now.cuda.items())
        if cuda_stayed and torch.equal(now.cpu[_SEED:], self._outside[_SEED:]):
            self.state.restore()
        else:
            torch.rand(())

    def follow(self) -> None:
        """Where the model has set or seeded the global generator, set the copy to match. Draws change no seed."""
        if not self._follows:
            return
        now = _shared.read()
        token = _remembered(now)
        is_seeded = not _shared.is_token(token) and _is_fresh(now)
        if (token == self._token and not is_seeded) or (_shared.is_token(token) and token not in self._tokens):
            return  # the second: another thread draws in the same way
        known = None if is_seeded else self._tokens.get(token)
        self._was_set |= known is None
        self.was_seeded |= is_seeded
        self._cpu.set_state(now if known is None else known)
        self._stamp()

    def _stamp(self) -> None:
        """Let the global generator remember a new token."""
        if not self._follows:
            return
        with _shared.lock:
            self._token = _shared.write(torch.get_rng_state())
        self._tokens[self._token] = self._cpu.get_state()

    def _of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | None:
        """The copy for the device of this operation; None where there is none."""
        device = device_of(args, kwargs)
        return self._cuda.get(device.index or 0) if device.type == "cuda" else self._cpu

    def _lent(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator that takes no generator: for its one call the global ones are as the copies."""
        cpu = torch.default_generator
        pairs = [(cpu, self._cpu), *((torch.cuda.default_generators[index], own) for index, own in self._cuda.items())]
        with _shared.lock:
            before = [there.get_state() for there, _ in pairs]
            for there, own in pairs:
                there.set_state(own.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                for (there, own), state in zip(pairs, before, strict=True):
                    own.set_state(there.get_state())
                    there.set_state(state)


def _innermost() -> Drawing | None:
    """The innermost `Drawing` that this thread is in."""
    return next((mode for mode in reversed(modes_in_force()) if isinstance(mode, Drawing)), None)


def was_seeded() -> bool:
    """Whether the model has seeded the global generator since the innermost `Drawing` began. Ask before a draw."""
    drawing = _innermost()
    if drawing is not None:
        drawing.follow()
    return drawing is not None and drawing.was_seeded


class Parts:
    """What vmap's `randomness` means for the parts of one computation, which come one after another.

    `"different"`: each part draws other numbers. `"same"`: each draws the same ones, and the generators go on from
    there. `"error"`: RuntimeError where one draws any.
    """

    def __init__(self, randomness: str, tensors: Any) -> None:
        self._randomness = randomness
        self._start = None if randomness == "different" else RandomState.of(tensors)

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one part, the `last` of them or not."""
        return nullcontext() if self._start is None else self._from(self._start, last)

    @contextmanager
    def _from(self, start: RandomState, last: bool) -> Iterator[None]:
        with Drawing(start) as drawing:
            yield
        if drawing.drew and self._randomness == "error":
            raise RuntimeError('randomness="error": the model drew random numbers; "different" and "same" allow it')
        if drawing.drew and last:
            drawing.hand_back()


@contextmanager
def drawing_apart(tensors: Any, hand_back: bool = True) -> Iterator[None]:
    """Draw from copies of the global generators, for the devices of `tensors`; these go on from there afterwards.

    With `hand_back=False`, or after an error, they are as they were before, without being set.
    """
    start = RandomState.of(tensors)
    with Drawing(start) as drawing:
        yield
    if drawing.drew and hand_back:
        drawing.hand_back()


# --------------------------------------------------------------------------------------------------------------------
# Seeds


def _is_fresh(state: Tensor) -> bool:
    """Whether nothing has been drawn since the generator in this `state` was seeded."""
    seed = int.from_bytes(_remembered(state), sys.byteorder)
    with _on_states():
        return torch.equal(state, torch.Generator().manual_seed(seed).get_state())


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator seeded by one draw from `generator`, or from torch's global one where it is None.

    All initialisation runs on the CPU, so that the same generator state gives the same parameters on every device.
    """
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(MAX_SEED, (), generator=generator, device=device)
    return torch.Generator().manual_seed(int(seed))
