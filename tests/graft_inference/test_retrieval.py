import pytest
import torch
from safetensors import safe_open

from graft_inference import GraftError
from graft_inference.bundle import load_successors
from graft_inference.retrieval.sources import number_of
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.template import Template

MATRIX = number_of("matrix")
CPU = torch.device("cpu")


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
        Template([(0, 1), (0,)], torch.device("cpu"), MATRIX)


def random_matrix(seed: int, vocab: int = 9, k: int = 4, **settings) -> SuccessorMatrix:
    """Rows of distinct successors, some of them short, with falling probabilities."""
    generator = torch.Generator().manual_seed(seed)
    ids_VK = torch.rand(vocab, vocab, generator=generator).argsort(dim=1)[:, :k].to(torch.int32)
    probs_VK = torch.rand(vocab, k, generator=generator).sort(descending=True).values / k
    short_VK = torch.arange(k) >= torch.randint(0, k + 1, (vocab, 1), generator=generator)
    return SuccessorMatrix(ids_VK.masked_fill(short_VK, -1), probs_VK.masked_fill(short_VK, 0).half(), **settings)


def test_without_probabilities_nothing_is_scored():
    tree = SuccessorMatrix(random_matrix(0).ids_VK).expand(torch.tensor([3]), Template([(0,), (0, 0)], CPU, MATRIX))
    assert tree.logp_N.tolist() == [0, 0, 0]


def test_update_keeps_the_observed_probabilities():
    matrix = random_matrix(1, k=2)
    logits_MV = torch.tensor([[0.1, 0.2, 0.6, 0.1, 0, 0, 0, 0, 0], [0.5, 0, 0, 0.4, 0.1, 0, 0, 0, 0]]).log()
    matrix.update(torch.tensor([7, 2]), logits_MV)
    assert matrix.ids_VK[[7, 2]].tolist() == [[2, 1], [0, 3]]
    torch.testing.assert_close(
        matrix.probs_VK[[7, 2]].float(), torch.tensor([[0.6, 0.2], [0.5, 0.4]]), atol=1e-3, rtol=0
    )
    assert matrix.learned_V.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_probabilities_do_not_change_the_papers_rule():
    plain = random_matrix(2)
    ids_only = SuccessorMatrix(plain.ids_VK.clone())
    tokens_M, logits_MV = torch.tensor([3, 3, 1]), torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    for matrix in (plain, ids_only):
        matrix.update(tokens_M, logits_MV)
    assert torch.equal(plain.ids_VK, ids_only.ids_VK)


def test_clones_are_apart():
    matrix = random_matrix(3)
    copy, before = matrix.clone(), matrix.ids_VK.clone()
    copy.update(torch.tensor([3]), torch.eye(9)[:1])
    assert torch.equal(matrix.ids_VK, before)
    assert matrix.learned_V.sum() == 0
    assert copy.learned_V.sum() == 1


def test_save_writes_only_what_was_learned(tmp_path):
    matrix = random_matrix(4, made_for={"tokenizer": "abc"})
    matrix.update(torch.tensor([3, 3, 5]), torch.randn(3, 9))
    matrix.save(tmp_path / "learned.safetensors")
    with safe_open(tmp_path / "learned.safetensors", "pt") as file:
        assert file.metadata() == {"made_for": '{"tokenizer": "abc"}'}
        assert file.get_tensor("counts").tolist() == [0, 0, 0, 2, 0, 1, 0, 0, 0]
    loaded = load_successors(tmp_path / "learned.safetensors", 9)
    assert torch.equal(loaded.ids_VK, matrix.ids_VK)
    assert torch.equal(loaded.probs_VK, matrix.probs_VK)
    assert loaded.learned_V.sum() == 0
    with pytest.raises(GraftError, match="no probabilities"):
        SuccessorMatrix(matrix.ids_VK).save(tmp_path / "none.safetensors")
