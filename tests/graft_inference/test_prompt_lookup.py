"""The longest earlier match, against a walk over the text."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_inference.retrieval.prompt_lookup import LONGEST, PromptLookup
from graft_inference.retrieval.sources import number_of
from graft_inference.template import Template, chain
from graft_inference.tree import Source

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


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@given(st.data(), SIZES, st.integers(0, 9))
def test_it_finds_what_a_walk_over_the_text_finds(data, sizes, count):
    """However the text came in; few tokens repeat themselves soon, beyond the longest match that is told apart."""
    vocab = data.draw(st.integers(1, 3))
    text = data.draw(st.lists(st.integers(1, vocab), min_size=sum(sizes), max_size=sum(sizes)))
    room = data.draw(st.integers(0, 5))
    lookup, read = PromptLookup(sum(sizes) + room, CPU), 0
    for size in sizes:
        padding = data.draw(st.integers(0, room))  # a captured round brings tokens that do not count
        tokens = torch.tensor([*text[read : read + size], *[7] * padding])
        lookup.extend(tokens, torch.tensor([size]) if padding else None)
        read += size
        room -= padding
        expected, length = walked(text[:read], count)
        found_D, length_1 = lookup.find(count)
        assert int(length_1) == length
        assert not length or found_D.tolist() == expected


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


def test_without_a_match_nothing_is_proposed():
    """Else a node that another source names would be counted as this one's."""
    lookup, template = PromptLookup(20, CPU), Template(chain(3), CPU, number_of("lookup"))
    for token, sources in ((7, [Source.EMPTY] * 3), (7, [number_of("lookup")] * 3), (1, [Source.EMPTY] * 3)):
        lookup.extend(torch.tensor([token]))
        proposal = lookup.propose(torch.tensor([token]), template, None)
        assert proposal.tree.sources_N.tolist() == [Source.ROOT, *sources]
        assert int(proposal.evidence_1) == (sources[0] != Source.EMPTY)
