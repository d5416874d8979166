"""The longest earlier match, against a walk over the text."""

import pytest
import torch

from graft_inference.retrieval.prompt_lookup import LONGEST, PromptLookup

CPU = torch.device("cpu")


def walked(text, count):
    """Token by token: the longest earlier match of the end, of equals the latest, and what followed it."""
    best, length = -1, 0
    for end in range(len(text) - 1):
        matched = 0
        while matched < LONGEST and matched <= end and text[end - matched] == text[-1 - matched]:
            matched += 1
        if matched and matched >= length:
            best, length = end, matched
    if best < 0:
        return [], 0
    following = list(text)
    for place in range(best + 1, best + 1 + count):
        following.append(following[place])
    return following[len(text) :], length


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_walk_over_the_text_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 3, (60,), generator=generator)
    text[40:58] = text[10:28]  # a match longer than is told apart
    lookup, read = PromptLookup(70, CPU), 0
    for size in (1, 1, 5, 1, 20, 2, 1, 9, 4, 13, 1, 1, 1):
        lookup.extend(text[read : read + size])
        read += size
        tokens, length = walked(text[:read].tolist(), 9)
        found_D, length_1 = lookup.find(9)
        assert int(length_1) == length
        assert not length or found_D.tolist() == tokens
    assert read == 60


def test_more_may_be_foreseen_than_a_short_text_has_room_for():
    lookup = PromptLookup(6, CPU)
    lookup.extend(torch.tensor([7, 8, 7]))
    tokens, length = lookup.find(9)
    assert (tokens.tolist(), length.tolist()) == ([8, 7] * 4 + [8], [1])


def test_by_hand():
    lookup = PromptLookup(20, CPU)
    lookup.extend(torch.tensor([7]))
    assert int(lookup.find(3)[1]) == 0
    lookup.extend(torch.tensor([1, 2, 5, 1, 2]))
    tokens_D, length_1 = lookup.find(5)
    assert tokens_D.tolist() == [5, 1, 2, 5, 1]
    assert int(length_1) == 2
    lookup.extend(torch.tensor([9]))
    assert int(lookup.find(3)[1]) == 0
