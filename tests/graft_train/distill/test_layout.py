import pytest
import torch

from graft_train.distill.eagle3 import layout as layout_module
from graft_train.distill.eagle3.layout import make_layout


def layout_of(*documents: str, window: int | None = None):
    """A document is written as p (prompt) and a (answer) tokens."""
    loss_mask_S = torch.tensor([letter == "a" for document in documents for letter in document])
    return make_layout([len(document) for document in documents], loss_mask_S, window)


def test_drafts_start_right_before_an_answer_and_stop_two_before_its_end():
    layout = layout_of("ppaaap", "paapaaaa", "aaa", "pa", "ppp")
    # First document: answer 2..4, so drafts from 1 (reads 2, predicts 3) and 2 (reads 3, predicts 4).
    # Second, at 6: answers 7..8 and 10..13, each on its own. Third, at 14: no column before its first token.
    assert layout.columns_C.tolist() == [1, 2, 6, 9, 10, 11, 14]
    assert layout.depth_C.tolist() == [0, 1, 0, 0, 1, 2, 0]
    assert layout.positions_S.tolist() == [*range(6), *range(8), *range(3), *range(2), *range(3)]
    assert layout.document_S.tolist() == [0] * 6 + [1] * 8 + [2] * 3 + [3] * 2 + [4] * 3


def test_answers_that_touch_across_a_boundary_are_two_runs():
    layout = layout_of("paaa", "aaa")
    assert layout.columns_C.tolist() == [0, 1, 4]
    assert layout.depth_C.tolist() == [0, 1, 0]


@pytest.mark.parametrize("window", [None, 1, 3, 5, 8])
def test_pieces_cover_what_each_column_may_see_once(monkeypatch, window):
    monkeypatch.setattr(layout_module, "BAND", 2)
    layout = layout_of("ppaaap", "paapaaaa", "aaaa", window=window)
    seen = torch.zeros(len(layout.columns_C), len(layout.document_S), dtype=torch.int)
    for piece in layout.pieces:
        block = torch.ones(piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start)
        if piece.window is not None:
            assert not piece.causal
            block = piece.mask(torch.float32).exp()
        seen[piece.queries, piece.keys] += (block.tril() if piece.causal else block).int()
    for place, column in enumerate(layout.columns_C.tolist()):
        start = {0: 0, 1: 6, 2: 14}[int(layout.document_S[column])]
        first = max(start, column + 1 - (window or 99))
        expected = [int(first <= key <= column) for key in range(len(layout.document_S))]
        assert seen[place].tolist() == expected


def test_a_row_without_an_answer_has_no_columns():
    layout = layout_of("pppp", "pa")
    assert len(layout.columns_C) == len(layout.depth_C) == len(layout.pieces) == 0
