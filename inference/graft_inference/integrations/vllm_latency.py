"""What a round costs in vLLM, so that the policy can be chosen for it; run by the Python that vLLM is installed for.

    python -m graft_inference.integrations.vllm_latency --target TARGET --head BUNDLE \\
        --length 7 --steps 5 --at-once 8 --out latency.json
    graft calibrate ... policy.latency_from=latency.json

Plans that leave no choice are timed in turn: so many draft steps, so many verified tokens, for so many requests at a
time. Milliseconds are those of one request's share of a step, the lower quartile of all rounds, as other work on a
machine only adds time. In every plan, that of plain decoding included, the head reads what was accepted, as it does
where a policy leaves it out.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig

from ..device import device_name
from ..errors import GraftError
from ..files import replace_file
from ..steadiness import UNSTEADY, quantile, variation
from .vllm import EagleProposer, GraftWorker

ROUNDS, WARM_UP, REPEATS = 16, 4, 3
"""Rounds of a run, those at its beginning that do not count, and runs of each plan."""
UNDISTURBED = 0.25
"""The quantile of rounds that counts."""


class ForcedProposer(EagleProposer):
    """Drafts so many steps and proposes so many tokens, whatever the head says, and notes when each round drafts."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self._batch = runner.input_batch
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self.steps = self.length = 0
        self.moments: list[tuple[float, int]] = []

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> list[list[int]]:
        self.moments.append((time.perf_counter(), self._batch.num_reqs))
        super().propose(self.steps, *args, **kwargs)
        return torch.randint(self._vocab_size, (self._batch.num_reqs, self.length)).tolist()


class TimingWorker(GraftWorker):
    """The same worker with `ForcedProposer` as its drafter."""

    proposer = ForcedProposer

    def force(self, steps: int, length: int) -> None:
        """Of all rounds from now on."""
        drafter = self.model_runner.drafter
        drafter.steps, drafter.length, drafter.moments = steps, length, []

    def moments(self) -> list[tuple[float, int]]:
        """When rounds drafted since then, in seconds, and for how many requests."""
        return self.model_runner.drafter.moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True, help="a bundle, or an EAGLE-3 head")
    parser.add_argument(
        "--length",
        type=int,
        required=True,
        help="tokens of the longest chain, the most of policy.num_draft_tokens less one",
    )
    parser.add_argument("--steps", type=int, required=True, help="most draft steps, as policy.num_steps")
    parser.add_argument("--at-once", type=int, default=1, help="requests at a time that the policy is for")
    parser.add_argument("--context", type=int, default=256, help="tokens of each text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    arguments = parser.parse_args()
    found = json.dumps(measured(arguments), indent=2) + "\n"
    replace_file(arguments.out, lambda aside: aside.write_text(found, encoding="utf-8"))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table that `policy.latency_from` reads, and what it was measured on."""
    llm = _start(arguments)
    lengths, steps = range(arguments.length + 1), range(1, arguments.steps + 1)
    plans = [*((0, length) for length in lengths), *((step, 1) for step in steps)]
    found: dict[tuple[int, int], list[float]] = {plan: [] for plan in plans}
    for number in range(REPEATS):
        for plan in plans if number % 2 else reversed(plans):
            found[plan] += _times(llm, plan, arguments)
    share = {plan: 1e3 * quantile(times, UNDISTURBED) / arguments.at_once for plan, times in found.items()}
    varied = variation(found.values())
    if varied > UNSTEADY:
        print(
            f"vllm_latency: these figures cannot be trusted: rounds of the same plan varied by {varied:.0%} "
            "(interquartile range over median); measure again on an idle machine",
            file=sys.stderr,
        )
    return {
        "num_draft_tokens": [1 + length for length in lengths],
        "contexts": [arguments.context],
        "verify_ms": [rising([share[0, length] for length in lengths])],
        "draft_ms": rising([0.0, *(max(0.0, share[step, 1] - share[0, 1]) for step in steps)]),
        "measured_on": {
            "engine": f"vLLM {vllm.__version__}, {arguments.at_once} requests at a time",
            "name": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "torch": torch.__version__,
        },
    }


def _start(arguments: argparse.Namespace) -> LLM:
    head = {"method": "eagle3", "model": arguments.head, "num_speculative_tokens": arguments.length}
    settings = {
        "max_num_seqs": arguments.at_once,
        # Room for the accepted tokens of a last round.
        "max_model_len": arguments.context + ROUNDS + 2 * (arguments.length + 1),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "worker_cls": "graft_inference.integrations.vllm_latency.TimingWorker",
    }
    speculative = head | {"disable_padded_drafter_batch": True}
    return LLM(arguments.target, speculative_config=speculative, **settings | arguments.settings)


def _times(llm: LLM, plan: tuple[int, int], arguments: argparse.Namespace) -> list[float]:
    """Seconds from round to round, where all requests take part.

    Raises:
        GraftError: reading the texts takes so many passes that some requests end before the last one begins.
    """
    llm.collective_rpc("force", args=plan)
    texts = torch.randint(llm.model_config.get_vocab_size(), (arguments.at_once, arguments.context)).tolist()
    # Tokens are accepted by chance at most, so each round gives about one.
    sampling = SamplingParams(temperature=0.0, max_tokens=ROUNDS, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
    whole = [moment for moment, count in llm.collective_rpc("moments")[0] if count == arguments.at_once][WARM_UP:]
    if len(whole) < 2:
        raise GraftError(
            f"--at-once {arguments.at_once} texts of --context {arguments.context} tokens were not read before the "
            "first of them ended: lower either, or raise max_num_batched_tokens in --settings"
        )
    return [later - earlier for earlier, later in pairwise(whole)]


def rising(times: Sequence[float]) -> list[float]:
    """The nearest times that never fall, by least squares: more work never costs less, what says otherwise is noise.

    Neighbours that fall are pooled until none does.
    """
    pools: list[list[float]] = []
    for time_ms in times:
        pools.append([time_ms])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [mean(pool) for pool in pools for _ in pool]


if __name__ == "__main__":
    main()
