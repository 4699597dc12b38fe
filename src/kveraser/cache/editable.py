"""The editable KV cache: preallocated, written in place, undone bit for bit.

Only this package touches cache internals. Four rules:

- **A slot is not a position.** A slot is an index into the buffers; its position is the one that the rotary embedding
  was computed at. They differ after an edit, so the cache carries `positions` (one per slot) and `next_position`.
  Every slot is visible to every later one: a state that must not be attended to is removed.
- **The cache owns what it holds.** `slot_to_token` says which token of the text every slot holds, `NO_TOKEN` for
  steering states, zeroed values and a method's own words. Edits keep it in step with the slots.
- **Edits are journalled.** `edit()` opens a journal; `overwriting`, `drop`, `rotate` and `zero_values` record the
  old bits they destroy. An exception inside `edit()` puts everything back; a finished journal can be reverted later.
- **The cache knows how much of itself is exact.** `exact_length` counts the leading slots that equal a fresh prefill of
  the live tokens up to them; an edit lowers it, an append raises it only when nothing inexact lies before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from transformers.cache_utils import Cache

from kveraser.cache.layer import GROWTH_MULTIPLE, EditableLayer
from kveraser.errors import CacheError

NO_TOKEN = -1
"""In `slot_to_token`: the slot holds no token of the text. Among token ids: there is no token to run."""

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each `[batch, kv_heads, slots, head_dim]`."""


@dataclass
class Step:
    """One change inside an edit: its kind, the slots `[start, end)` of `length`, and their old states, a pair a layer.

    With `slots` (int64, increasing) only these changed, and the states are theirs. `moved` is the progress of a drop:
    the number of buffers whose suffix has been moved, and the suffix of the next one while it is being moved.
    """

    kind: Literal["overwrite", "drop", "insert", "truncate"]
    start: int
    end: int
    length: int
    states: list[tuple[torch.Tensor | None, torch.Tensor | None]]
    slots: torch.Tensor | None = None
    moved: tuple[int, torch.Tensor | None] = (0, None)


@dataclass
class Journal:
    """What an edit changed: enough to restore every bit.

    `steps` hold the old states in the order of the changes; `positions`, `slot_to_token`, `next_position` and
    `exact_length` are the bookkeeping before the edit. `bytes_written` counts keys and values written
    or moved, over all layers.
    """

    length: int
    positions: torch.Tensor
    slot_to_token: torch.Tensor
    next_position: int
    exact_length: int
    steps: list[Step] = field(default_factory=list)
    bytes_written: int = 0

    @property
    def bytes(self) -> int:
        """Bytes held for undo."""
        return sum(
            tensor.numel() * tensor.element_size()
            for step in self.steps
            for pair in step.states
            for tensor in pair
            if tensor is not None
        )

    def copy(self) -> Journal:
        """An independent copy: forgetting this one leaves it whole."""
        steps = [
            replace(
                step,
                states=[(_clone(key), _clone(value)) for key, value in step.states],
                moved=(step.moved[0], _clone(step.moved[1])),
            )
            for step in self.steps
        ]
        return replace(self, steps=steps)

    def wipe(self) -> None:
        """Overwrite the old states with zeros. The edit can't be reverted any more."""
        for step in self.steps:
            for state in (*(state for pair in step.states for state in pair), step.moved[1]):
                if state is not None:
                    state.zero_()


