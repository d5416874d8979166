"""Graft's trees inside SGLang. Written against 0.5.23, not run: that needs a GPU. docs/sglang.md says what was tested.

    python -m sglang.launch_server --model-path TARGET --speculative-algorithm GRAFT \\
        --speculative-draft-model-path BUNDLE --speculative-num-steps 5 --speculative-eagle-topk 8 \\
        --speculative-num-draft-tokens 32 --disable-overlap-schedule

SGLang drafts as EAGLE-3 does, verifies, samples and schedules. The policy chooses which of the head's nodes and of
those that retrieval finds are verified. SGLang finds this module by its entry points (`sglang.srt.plugins`), and no
file of it is changed: what is registered are an algorithm, and hooks of SGLang's own kind where it is used.
"""

import inspect
from dataclasses import fields
from typing import Any

import sglang
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo
from torch import Tensor

from ..errors import GraftError
from .trees import CPU, Shape, TreeRounds, VerifiedTrees, drafted_trees

VERSION = "0.5.23"
NAME = "GRAFT"
WORKER = "sglang.srt.speculative.eagle_worker_v2"
ORGANIZE = ["score_list", "token_list", "parents_list", "num_draft_token"]
"""Parameters of SGLang's function that sees every candidate of a round."""
WRITTEN = {"draft_token", "custom_mask", "positions", "retrieve_next_token", "retrieve_next_sibling"}
"""What a tree is to SGLang's verification."""
PAGED = {"flashinfer", "fa3", "triton"}
"""SGLang's attention backends that draft trees over pages of several tokens."""


class GraftAlgorithm(CustomSpecAlgo):
    """What SGLang asks its algorithms: the answers of EAGLE3, whose head, caches and verification these are.

    The last three are not among those that SGLang makes sure of when an algorithm is registered, but its scheduler
    asks them.
    """

    def is_eagle(self) -> bool:
        return True

    def is_eagle3(self) -> bool:
        return True

    def handle_server_args(self, server_args: Any) -> None:
        """SGLang's own defaults for its EAGLE algorithms."""
        server_args.max_running_requests = server_args.max_running_requests or 48
        server_args.enable_mixed_chunk = False

    def need_topk(self) -> bool:
        return True

    def carries_draft_hidden_states(self) -> bool:
        return True

    def create_future_map(self, device: Any, req_to_token_pool: Any, **needs: bool) -> Any:
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, **needs)


def register() -> None:
    """SGLang calls this in each of its processes.

    Raises:
        GraftError: another version, or one whose parts are not those that this was written for.
    """
    version = sglang.__version__
    if version != VERSION:
        raise GraftError(f"this is SGLang {version}, and Graft was written for {VERSION}: install that")
    registered = SpeculativeAlgorithm.register(
        NAME, supports_overlap=False, validate_server_args=check_arguments, spec_class=GraftAlgorithm
    )
    registered(worker_class)


def check_arguments(server_args: Any) -> None:
    """Raises GraftError for settings with which a round would not be one of Graft."""
    given = {name: getattr(server_args, f"speculative_{name}") for name in ("num_steps", "num_draft_tokens")}
    given["eagle_topk"] = server_args.speculative_eagle_topk
    for name, value in given.items():
        if value is None:
            raise GraftError(f"--speculative-{name.replace('_', '-')} is missing: {NAME} chooses none by itself")
    if server_args.speculative_eagle_topk < 2:
        raise GraftError(
            "--speculative-eagle-topk 1 makes chains, and Graft chooses among the nodes of trees: set 2 on"
        )
    if not server_args.disable_overlap_schedule:
        raise GraftError("retrieval reads the text of the last round: set --disable-overlap-schedule")
    if server_args.pp_size > 1 or server_args.attn_dp_size > 1:
        raise GraftError("Graft runs without pipeline parallelism and attention by data parallelism: leave them out")
    if server_args.disaggregation_mode != "null":
        raise GraftError("Graft reads a prompt where it drafts: leave out --disaggregation-mode")
    backends = {getattr(server_args, f"{phase}attention_backend") for phase in ("", "prefill_", "decode_")} - {None}
    if server_args.page_size > 1 and not backends <= PAGED:
        raise GraftError(
            f"SGLang drafts trees over pages of {server_args.page_size} tokens with {', '.join(sorted(PAGED))} alone: "
            "set --page-size 1, or --attention-backend to one of them"
        )
    for name in ("speculative_use_rejection_sampling", "speculative_adaptive"):
        if getattr(server_args, name):
            raise GraftError(f"--{name.replace('_', '-')} is for SGLang's own trees: leave it out")


def worker_class(server_args: Any) -> Any:
    """SGLang's own EAGLE worker, whose draft worker is Graft's from now on in this process.

    Raises:
        GraftError: SGLang's parts are others than those of its version, or hooks do not reach them.
    """
    from sglang.srt.speculative import eagle_worker_v2
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    asked = list(inspect.signature(eagle_worker_v2.organize_draft_results).parameters)
    parts = all(hasattr(eagle_worker_v2.EagleDraftWorker, name) for name in ("draft", "_capture_cuda_graphs"))
    parts &= WRITTEN.issubset(field.name for field in fields(EagleVerifyInput))
    if asked != ORGANIZE or not parts:
        raise GraftError(f"the EAGLE worker of this SGLang is not that of {VERSION}: install SGLang {VERSION} anew")
    graft = draft_worker_class(eagle_worker_v2.EagleDraftWorker, EagleVerifyInput)
    HookRegistry.register(f"{WORKER}.EagleDraftWorker", graft, HookType.REPLACE)
    HookRegistry.register(f"{WORKER}.organize_draft_results", graft.watch, HookType.AROUND)
    HookRegistry.apply_hooks()
    if eagle_worker_v2.EagleDraftWorker is not graft or not hasattr(
        eagle_worker_v2.organize_draft_results, "__wrapped__"
    ):
        raise GraftError("SGLang did not apply the hooks of Graft: another plugin may have taken their places")
    return eagle_worker_v2.EAGLEWorkerV2


