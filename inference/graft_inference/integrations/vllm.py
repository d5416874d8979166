"""Graft inside vLLM: vLLM drafts, verifies and schedules; the policy says when drafting stops, and retrieval joins in.

    vllm serve TARGET --worker-cls graft_inference.integrations.vllm.GraftWorker --speculative-config \\
        '{"method": "eagle3", "model": "BUNDLE", "num_speculative_tokens": 6, "disable_padded_drafter_batch": true}'

vLLM verifies chains, so the bundle's policy must be one of chains (`policy.kind=chain`). No file of vLLM is changed.
The classes that are extended here are its own, of its V1 model runner, and are checked when the worker starts. The
output is that of vLLM's own verification.
"""

import inspect
from contextlib import suppress
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.spec_decode.eagle import EagleProposer

from ..errors import GraftError
from .chains import CPU, ChainRound, ChainRounds

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

VERSIONS = ("0.32.",)
"""Of vLLM, that this has run in."""
PROPOSE = {"num_speculative_tokens", "next_token_ids", "sampling_metadata", "common_attn_metadata"}
"""Arguments of vLLM's `propose` that this relies on."""
BUNDLE = "graft_bundle"
"""In vLLM's `additional_config`: the bundle of `GraftRetriever`."""


class StopDrafting(Exception):
    """Every request's draft has stopped: the way out of vLLM's loop over draft steps."""


class GraftProposer(EagleProposer):
    """vLLM's EAGLE-3 drafter under a learned policy.

    vLLM's own `propose` runs the head, in its cache and with its kernels. It asks `_sample_draft_tokens` for every
    draft token, which is where the policy looks on.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self._rounds = _rounds_of(vllm_config, self.speculative_config.model)
        self._batch = runner.input_batch
        self._requests = runner.requests
        self._round: ChainRound | None = None

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Returns a chain for every request of the batch, as long as the policy finds it worth verifying."""
        batch = self._batch
        ends = zip(batch.req_ids, batch.num_tokens_no_spec[: batch.num_reqs], strict=True)
        texts = [
            _text(batch.token_ids_cpu[row], int(end)) if self._writes(name, int(end)) else None
            for row, (name, end) in enumerate(ends)
        ]
        self._round = self._rounds.begin(texts, num_speculative_tokens)
        steps = min(self._rounds.plan.num_steps, num_speculative_tokens) if self._round.is_drafting else 0
        with suppress(StopDrafting):  # without a step the head still reads what was accepted
            super().propose(steps, *args, **kwargs)
        return self._round.chains()

    def _sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, None]:
        """The head's likeliest token after every request, [B]; `vLLM` calls this in every draft step."""
        assert self._round is not None
        logp_BV = self.model.compute_logits(hidden_states).float().log_softmax(dim=-1)
        logp_B, tokens_B = logp_BV.max(dim=-1)
        self._round.deepen(tokens_B.to(CPU), logp_B.to(CPU))
        if not self._round.is_drafting:
            raise StopDrafting
        return tokens_B, None

    def _writes(self, name: str, end: int) -> bool:
        """Whether a request has been read to its end, so that what comes next is drafted."""
        return end > self._requests[name].num_prompt_tokens


class GraftWorker(Worker):
    """vLLM's worker with `GraftProposer` as its drafter."""

    proposer: type[EagleProposer] = GraftProposer

    def init_device(self) -> None:
        _check_start(self)
        super().init_device()
        runner = self.model_runner
        runner.drafter = self.proposer(self.vllm_config, runner.device, runner)


class GraftRetriever:
    """Retrieval alone, through vLLM's documented hook for proposers. No head runs.

    vllm serve TARGET --additional-config '{"graft_bundle": "BUNDLE"}' --speculative-config \\
        '{"method": "custom_class", "model": "graft_inference.integrations.vllm.GraftRetriever",
          "num_speculative_tokens": 6}'
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        _check_version()
        bundle = vllm_config.additional_config.get(BUNDLE)
        if not bundle:
            raise GraftError(f'the bundle is missing: --additional-config \'{{"{BUNDLE}": "DIRECTORY_OR_HUB_ID"}}\'')
        self._rounds = _rounds_of(vllm_config, bundle).without_drafting()
        self._most = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, target: torch.nn.Module) -> None:
        """vLLM calls this; there is no model."""

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Returns a chain for every request that has just written; see vLLM's `CustomClassProposer`."""
        texts = [
            _text(token_ids_cpu[row], int(num_tokens_no_spec[row])) if sampled else None
            for row, sampled in enumerate(sampled_token_ids)
        ]
        return self._rounds.begin(texts, self._most).chains()


def _text(row: Any, end: int) -> Tensor:
    return torch.from_numpy(row[:end]).long()


def _rounds_of(vllm_config: VllmConfig, bundle: str) -> ChainRounds:
    model = vllm_config.model_config
    tokenizer = None if model.skip_tokenizer_init else cached_tokenizer_from_config(model)
    most = vllm_config.speculative_config.num_speculative_tokens
    return ChainRounds.of_bundle(bundle, model.hf_text_config, tokenizer, most)


def _check_version() -> None:
    if not vllm.__version__.startswith(VERSIONS):
        raise GraftError(f"this is vLLM {vllm.__version__}, and Graft runs in {', '.join(VERSIONS)}x: install that")


def _check_start(worker: Any) -> None:
    """Raises GraftError where vLLM, or how it was started, is not what this was written for."""
    _check_version()
    speculative = worker.vllm_config.speculative_config
    asked = set(inspect.signature(EagleProposer.propose).parameters)
    if not asked >= PROPOSE or not hasattr(EagleProposer, "_sample_draft_tokens"):
        raise GraftError(f"EagleProposer of this vLLM {vllm.__version__} is another one: install {VERSIONS[0]}x")
    if speculative is None or speculative.method != "eagle3":
        method = speculative and speculative.method
        raise GraftError(f"GraftWorker drafts with an EAGLE-3 head: method must be eagle3, not {method}")
    if not speculative.disable_padded_drafter_batch:
        raise GraftError("set disable_padded_drafter_batch to true in --speculative-config: chains differ in length")
    if worker.use_v2_model_runner:
        raise GraftError("Graft needs vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
    if worker.parallel_config.data_parallel_size > 1 or worker.parallel_config.pipeline_parallel_size > 1:
        raise GraftError("Graft runs without data and pipeline parallelism: start one server for each replica")