def _clone(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None else states.clone()


class EditableCache(Cache):
    """A KV cache whose slots can be overwritten, dropped and rotated in place, and restored bit for bit.

    It is a `transformers` cache: pass it as `past_key_values` to the model's own forward or `generate`. These number
    tokens by slot unless told otherwise: after a position gap, pass `position_ids` from `next_position` on.

    Args:
        layers: number of decoder layers.
        capacity: slots to allocate up front; the buffers grow when they are full.

    Attributes:
        positions: float64 tensor `[length]`, the position every slot was computed at; fractional for steering slots of
            the closed layout.
        slot_to_token: int64 tensor `[length]`, for every slot the index of the token that it holds, or `NO_TOKEN`.
            Appended tokens get the indices that follow the greatest so far, and `NO_TOKEN` inside an edit.
        next_position: position of the next token to be appended.
        exact_length: leading slots that equal a fresh prefill of the same live tokens.
    """

    layers: list[EditableLayer]  # type: ignore[assignment]

    def __init__(self, layers: int, capacity: int = GROWTH_MULTIPLE) -> None:
        super().__init__(layers=[EditableLayer(capacity) for _ in range(layers)])
        self._positions = torch.zeros(0, dtype=torch.float64)
        self._slot_to_token = torch.zeros(0, dtype=torch.int64)
        self._next_position: int = 0
        self._exact_length = 0
        self._journal: Journal | None = None

    # Bookkeeping

    @property
    def length(self) -> int:
        """Slots in use."""
        return self.layers[0].length

    @property
    def positions(self) -> torch.Tensor:
        self._follow_foreign_writes()
        return self._positions

    @property
    def slot_to_token(self) -> torch.Tensor:
        self._follow_foreign_writes()
        return self._slot_to_token

    @property
    def token_count(self) -> int:
        """Slots that hold a token of the text."""
        return int((self.slot_to_token != NO_TOKEN).sum())

    @property
    def exact(self) -> bool:
        """Whether every slot equals a fresh prefill of the tokens that the cache holds."""
        return self.exact_length == self.length

    @property
    def next_position(self) -> int:
        self._follow_foreign_writes()
        return self._next_position

    @property
    def exact_length(self) -> int:
        self._follow_foreign_writes()
        return self._exact_length

    def _follow_foreign_writes(self) -> None:
        """Record slots that `generate` or `crop` added or removed without positions."""
        length = self.length
        known = self._positions.numel()
        if length < known:
            # The next position is that of the first removed slot.
            self._next_position = int(self._positions[length].ceil())
            self._exact_length = min(self._exact_length, length)
            self._positions, self._slot_to_token = self._positions[:length], self._slot_to_token[:length]
        elif length > known:
            # A forward pass without position_ids numbers its tokens by slot.
            self._record_append(torch.arange(known, length, dtype=torch.float64))

    def _record_append(self, positions: torch.Tensor) -> None:
        known = self._positions.numel()
        # A fresh prefill puts every token at the position of its slot: after a position gap nothing is exact.
        if self._exact_length == known and bool((positions == torch.arange(known, known + len(positions))).all()):
            self._exact_length = known + positions.numel()
        tokens = torch.full((len(positions),), NO_TOKEN)
        if self._journal is None:
            following = int(self._slot_to_token.max()) + 1 if known else 0
            tokens = torch.arange(following, following + len(positions))
        self._positions = torch.cat([self._positions, positions])
        self._slot_to_token = torch.cat([self._slot_to_token, tokens])
        self._next_position = int(positions[-1].floor()) + 1
        if self._journal is not None:
            self._journal.bytes_written += self._journal_bytes(positions.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use, over all layers."""
        return sum(
            states.numel() * states.element_size()
            for pair in (self.read(0, self.length) if self.length else ())
            for states in pair
        )

    @property
    def capacity(self) -> int:
        """Slots that the buffers hold before they grow."""
        return self.layers[0].capacity

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the buffers over all layers, unused slots included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers())

    def reserve(self, slots: int) -> None:
        """Allocate `slots` in all. Appends beyond the capacity would grow the buffers by half."""
        for layer in self.layers:
            layer.reserve(slots, exactly=True)

    def read(self, start: int, end: int) -> list[KeyValue]:
        """Views of slots `[start, end)` of every layer: keys and values `[batch, kv_heads, end - start, head_dim]`."""
        self._check_range(start, end)
        return [(layer.keys[:, :, start:end], layer.values[:, :, start:end]) for layer in self.layers]  # type: ignore[index]

    def _check_range(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= self.length:
            raise CacheError(f"slots [{start}, {end}) lie outside the cache's {self.length} slots")

    # Writing with the model

    @contextmanager
    def appending(self, positions: torch.Tensor) -> Iterator[None]:
        """A forward pass inside appends slots at `positions` (float64 `[tokens]`); an exception removes them."""
        self._follow_foreign_writes()
        start = self.length
        try:
            yield
            self._check_written(self.length - start, positions.numel())
            self._record_append(positions.to(dtype=torch.float64, device="cpu"))
        except BaseException:
            self._set_length(start)
            raise

    @staticmethod
    def _check_written(written: int, announced: int) -> None:
        if written != announced:
            raise CacheError(f"the forward pass wrote {written} slots where {announced} were announced")

    @contextmanager
    def overwriting(self, start: int, positions: torch.Tensor) -> Iterator[None]:
        """A forward pass inside attends to slots `[0, start)` and overwrites the next `positions.numel()` slots.

        The slots after them are neither attended to nor changed. The cache is not copied: its cursor moves back and
        returns. Needs an open `edit()`.
        """
        end = start + positions.numel()
        self._save("overwrite", start, end)
        length = self.length
        try:
            self._set_length(start)
            for layer in self.layers:
                layer.limit = end
            yield
            self._check_written(self.length - start, positions.numel())
        finally:
            for layer in self.layers:
                layer.limit = None
            self._set_length(length)
        self._positions = self._positions.clone()
        self._positions[start:end] = positions.to(dtype=torch.float64, device="cpu")

    @contextmanager
    def overwriting_scattered(self, start: int, slots: torch.Tensor) -> Iterator[None]:
        """A forward pass inside overwrites `slots` (int64 `[tokens]`, increasing) and attends to the whole cache.

        The caller passes a four-dimensional mask by which each token attends to the slots up to its own. The slots keep
        their positions; slots from `start` on are no longer exact. Needs an open `edit()`.
        """
        if slots.numel() and not start <= int(slots.min()) <= int(slots.max()) < self.length:
            raise CacheError(f"slots {slots.tolist()} lie outside [{start}, {self.length}), where they may be written")
        self._save("overwrite", start, self.length, slots=slots)
        index = slots.to(self.layers[0].keys.device)  # type: ignore[union-attr]
        try:
            for layer in self.layers:
                layer.scattered = index
            yield
        finally:
            for layer in self.layers:
                layer.scattered = None

    def truncate(self, length: int) -> None:
        """Remove the slots from `length` on. Inside `edit()` undo restores them; outside they are gone."""
        self._check_range(length, self.length)
        self._follow_foreign_writes()
        if self._journal is not None:
            self._save("truncate", length, self.length)
        self._set_length(length)
        self._follow_foreign_writes()

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers: a positive number of slots stays, a negative number is removed."""
        # Recorded now: a later append could bring the length back to what it was.
        self.truncate(self.layers[0].cropped(tokens_to_remove))

    def reset(self) -> None:
        """Remove all slots, as in transformers."""
        self.truncate(0)
        self._next_position = 0

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    # Editing in place, with undo

    @contextmanager
    def edit(self) -> Iterator[Journal]:
        """Open a journal for in-place edits. An exception inside, Ctrl-C included, restores every bit.

        Raises:
            CacheError: an edit is already open on this cache.
        """
        if self._journal is not None:
            raise CacheError("an edit is already open on this cache: finish it before starting another")
        self._follow_foreign_writes()
        journal = Journal(self.length, self._positions, self._slot_to_token, self._next_position, self._exact_length)
        try:
            self._journal = journal
            yield journal
        except BaseException:
            self._journal = None
            self.revert(journal)
            raise
        finally:
            self._journal = None

    def _save(
        self,
        kind: Literal["overwrite", "drop", "insert", "truncate"],
        start: int,
        end: int,
        keys: bool = True,
        values: bool = True,
        slots: torch.Tensor | None = None,
        layer: int | None = None,
    ) -> Step:
        self._check_range(start, end)
        if self._journal is None:
            raise CacheError("in-place edits need an open journal: use `with cache.edit():`")
        self._follow_foreign_writes()

        def kept(number: int, states: torch.Tensor, wanted: bool) -> torch.Tensor | None:
            if not wanted or layer not in (None, number):
                return None
            return states.clone() if slots is None else states.index_select(2, (slots - start).to(states.device))

        states = [
            (kept(number, key, keys), kept(number, value, values))
            for number, (key, value) in enumerate(self.read(start, end) if end > start else [])
        ]
        step = Step(kind, start, end, self.length, states, slots)
        self._journal.steps.append(step)
        if kind == "overwrite":
            written = end - start if slots is None else slots.numel()
            parts = (keys + values) / 2 / (1 if layer is None else len(self.layers))
            self._journal.bytes_written += int(self._journal_bytes(written) * parts)
        if end > start:
            self._exact_length = min(self._exact_length, start)
        return step

    def _journal_bytes(self, slots: int) -> int:
        return self.nbytes // self.length * slots if self.length else 0

    def drop(self, start: int, end: int) -> None:
        """Remove slots `[start, end)`; later slots move up, their positions stay. Costs one move of the suffix."""
        step = self._save("drop", start, end)
        length, buffers = self.length, self._buffers()
        for index, buffer in enumerate(buffers):
            # Source and target overlap; the temporary also lets an interrupt in the middle be undone.
            suffix = buffer[:, :, end:length].clone()
            step.moved = (index, suffix)
            buffer[:, :, start : length - (end - start)] = suffix
        step.moved = (len(buffers), None)
        assert self._journal is not None
        self._journal.bytes_written += self._journal_bytes(length - end)
        self._positions = torch.cat([self._positions[:start], self._positions[end:]])
        self._slot_to_token = torch.cat([self._slot_to_token[:start], self._slot_to_token[end:]])
        self._set_length(length - (end - start))

    def insert(self, start: int, positions: torch.Tensor) -> None:
        """Open slots at `start` for tokens at `positions` (float64 `[slots]`), to be overwritten; later slots move up.

        Their states are undefined until then. Costs one move of the suffix.
        """
        count, length = positions.numel(), self.length
        self.reserve(length + count)
        step = self._save("insert", start, start)
        step.end = start + count
        self._exact_length = min(self._exact_length, start)
        for index, buffer in enumerate(self._buffers()):
            suffix = buffer[:, :, start:length].clone()
            step.moved = (index, suffix)
            buffer[:, :, start + count : length + count] = suffix
            buffer[:, :, start : start + count] = 0
        step.moved = (2 * len(self.layers), None)
        assert self._journal is not None
        self._journal.bytes_written += self._journal_bytes(length - start)
        new, empty = positions.to(dtype=torch.float64, device="cpu"), torch.full((count,), NO_TOKEN)
        self._positions = torch.cat([self._positions[:start], new, self._positions[start:]])
        self._slot_to_token = torch.cat([self._slot_to_token[:start], empty, self._slot_to_token[start:]])
        self._set_length(length + count)

    def renumber(self, index: int, count: int) -> None:
        """Add `count` to the token indices from `index` on: as many tokens were inserted into the text before them."""
        tokens = self.slot_to_token
        self._slot_to_token = torch.where(tokens >= index, tokens + count, tokens)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self.layers for buffer in (layer.keys, layer.values) if buffer is not None]

    def rotate(self, start: int, end: int, keys: Iterable[torch.Tensor], delta: float) -> None:
        """Replace the keys of slots `[start, end)` by re-rotated ones (one tensor a layer) and move them by `delta`.

        Positions of the slots, and `next_position` when the slots reach the end of the cache, move with them.
        """
        self._save("overwrite", start, end, values=False)
        for layer, new in zip(self.layers, keys, strict=True):
            assert layer.keys is not None
            layer.keys[:, :, start:end] = new
        self._positions = self._positions.clone()
        self._positions[start:end] += delta
        if end == self.length:
            self._next_position += int(delta)

    def write_layer(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one layer's states at scattered `slots` (int64, increasing). Needs an open `edit()`."""
        if slots.numel() == 0:
            return
        self._save("overwrite", int(slots[0]), self.length, slots=slots, layer=layer)
        buffers = self.layers[layer]
        assert buffers.keys is not None and buffers.values is not None
        index = slots.to(buffers.keys.device)
        buffers.keys.index_copy_(2, index, keys)
        buffers.values.index_copy_(2, index, values)

    def zero_values(self, start: int, end: int) -> None:
        """Set the values of slots `[start, end)` to zero and keep their keys."""
        self._save("overwrite", start, end, keys=False)
        for layer in self.layers:
            assert layer.values is not None
            layer.values[:, :, start:end] = 0

    def set_next_position(self, position: int) -> None:
        """Set the position of the next token. Needs an open `edit()`."""
        if self._journal is None:
            raise CacheError("the next position moves only inside `with cache.edit():`")
        self._follow_foreign_writes()
        self._next_position = position

    def set_tokens(self, start: int, tokens: Sequence[int]) -> None:
        """Set which tokens the slots from `start` on hold: their indices in the text, or `NO_TOKEN`."""
        self._follow_foreign_writes()
        self._check_range(start, start + len(tokens))
        self._slot_to_token = self._slot_to_token.clone()
        self._slot_to_token[start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)

    def mark_exact(self, length: int) -> None:
        """Mark the first `length` slots as equal to a fresh prefill. Only an exact recomputation may do this."""
        self._follow_foreign_writes()
        self._check_range(length, self.length)
        self._exact_length = length

    def mark_inexact(self, start: int) -> None:
        """Mark slots from `start` on as different from a fresh prefill of the live tokens."""
        self._follow_foreign_writes()
        self._exact_length = min(self._exact_length, start)

    def revert(self, journal: Journal) -> None:
        """Restore every bit that the edit of `journal` changed. Later appends must have been truncated before."""
        if self._journal is not None:
            raise CacheError("an edit is open on this cache: finish it before reverting another")
        for step in reversed(journal.steps):
            start, end = step.start, step.end
            for layer in self.layers:
                layer.reserve(step.length, exactly=True)
            if step.kind == "drop":
                self._move_back(step)
            elif step.kind == "insert":
                self._close_up(step)
            self._set_length(step.length)
            for layer, old in zip(self.layers, step.states, strict=False):
                for buffer, states in zip((layer.keys, layer.values), old, strict=True):
                    assert buffer is not None
                    if states is not None and step.slots is not None:
                        buffer.index_copy_(2, step.slots.to(buffer.device), states)
                    elif states is not None:
                        buffer[:, :, start:end] = states
        self._set_length(journal.length)
        self._positions = journal.positions
        self._slot_to_token = journal.slot_to_token
        self._next_position = journal.next_position
        self._exact_length = journal.exact_length

    def _move_back(self, step: Step) -> None:
        start, end, length = step.start, step.end, step.length
        moved, moving = step.moved
        for index, buffer in enumerate(self._buffers()):
            if index < moved:
                buffer[:, :, end:length] = buffer[:, :, start : length - (end - start)].clone()
            elif index == moved and moving is not None:
                buffer[:, :, end:length] = moving

    def _close_up(self, step: Step) -> None:
        start, length = step.start, step.length
        moved, moving = step.moved
        for index, buffer in enumerate(self._buffers()):
            if index < moved:
                buffer[:, :, start:length] = buffer[:, :, step.end : length + step.end - start].clone()
            elif index == moved and moving is not None:
                buffer[:, :, start:length] = moving

    def wipe_unused(self) -> None:
        """Overwrite unused slots with zeros: they may hold states that edits and truncations removed."""
        for buffer in self._buffers():
            buffer[:, :, self.length :] = 0

    # Copies

    def fork(self) -> EditableCache:
        """An independent copy of the slots in use; the two never write into each other."""
        self._follow_foreign_writes()
        states = self.read(0, self.length) if self.length else []
        return self.from_states(
            states, len(self.layers), self._positions, self._slot_to_token, self._next_position, self._exact_length
        )

    @classmethod
    def from_states(
        cls,
        states: Sequence[KeyValue],
        layers: int,
        positions: torch.Tensor,
        slot_to_token: torch.Tensor,
        next_position: int,
        exact_length: int,
    ) -> EditableCache:
        """Build a cache from a copy of `states`: one `(keys, values)` a layer, or none for an empty cache."""
        cache = cls(layers, capacity=max(1, positions.numel()))
        with torch.no_grad():
            for layer, (keys, values) in zip(cache.layers, states, strict=False):
                layer.update(keys, values)
        cache._positions, cache._slot_to_token = positions.clone(), slot_to_token.clone()
        cache._next_position = next_position
        cache._exact_length = exact_length
        return cache