def draft_worker_class(draft_worker: Any, verify_input: Any) -> Any:
    """Graft's draft worker and its trees, made of SGLang's own classes."""

    class GraftVerifyInput(verify_input):
        """A tree of any form: as deep as it has nodes, as those of SGLang's NGRAM."""

        @property
        def max_tree_depth(self) -> int:
            return int(self.draft_token_num)

        @property
        def tree_topk(self) -> int:
            return -1

    class GraftDraftWorker(draft_worker):
        """Drafts as SGLang does, and puts the policy's tree in the place of its tree."""

        found: tuple[Tensor, Tensor, Tensor]
        """Probabilities, tokens and expanded nodes of the last round, [B, C], [B, C] and [B, G]."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            shape = Shape(self.topk, self.speculative_num_steps, self.speculative_num_draft_tokens)
            target = self.target_worker
            self._rounds = TreeRounds.of_bundle(
                self.server_args.speculative_draft_model_path,
                target.model_config.hf_text_config,
                getattr(target, "tokenizer", None),
                shape,
            )

        def _capture_cuda_graphs(self) -> None:
            super()._capture_cuda_graphs()
            self.cuda_graph_runner = None  # nobody could look at what a graph has drafted

        @classmethod
        def watch(cls, organize: Any, score_list: Any, token_list: Any, parents_list: Any, num_draft_token: int) -> Any:
            """Around SGLang's `organize_draft_results`: keeps all candidates, of which that keeps the best."""
            cls.found = (
                torch.cat(score_list, dim=1).flatten(1),
                torch.cat(token_list, dim=1),
                torch.cat(parents_list, dim=1),
            )
            return organize(score_list, token_list, parents_list, num_draft_token)

        def draft(self, batch: Any, *, with_topology: bool = False) -> Any:
            """The verification of a round, with the policy's tree for every request."""
            made = super().draft(batch)
            if batch.forward_mode.is_idle():
                return made
            nodes = self.speculative_num_draft_tokens
            roots_B = made.draft_token.view(-1, nodes)[:, 0].to(CPU)
            probabilities_BC, tokens_BC, expanded_BG = (one.to(CPU) for one in self.found)
            drafted = drafted_trees(roots_B, tokens_BC, probabilities_BC, expanded_BG, self.topk)
            texts = [text_of(request, int(root)) for request, root in zip(batch.reqs, roots_B, strict=True)]
            trees = self._rounds.trees(texts, drafted)
            write_trees(made, trees, batch.seq_lens, self._mask_mode())
            return GraftVerifyInput(**{field.name: getattr(made, field.name) for field in fields(verify_input)})

        def _mask_mode(self) -> Any:
            mask = self.target_worker.model_runner.attn_backend.verify_mask
            return self.tree_mask_mode if mask is None else mask.mode

    return GraftDraftWorker


def text_of(request: Any, root: int) -> Tensor:
    """A request's prompt and output, the root last, which a round may or may not have written into it yet."""
    tokens = [*request.origin_input_ids, *request.output_ids]
    return torch.tensor(tokens if tokens[-1] == root else [*tokens, root])


def write_trees(made: Any, trees: VerifiedTrees, lengths_B: Tensor, mode: Any) -> None:
    """Writes trees over those of SGLang's verification input, in its own buffers.

    Args:
        made: an `EagleVerifyInput` of as many nodes.
        lengths_B: of the texts, without the drafted tokens.
        mode: of the mask: with the texts before the trees, or the trees alone.

    Raises:
        GraftError: a mask whose bits are packed.
    """
    device = made.draft_token.device
    batch, nodes = trees.tokens_BN.shape
    made.draft_token.copy_(trees.tokens_BN.flatten().to(device))
    made.positions.copy_((lengths_B[:, None] + trees.depths_BN.to(device)).flatten())
    made.retrieve_next_token.copy_(trees.child_BN.to(device))
    made.retrieve_next_sibling.copy_(trees.sibling_BN.to(device))
    if mode.name == "QLEN_ONLY":
        places = torch.arange(batch * nodes * nodes, device=device)
    elif mode.name == "FULL_MASK":
        row_N, lengths_B = torch.arange(nodes, device=device), lengths_B.long()
        before_B = nodes * (lengths_B.cumsum(0) - lengths_B + nodes * torch.arange(batch, device=device))
        row_BN = before_B[:, None] + row_N * (lengths_B[:, None] + nodes) + lengths_B[:, None]
        places = (row_BN[..., None] + row_N).flatten()
    else:
        raise GraftError(f"SGLang's attention backend packs its masks ({mode.name}): choose triton or flashinfer")
    made.custom_mask[places] = trees.ancestors_BNN.to(device).flatten()
