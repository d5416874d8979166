"""How several samples lie in a packed batch, and where in it drafts start."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass
class Piece:
    """A rectangle of the attention over step-0 keys in which no score needs a mask but a causal one.

    Attributes:
        queries: which of the C columns, in order.
        keys: which of the S positions.
        causal: queries and keys are the same positions; else every query sees every key.
    """

    queries: slice
    keys: slice
    causal: bool


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
    """

    lengths: list[int]
    positions_S: Tensor
    document_S: Tensor
    columns_C: Tensor
    depth_C: Tensor
    pieces: list[Piece]

    @cached_property
    def block_mask(self) -> Any:
        """For flex_attention: C queries over the S step-0 keys; built once a batch, for all steps."""
        from torch.nn.attention.flex_attention import create_block_mask

        document_S, columns_C = self.document_S, self.columns_C

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            column = columns_C[query]
            return (key <= column) & (document_S[key] == document_S[column])

        return create_block_mask(sees, None, None, len(columns_C), len(document_S), device=document_S.device)

    def to(self, device: torch.device) -> "Layout":
        positions_S, document_S = self.positions_S.to(device), self.document_S.to(device)
        return Layout(
            self.lengths, positions_S, document_S, self.columns_C.to(device), self.depth_C.to(device), self.pieces
        )


def make_layout(lengths: list[int], loss_mask_S: Tensor) -> Layout:
    """Lays documents of these lengths side by side.

    Args:
        loss_mask_S: bool, the answers' tokens of all documents, on the CPU.
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
        start = int(start_D[document_C[low]])
        queries = slice(low, high)
        pieces.append(Piece(queries, slice(column, column + high - low), causal=True))
        if column > start:
            pieces.append(Piece(queries, slice(start, column), causal=False))
    return Layout(lengths, positions_S, document_S, columns_C, depth_C, pieces)
