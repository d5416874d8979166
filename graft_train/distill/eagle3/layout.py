"""How several samples lie in a packed batch, and where in it drafts start."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from graft_inference.heads.eagle3.model import first_step_sees

BAND = 256
"""Columns whose window is masked together: each brings as many masked keys beside those of its window."""


@dataclass
class Piece:
    """A rectangle of the attention over step-0 keys in which no score needs a mask but a causal one or a window's.

    Attributes:
        queries: which of the C columns, in order.
        keys: which of the S positions.
        causal: queries and keys are the same positions; else every query sees every key.
        window: unless it is set: then the last keys are the queries' positions, and each sees so many up to its own.
    """

    queries: slice
    keys: slice
    causal: bool
    window: int | None = None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a window, [queries, keys]; on the CPU."""
        if self.window is None:
            return None
        key_K = torch.arange(self.keys.start, self.keys.stop)
        query_Q = key_K[self.queries.start - self.queries.stop :]
        seen_QK = first_step_sees(query_Q[:, None], key_K, self.window)
        return torch.zeros(seen_QK.shape, dtype=dtype).masked_fill_(~seen_QK, -torch.inf)


@dataclass
class Layout:
    """Documents one behind the other without a gap, and the columns in which drafts start.

    The draft that starts in column t reads token t+1 and predicts t+2; both must lie in one answer, and so
    all columns of an answer but the last two, and the one right before it, form a run.

    Attributes:
        lengths: of the documents, in order.
        positions_S: of each token within its document.
        document_S: the number of its document.
        columns_C: where drafts start, ascending.
        depth_C: place of the column in its run.
        window: of the head.
    """

    lengths: list[int]
    positions_S: Tensor
    document_S: Tensor
    columns_C: Tensor
    depth_C: Tensor
    pieces: list[Piece]
    window: int | None

    @cached_property
    def block_mask(self) -> Any:
        """For flex_attention: C queries over the S step-0 keys; built once a batch, for all steps."""
        from torch.nn.attention.flex_attention import create_block_mask

        document_S, columns_C, window = self.document_S, self.columns_C, self.window

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            column = columns_C[query]
            return first_step_sees(column, key, window) & (document_S[key] == document_S[column])

        return create_block_mask(sees, None, None, len(columns_C), len(document_S), device=document_S.device)

    def to(self, device: torch.device) -> "Layout":
        moved = {name: getattr(self, name).to(device) for name in ("positions_S", "document_S", "columns_C", "depth_C")}
        return replace(self, **moved)


def make_layout(lengths: list[int], loss_mask_S: Tensor, window: int | None = None) -> Layout:
    """Lays documents of these lengths side by side.

    Args:
        loss_mask_S: bool, the answers' tokens of all documents, on the CPU.
        window: of the head, see `DraftHeadConfig.sliding_window`.
    """
    length_D = torch.tensor(lengths)
    start_D = length_D.cumsum(0) - length_D
    document_S = torch.arange(len(lengths)).repeat_interleave(length_D)
    positions_S = torch.arange(len(loss_mask_S)) - start_D[document_S]
    # Both tokens of the pair t+1, t+2 are an answer's, and neither is the first of another document.
    inner_S = loss_mask_S & (positions_S > 0)
    columns_C = (inner_S[1:-1] & inner_S[2:]).nonzero().flatten()
    document_C = document_S[columns_C]
    begins_C = torch.ones_like(columns_C, dtype=torch.bool)
    begins_C[1:] = (columns_C.diff() > 1) | (document_C.diff() > 0)
    run_begins = begins_C.nonzero().flatten()
    depth_C = torch.arange(len(columns_C)) - run_begins[begins_C.cumsum(0) - 1] if len(run_begins) else columns_C
    pieces = []
    bounds = [*run_begins.tolist(), len(columns_C)]
    for low, high in pairwise(bounds):
        column = int(columns_C[low])
        pieces += _pieces(slice(low, high), column, int(start_D[document_C[low]]), window)
    return Layout(lengths, positions_S, document_S, columns_C, depth_C, pieces, window)


def _pieces(queries: slice, column: int, start: int, window: int | None) -> list[Piece]:
    """Those of a run of columns.

    Args:
        column: the first of them.
        start: of their document.
    """
    behind = column + queries.stop - queries.start
    if window is None or behind - start <= window:
        own = Piece(queries, slice(column, behind), causal=True)
        return [own, Piece(queries, slice(start, column), causal=False)] if column > start else [own]
    pieces = []
    for first in range(column, behind, BAND):
        last = min(first + BAND, behind)
        band = slice(queries.start + first - column, queries.start + last - column)
        pieces.append(Piece(band, slice(max(start, first + 1 - window), last), causal=False, window=window))
    return pieces
