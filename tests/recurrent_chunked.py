"""The chunked backward pass of a recurrent core in PyTorch, as plain as its algebra: what the kernels of it compute.

A chunk is a run of tokens. What reads the state within it are *reads*, one row each: the query of every token, and
minus each erase. What is added to the state are *writes*: each key, along which the state gains a row of U. With every
row scaled by the decay up to its place,

    U = values + reads S, for the erases       o = reads S + mask(reads keysT) U, for the queries
    S' = decay S + keysT U

A read crosses the decays of the chunk up to its own token, which is the first one's to the one before where it reads
the state as it was before the token. Decays are taken together as D_in (from the state that enters), D_out (to the one
that leaves) and, between rows, as a quotient of two that count from the first token; a chunk ends before that quotient
leaves the range of numbers. Hence a token that forgets everything comes first in its chunk, and nothing divides by 0.

The gradient of a log decay is the sum, over the pairs of a read and a write with that decay between them, of what
the pair adds to the loss. From one token to the next, the pairs of its writes join and those of its reads leave. Pairs
without a decay between them would join and leave at once; they are left out, for they may be large where no other is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncc.plan.recurrent import CorePlan
from attncc.runtime.recurrent_operands import Operands

CHUNK = 5
RANGE = 6.0  # of the log decays between the tokens of a chunk


def backward(
    plan: CorePlan,
    operands: Operands,
    initial_state: Tensor | None,
    offsets: list[int] | None,
    d_o: Tensor,
    d_state: Tensor | None,
) -> tuple[Operands, Tensor]:
    """As `CompiledCore.backward`."""
    batch, heads, tokens, width = operands.query.shape
    bounds = [0, tokens] if offsets is None else offsets
    gradients = Operands.of(tuple(x if x is None else torch.zeros_like(x) for x in operands.tensors))
    states = torch.zeros(batch * (len(bounds) - 1), heads, width, plan.value_width, dtype=operands.query.dtype)
    initial = states if initial_state is None else initial_state
    last = states if d_state is None else d_state
    d_initial = torch.empty_like(states)
    for b, h, i in itertools.product(range(batch), range(heads), range(len(bounds) - 1)):
        place = b if offsets is None else i
        own = Operands.of(tuple(x if x is None else x[b, h, bounds[i] : bounds[i + 1]] for x in operands.tensors))
        found = Operands.of(tuple(x if x is None else x[b, h, bounds[i] : bounds[i + 1]] for x in gradients.tensors))
        head = _Head(plan, own, d_o[b, h, bounds[i] : bounds[i + 1]], found)
        d_initial[place, h] = head.run(initial[place, h], last[place, h])
    return gradients, d_initial


@dataclass(frozen=True)
class _Head:
    """One sequence of one head. gradients, o: where they are written, o where it is asked for."""

    plan: CorePlan
    operands: Operands
    d_o: Tensor
    gradients: Operands
    o: Tensor | None = None

    def run(self, state: Tensor, d_state: Tensor) -> Tensor:
        """The gradient of the initial state."""
        if self.plan.side == "value":
            return self._swapped().run(state.T, d_state.T).T
        chunks = []
        start = 0
        while start < len(self.d_o):
            chunks.append(_Chunk(self, start, self._end(start), state))
            start, state = chunks[-1].end, chunks[-1].last_state()
        for chunk in reversed(chunks):
            d_state = chunk.backward(d_state)
        return d_state

    def _swapped(self) -> _Head:
        """What is a decay of value channels here is one of key channels where keys and values, query and gradient of
        o change places: the loss is linear in each of the four, and o is its gradient by the last."""
        x, gradients = self.operands, self.gradients
        assert not self.plan.erasing
        return _Head(
            replace(self.plan, side="key"),
            replace(x, query=self.d_o, keys=x.values, values=x.keys),
            x.query,
            replace(gradients, query=torch.empty_like(self.d_o), keys=gradients.values, values=gradients.keys),
            o=gradients.query,
        )

    def _end(self, start: int) -> int:
        """The end of the chunk that begins at `start`."""
        end, limit = start + 1, min(start + CHUNK, len(self.d_o))
        decay = self.operands.log_decay
        passed = 0.0
        while end < limit:
            passed = passed if decay is None else passed + decay[end]
            if not (torch.as_tensor(passed).abs() <= RANGE).all():
                break
            end += 1
        return end


class _Chunk:
    def __init__(self, head: _Head, start: int, end: int, state: Tensor) -> None:
        plan, x = head.plan, head.operands
        self.head, self.start, self.end, self.state = head, start, end, state
        n, updates = end - start, len(plan.updates)
        width = x.query.shape[-1]
        zeros = x.query.new_zeros(n, width)
        no_value = x.query.new_zeros(n, len(state[0]))
        keys = [key[start:end] for key in x.keys]
        values = [no_value if value is None else value[start:end] for value in x.values]
        erases = [zeros if erase is None else -erase[start:end] for erase in x.erases]
        self.d_o = head.d_o[start:end]

        # Rows: queries by token, then erases by token and update; writes by token and update.
        self.token = torch.cat([torch.arange(n), torch.arange(n).repeat_interleave(updates)])
        before = torch.tensor([plan.read == "pre"] * n + [plan.erases_before] * (n * updates))
        self.place = self.token - before.long()  # the token whose update is the last that a read sees; -1: none
        reads = torch.cat([x.query[start:end], *_by_token(erases)])
        writes = torch.cat([zeros[:0], *_by_token(keys)])
        self.written = torch.arange(n).repeat_interleave(updates)
        strict = torch.tensor([plan.read == "pre"] * n + [True] * (n * updates))
        self.mask = (self.written < self.token[:, None]) | ((self.written == self.token[:, None]) & ~strict[:, None])
        self.distant = self.mask & (self.written < self.place[:, None])

        decay = reads.new_zeros(n, 1) if x.log_decay is None else x.log_decay[start:end].reshape(n, -1)
        first, later = decay[:1], decay.clone()
        later[0] = 0.0
        passed = later.cumsum(0)
        entered, one = (first + passed).exp(), torch.ones_like(first)
        self.read_in = torch.cat([one, entered])[self.place + 1]
        self.read_factor = torch.cat([one, passed.exp()])[self.place + 1]
        self.write_out = (passed[-1:] - passed).exp()[self.written]
        self.write_factor = (-passed).exp()[self.written]
        self.across = entered[-1][:, None]
        self.reads_in, self.reads = reads * self.read_in, reads * self.read_factor
        self.writes_out, self.writes = writes * self.write_out, writes * self.write_factor

        self.pairs = (self.reads @ self.writes.T).where(self.mask, 0.0)
        x_values = torch.cat([no_value[:0], *_by_token(values)]) + self.reads_in[n:] @ state
        lower = torch.eye(n * updates, dtype=state.dtype) - self.pairs[n:]
        self.u = torch.linalg.solve_triangular(lower, x_values, upper=False, unitriangular=True)
        self.lower = lower

    def last_state(self) -> Tensor:
        return self.across * self.state + self.writes_out.T @ self.u

    def backward(self, d_state: Tensor) -> Tensor:
        """Writes the gradients of the chunk; that of the state that enters, from that of the state that leaves."""
        n = self.end - self.start
        d_u = self.pairs[:n].T @ self.d_o + self.writes_out @ d_state
        d_values = torch.linalg.solve_triangular(self.lower.T, d_u, upper=True, unitriangular=True)
        d_y = torch.cat([self.d_o, d_values])  # of what reads give: o, and what is added to values
        d_pairs = (d_y @ self.u.T).where(self.mask, 0.0)
        d_distant = d_pairs.where(self.distant, 0.0)
        d_near = d_pairs - d_distant

        d_reads_in = d_y @ self.state.T
        d_reads = d_distant @ self.writes
        d_writes_out = self.u @ d_state.T
        d_writes = d_distant.T @ self.reads
        joining = self.writes_out * d_writes_out + self.writes * d_writes
        entering = self.reads_in * d_reads_in
        leaving = entering + self.reads * d_reads
        d_reads = self.read_in * d_reads_in + self.read_factor * (d_reads + d_near @ self.writes)
        d_writes = self.write_out * d_writes_out + self.write_factor * (d_writes + d_near.T @ self.reads)
        self._store(d_reads, d_writes, d_values)
        self._store_decay((self.across * self.state * d_state).sum(1), entering, leaving, joining)
        return self.across * d_state + self.reads_in.T @ d_y

    def _store(self, d_reads: Tensor, d_writes: Tensor, d_values: Tensor) -> None:
        n, found, rows = self.end - self.start, self.head.gradients, slice(self.start, self.end)
        found.query[rows] = d_reads[:n]
        for i, (key, value, erase) in enumerate(zip(found.keys, found.values, found.erases, strict=True)):
            updates = len(found.keys)
            key[rows] = d_writes[i::updates]
            if value is not None:
                value[rows] = d_values[i::updates]
            if erase is not None:
                erase[rows] = -d_reads[n + i :: updates]
        if self.head.o is not None:
            self.head.o[rows] = self.reads_in[:n] @ self.state + self.pairs[:n] @ self.u

    def _store_decay(self, through: Tensor, entering: Tensor, leaving: Tensor, joining: Tensor) -> None:
        if self.head.gradients.log_decay is None:
            return
        passed = self.place >= 0
        current = through + entering[passed].sum(0)
        for t in range(self.end - self.start):
            to = self.head.gradients.log_decay
            to[self.start + t] = current if to.ndim == 2 else current.sum()
            current = current + joining[self.written == t].sum(0) - leaving[self.place == t].sum(0)


def _by_token(updates: list[Tensor]) -> list[Tensor]:
    """The rows of all updates in the order of their tokens; none where there are no updates."""
    return list(torch.stack(updates, 1).flatten(0, 1).split(1)) if updates else []
