"""A target, its cache and a head that are functions of the text, in plain Python: what rounds are compared with.

They note what they are told, and fail where it is not the text's.
"""

import zlib
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from graft_inference.decode.state import DecodeState
from graft_inference.heads.draft import Draft, Layer
from graft_inference.noise import gumbel
from graft_inference.policy.tree_builder import builder_of
from graft_inference.retrieval.prompt_lookup import PromptLookup
from graft_inference.retrieval.successor_matrix import MatrixSource, SuccessorMatrix
from graft_inference.speculator import Speculation
from graft_inference.stats import GenerationStats
from graft_inference.target.model import TargetOutput

from .trees import CPU, VOCAB, token_path


@cache
def says(name: str, text: tuple[int, ...]) -> Tensor:
    """Logits of a random language model of that name behind a text, [V]."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((name, text)).encode()))
    return 3 * torch.randn(VOCAB, generator=generator)


def seen_at(text: tuple[int, ...]) -> list[float]:
    """What the target's auxiliary state behind a text is: its length and its last token."""
    return [len(text), text[-1]]


class TextCache:
    """Holds tokens in place of keys and values."""

    def __init__(self, text):
        self.text, self.tree, self.branch = list(text), None, []

    def keep_branch(self, path_A):
        self.branch = self.tree.tokens_N[path_A].tolist()

    def commit(self, count):
        assert 1 <= count <= len(self.branch)
        self.text += self.branch[:count]


class PlainTarget:
    config, device = SimpleNamespace(vocab_size=VOCAB), CPU

    def verify_all(self, trees, ancestors, caches):
        return [self.verify(*one) for one in zip(trees, ancestors, caches, strict=True)]

    def verify(self, tree, ancestors_NN, cache):
        """Every node behind the committed text and the nodes that its row of the mask marks."""
        cache.tree = tree
        logits, aux = [], []
        for marked_N in ancestors_NN:
            rows = sorted(marked_N.nonzero().flatten().tolist(), key=lambda row: int(tree.depths_N[row]))
            text = (*cache.text, *tree.tokens_N[rows].tolist())
            logits.append(says("target", text))
            aux.append(seen_at(text))
        return TargetOutput(torch.stack(logits), torch.tensor(aux))


class PlainHead:
    """Agrees with the target more often than not. A request's part of it is the text that it has been told."""

    def __init__(self, topk):
        self.topk = topk

    def open(self):
        return SimpleNamespace(text=[], behind=None, confidence=[], noise=None, deferred=0)

    def read(self, part, tokens_A, aux_AE):
        """Takes in positions, each with the token behind it."""
        for token, (length, last) in zip(tokens_A.tolist(), aux_AE.tolist(), strict=True):
            assert length == len(part.text) + 1, "each position once and in order"
            assert part.behind in (None, last), "the token that was announced"
            part.text.append(int(last))
            part.behind = token

    def defer(self, parts, fresh):
        for part, one in zip(parts, fresh, strict=True):
            self.read(part, *one)
            part.deferred += 1

    def begin(self, parts, fresh, roots, noises):
        drafts = []
        for part, one, root_1, noise in zip(parts, fresh, roots, noises, strict=True):
            self.read(part, *one)
            assert part.behind == int(root_1)
            part.confidence, part.noise = [], noise
            draft = Draft(root_1, [Layer.below_root(*self._children(part, root_1, [()]))], noise)
            drafts.append(self._noted(part, draft))
        return drafts

    def deepen(self, parts, drafts):
        deeper = []
        for part, draft in zip(parts, drafts, strict=True):
            last, tree = draft.layers[-1], draft.candidates
            best = last.logp_C.topk(self.topk)
            paths = [token_path(tree, row) for row in (best.indices + draft.first_row).tolist()]
            layer = last.below(best, draft.first_row, *self._children(part, draft.root_1, paths))
            deeper.append(self._noted(part, Draft(draft.root_1, [*draft.layers, layer], draft.noise)))
        return deeper

    def _children(self, part, root_1, paths):
        text = (*part.text, int(root_1))
        logits_AV = torch.stack([says("target", (*text, *path)) + says("head", (*text, *path)) / 3 for path in paths])
        best = logits_AV.log_softmax(-1).topk(self.topk)
        return best.values, best.indices

    def _noted(self, part, draft):
        part.confidence.append(float(draft.confidence))
        return draft


class Clock:
    """Notes the phases."""

    def __init__(self):
        self.phases = []

    def start(self):
        self.phases.append("start")

    def mark(self, phase):
        self.phases.append(phase)


def matrix() -> SuccessorMatrix:
    """What is likely behind each token, as far as one token tells."""
    probs_VV = torch.stack([says("matrix", (token,)) for token in range(VOCAB)]).softmax(-1)
    best = probs_VV.topk(4)
    return SuccessorMatrix(best.indices.to(torch.int32), best.values.half())


def started(plan, head: PlainHead, prompt, sampler, noted: bool) -> DecodeState:
    """A request whose prompt has been read, and whose first token is drawn, as the prefill leaves it.

    Args:
        noted: whether log-probabilities and auxiliary states are kept.
    """
    lookup = PromptLookup(64, CPU)
    lookup.extend(torch.tensor(prompt))
    sources = {"matrix": MatrixSource(matrix()), "lookup": lookup}
    speculation = Speculation(
        builder=builder_of(plan, CPU),
        head=head.open() if plan.drafts else None,
        sources={name: sources[name] for name in plan.sources},
        root_1=torch.tensor(prompt[-1:]),
        fresh_tokens_A=torch.tensor(prompt),
        fresh_aux_AE=torch.tensor([seen_at(tuple(prompt[:length])) for length in range(1, 1 + len(prompt))]),
    )
    state = DecodeState(
        speculation,
        TextCache(prompt),
        sampler,
        torch.tensor(prompt) if sampler.needs_history else None,
        [] if noted else None,
        GenerationStats(),
        Clock(),
        aux=[] if noted else None,
    )
    first = first_token(state, prompt)
    speculation.root_1 = torch.tensor([first])
    speculation.fresh_tokens_A = torch.tensor([*prompt[1:], first])
    for source in speculation.sources.values():
        source.extend(speculation.root_1)
    return state


def first_token(state: DecodeState, prompt) -> int:
    (token,), (logp,) = plain_text(state.sampler, prompt, 1)
    state.emit(torch.tensor([token]), torch.tensor([logp]))
    state.tokens.append(token)
    return token


def plain_text(sampler, prompt, count: int) -> tuple[list[int], list[float]]:
    """Token after token from the target alone: tokens and their log-probabilities."""
    tokens, logps = [], []
    for place in range(count):
        text = (*prompt, *tokens)
        scores = sampler.processors(torch.tensor([text]), says("target", text)[None])[0]
        noisy = scores if sampler.greedy else scores + gumbel(sampler.seed, place, 1, VOCAB, CPU)[0]
        tokens.append(int(noisy.argmax()))
        logps.append(float(scores.log_softmax(-1)[tokens[-1]]))
    return tokens, logps
