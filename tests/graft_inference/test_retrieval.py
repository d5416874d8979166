import pytest
import torch

from graft_inference import GraftError
from graft_inference.retrieval import SuccessorMatrix, Template


def one_hot_logits(rows):
    """Logits whose top-2 are the given ids."""
    logits = torch.zeros(len(rows), 6)
    for row, (first, second) in enumerate(rows):
        logits[row, first], logits[row, second] = 2.0, 1.0
    return logits


def test_update_writes_the_targets_top_k():
    matrix = SuccessorMatrix.empty(6, 2, torch.device("cpu"))
    matrix.update(torch.tensor([3, 1]), one_hot_logits([(5, 0), (2, 4)]))
    assert matrix.ids_VK.tolist() == [[-1, -1], [2, 4], [-1, -1], [5, 0], [-1, -1], [-1, -1]]


def test_later_rows_win_conflicts():
    matrix = SuccessorMatrix.empty(6, 2, torch.device("cpu"))
    matrix.update(torch.tensor([3, 3, 1, 3]), one_hot_logits([(0, 1), (1, 2), (4, 5), (5, 0)]))
    assert matrix.ids_VK[3].tolist() == [5, 0]
    assert matrix.ids_VK[1].tolist() == [4, 5]


def test_template_refuses_a_path_before_its_parent():
    with pytest.raises(GraftError, match=r"\[0, 1\] needs its parent"):
        Template([(0, 1), (0,)], torch.device("cpu"))
