"""From an EAGLE-3 head to scored candidate nodes, one draft step at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...noise import Noise
from ...target.kv_cache import Span
from ..draft import Draft, HeadState, Layer, deferred, joined, parted
from .model import DraftHead, first_step_sees


@dataclass
class Eagle3Layer(Layer):
    """The candidates that one pass of the head proposed.

    Attributes:
        hidden_AH: the head's outputs at the parents, from which the candidates were predicted.
        visible_AK: bool, which rows of the head's KV cache each parent attends to.
    """

    hidden_AH: Tensor
    visible_AK: Tensor


Eagle3Draft = Draft[Eagle3Layer]


class Drafter(HeadState):
    """What an EAGLE-3 head keeps of one request.

    The head's row for position t reads the embedding of token t+1 beside the target's state at t, so its
    cache lags the target's tokens by one.

    Args:
        max_positions: of the target.
        tokens: most tokens of prompt and output.
        num_steps: most draft steps of a round; each needs topk rows of the KV cache.
    """

    def __init__(self, head: DraftHead, max_positions: int, topk: int, num_steps: int, tokens: int) -> None:
        config, capacity = head.config, tokens + topk * num_steps
        super().__init__((1, config.num_key_value_heads, config.head_dim), topk, capacity, head.fc.weight)
        self.head = head
        self.max_positions = max_positions
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self._turn()

    def _turn(self) -> None:
        """cos and sin of all positions, [capacity, D]."""
        weight = self.head.fc.weight
        # No token beyond the limit is ever emitted, and its position must not change the others' frequencies.
        positions_1S = torch.arange(self.keys.shape[2], device=weight.device)[None].clamp(max=self.max_positions - 1)
        self.rope = [table[0] for table in self.head.rotary_emb(weight, positions_1S)]

    def resume(self, length: int, topk: int, capacity: int) -> None:
        super().resume(length, topk, capacity)
        self._turn()

    def line(self, tokens_A: Tensor) -> "HeadRows":
        """The input of a pass over newly committed positions, one after the other."""
        count, span = len(tokens_A), self.span
        visible_AK, window = None, self.head.config.sliding_window
        hides = window is not None and span.end(count) > window
        if span.is_fixed or hides or (count > 1 and self.length):
            rows_A, keys_K = span.rows(count, tokens_A.device), torch.arange(span.end(count), device=tokens_A.device)
            visible_AK = first_step_sees(rows_A[:, None], keys_K, window)
        return HeadRows(self, tokens_A, span, span, count, visible_AK)

    def branches(self, draft: Eagle3Draft, chosen_k: Tensor, parent_k: Tensor) -> "HeadRows":
        """The input of a pass over the children that are expanded. All of them have one position."""
        last, behind = draft.layers[-1], (draft.steps - 1) * self.topk
        span = Span(self.span.start + behind, self.span.size)
        visible_kK, position = last.visible_AK[parent_k], Span(self.span.start + draft.steps - 1)
        if span.is_fixed:
            rows_k = span.rows(self.topk, chosen_k.device)
            visible_kK = visible_kK | (torch.arange(span.end(0), device=chosen_k.device) == rows_k[:, None])
        else:
            own_kk = torch.eye(self.topk, dtype=torch.bool, device=chosen_k.device)
            visible_kK = torch.cat((visible_kK, own_kk), dim=1)
        return HeadRows(self, last.tokens_C[chosen_k], span, position, 1, visible_kK)


@dataclass
class HeadRows:
    """One prompt's input tokens in a pass of the head.

    Attributes:
        tokens_A: their ids.
        span: the rows of the KV cache that their keys and values are written to.
        position, positions: the first position, and the number of consecutive ones; with one, all tokens share it.
        visible_AK: bool, which rows of the KV cache each token attends to; None for causal attention.
    """

    drafter: Drafter
    tokens_A: Tensor
    span: Span
    position: Span
    positions: int
    visible_AK: Tensor | None

    def attend(self, query_BQSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor) -> Tensor:
        keys = self.span.write(self.drafter.keys, key_BKSD)
        values = self.span.write(self.drafter.values, value_BKSD)
        groups = self.drafter.groups
        if self.visible_AK is None:
            is_causal = len(self.tokens_A) > 1
            return F.scaled_dot_product_attention(query_BQSD, keys, values, is_causal=is_causal, enable_gqa=groups > 1)
        # Query heads that share a key head become rows, which saves repeating keys and values.
        folded = query_BQSD.reshape(1, keys.shape[1], -1, keys.shape[3])
        attended = F.scaled_dot_product_attention(folded, keys, values, self.visible_AK.repeat(groups, 1))
        return attended.reshape(query_BQSD.shape)

    def rope(self) -> tuple[Tensor, Tensor]:
        """cos and sin, [1, positions, D] each."""
        cos_SD, sin_SD = (self.position.read(table, self.positions) for table in self.drafter.rope)
        return cos_SD[None], sin_SD[None]


class Eagle3Proposer:
    """An EAGLE-3 head, for all requests of an engine.

    Args:
        embed: the target's embeddings, tokens [...] -> [..., H].
        max_positions: of the target.
    """

    def __init__(self, head: DraftHead, embed: Callable[[Tensor], Tensor], max_positions: int) -> None:
        self.head = head
        self.embed = embed
        self.max_positions = max_positions

    most_steps: int | None = None

    def open(self, topk: int, num_steps: int, tokens: int) -> Drafter:
        """What the head keeps of a new request."""
        return Drafter(self.head, self.max_positions, topk, num_steps, tokens)

    def resume(self, drafter: Drafter, length: int, topk: int, num_steps: int, tokens: int) -> None:
        """Reuses what another request left: keeps its first `length` positions, and makes room for this one."""
        drafter.resume(length, topk, tokens + topk * num_steps)

    def read(self, drafters: Sequence[Drafter], fresh: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Runs the head over newly committed positions; returns its outputs there, [A, H] for each request.

        Args:
            fresh: of each request the token after each position, [A], and the target's aux hidden states there,
                [A, E]. Over fixed buffers the pending positions are read instead, and the output is that of the last
                one alone, [1, H].
        """
        fresh = [drafter.caught_up(*one) for drafter, one in zip(drafters, fresh, strict=True)]
        feature_AH = self.head.fuse(joined([aux_AE for _, aux_AE in fresh]))
        rows = [drafter.line(tokens_A) for drafter, (tokens_A, _) in zip(drafters, fresh, strict=True)]
        hidden = self._pass(rows, feature_AH)
        for index, (drafter, (tokens_A, _)) in enumerate(zip(drafters, fresh, strict=True)):
            if drafter.fixed is None:
                drafter.advance(len(tokens_A))
            else:
                hidden[index] = drafter.fixed.last(hidden[index])
                drafter.fixed.clear()
        return hidden

    def defer(self, drafters: Sequence[Drafter], fresh: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keeps newly committed positions for the next `begin`, where a round does not draft."""
        if full := deferred(drafters, fresh):
            self.read(full, [drafter.deferred.pop() for drafter in full])

    def begin(
        self,
        drafters: Sequence[Drafter],
        fresh: Sequence[tuple[Tensor, Tensor]],
        roots: Sequence[Tensor],
        noises: Sequence[Noise | None],
    ) -> list[Eagle3Draft]:
        """Runs the head over newly committed positions, as `read` does, and proposes the children of the roots.

        Args:
            roots: the root of each request, [1]: the last of the fresh tokens.
            noises: of the draws, or None: with noise the head proposes the tokens that are likeliest to be drawn.
        """
        hidden = [hidden_AH[-1:] for hidden_AH in self.read(drafters, fresh)]
        drafts = []
        for drafter, root_1, noise, hidden_1H, (logp_1k, tokens_1k) in zip(
            drafters, roots, noises, hidden, self._propose(drafters[0].topk, hidden, noises, 1), strict=True
        ):
            read_K = torch.arange(drafter.span.end(0), device=root_1.device)
            # The last position read sees what all of its drafts will.
            visible_1K = first_step_sees(drafter.span.start - 1, read_K, self.head.config.sliding_window)[None]
            layer = Eagle3Layer.below_root(logp_1k, tokens_1k, hidden_AH=hidden_1H, visible_AK=visible_1K)
            drafts.append(Draft(root_1, [layer], noise))
        return drafts

    def deepen(self, drafters: Sequence[Drafter], drafts: Sequence[Eagle3Draft]) -> list[Eagle3Draft]:
        """One more draft step: expands the best of the last one's children, of drafts of one `topk` and one depth."""
        k, depth = drafters[0].topk, drafts[0].steps + 1
        best = [draft.layers[-1].logp_C.topk(k) for draft in drafts]
        parents = [one.indices // k for one in best]
        rows = [
            drafter.branches(draft, one.indices, parent_k)
            for drafter, draft, one, parent_k in zip(drafters, drafts, best, parents, strict=True)
        ]
        features = [draft.layers[-1].hidden_AH[parent_k] for draft, parent_k in zip(drafts, parents, strict=True)]
        hidden = self._pass(rows, joined(features))
        deeper = []
        for draft, one, part, hidden_kH, (logp_kk, tokens_kk) in zip(
            drafts,
            best,
            rows,
            hidden,
            self._propose(drafters[0].topk, hidden, [draft.noise for draft in drafts], depth),
            strict=True,
        ):
            more = {"hidden_AH": hidden_kH, "visible_AK": part.visible_AK}
            layer = draft.layers[-1].below(one, draft.first_row, logp_kk, tokens_kk, **more)
            deeper.append(Draft(draft.root_1, [*draft.layers, layer], draft.noise))
        return deeper

    def _propose(
        self, topk: int, hidden: list[Tensor], noises: Sequence[Noise | None], depth: int
    ) -> list[tuple[Tensor, Tensor]]:
        """`propose`, its result split by prompt."""
        logp_Bk, tokens_Bk = propose(self.head, hidden, noises, depth, topk)
        counts = [len(part) for part in hidden]
        return list(zip(parted(logp_Bk, counts), parted(tokens_Bk, counts), strict=True))

    def _pass(self, rows: list[HeadRows], feature_AH: Tensor) -> list[Tensor]:
        """One pass of the head over the inputs of all prompts, concatenated; its outputs by prompt, [A, H] each."""
        counts = [len(part.tokens_A) for part in rows]

        def attend(*query_key_value: Tensor) -> Tensor:
            if len(rows) == 1:
                return rows[0].attend(*query_key_value)
            parts = zip(rows, *(tensor.split(counts, dim=2) for tensor in query_key_value), strict=True)
            return torch.cat([part.attend(*tensors) for part, *tensors in parts], dim=2)

        embed = self.head.embed_tokens or self.embed
        embedding_1SH = embed(joined([part.tokens_A for part in rows])[None]).to(feature_AH.dtype)
        hidden_1SH = self.head.step(embedding_1SH, feature_AH[None], _rope(rows), attend)
        return parted(hidden_1SH[0], counts)


def propose(
    head: DraftHead, hidden: list[Tensor], noises: Sequence[Noise | None], depth: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and target ids of the topk likeliest children of each parent, [B, k] each.

    Args:
        hidden: of each prompt the head's outputs at its parents; B parents in all.
        noises: of each prompt's draws, or None: with noise the children are those likeliest to be drawn.
        depth: of the children in the tree.
    """
    logits_BD = head.logits(joined(hidden)).float()
    if any(noises):
        parts = zip(parted(logits_BD, [len(part) for part in hidden]), noises, strict=True)
        told = [part if noise is None else noise.foreseen(part, head.target_ids, depth) for part, noise in parts]
        logits_BD = joined(told)
    logp_Bk, draft_ids_Bk = logits_BD.log_softmax(dim=-1).topk(topk, dim=-1)
    # A head that overflows says NaN: its proposals come last, and drafting stops.
    return logp_Bk.nan_to_num_(nan=-torch.inf, neginf=-torch.inf), head.target_ids[draft_ids_Bk]


def _rope(rows: list[HeadRows]) -> tuple[Tensor, Tensor]:
    """RoPE's cos and sin of all tokens of a pass, [1, A, D]; [1, 1, D] where one prompt's tokens share a position."""
    if len(rows) == 1:
        return rows[0].rope()
    tables = [[table.expand(-1, len(part.tokens_A), -1) for table in part.rope()] for part in rows]
    cos_1SD, sin_1SD = (torch.cat(table, dim=1) for table in zip(*tables, strict=True))
    return cos_1SD, sin_1SD
