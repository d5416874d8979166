"""What the server counts, in Prometheus' format."""

from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from ..policy.policy import Policy
from ..stats import GenerationStats
from .answer import Answer

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server. An answer is counted when it has ended, however it did."""

    def __init__(self) -> None:
        disable_created_metrics()  # or every figure would come with the time when it was first counted
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests for an answer, by how they ended.", ["outcome"])
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts that were begun.")
        self.kept = self._counter("kept_prompt_tokens", "Of these, what the request before had left.")
        self.generated = self._counter("generated_tokens", "Tokens of answers.")
        self.decoded = self._counter("decoded_tokens", "Of these, all but the first of each, which the prefill gives.")
        self.rounds = self._counter("rounds", "Passes of the target after the prefill, by the plan in use.", ["plan"])
        self.accepted = self._counter(
            "accepted_tokens",
            "Proposed tokens that were accepted, by who proposed them and their place in the round, from 1.",
            ["source", "position"],
        )
        self.checkpoints = self._counter(
            "checkpoint_rounds", "Rounds by the checkpoint where drafting stopped.", ["checkpoint"]
        )
        length = self._gauge("acceptance_length", "Tokens per round since the server started; plain decoding has 1.")
        length.set_function(self._acceptance_length)
        self.first = Histogram(
            "graft_time_to_first_token_seconds", "From arrival.", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "graft_request_seconds", "Of completed requests.", buckets=SECONDS, registry=self.registry
        )
        self._rounds = self._tokens = 0

    def follow(
        self, policy: Policy, method: str, running: Callable[[], float], unfinished: Callable[[], float]
    ) -> None:
        """Exposes the plan in use, and gauges of how many requests are running and waiting."""
        plan = policy.plan(method)
        info = self._gauge("plan_info", "The plan of the bundle that is served.", ["method", "kind", "sources"])
        info.labels(method, type(plan).__name__, ",".join(plan.sources)).set(1)
        self._gauge("requests_running", "Answers under way.").set_function(running)
        self._gauge("requests_waiting", "Requests that wait.").set_function(lambda: max(0, unfinished() - running()))

    def ended(self, answer: Answer, method: str) -> None:
        """Counts an answer that has ended."""
        self.requests.labels(answer.outcome).inc()
        stats = answer.stats
        if not answer.first:
            return
        self.prompt.inc(len(answer.prompt_ids))
        self.kept.inc(stats.reused)
        self.first.observe(answer.first - answer.arrived)
        if answer.outcome == "completed":
            self.whole.observe(answer.ended - answer.arrived)
        self._count(stats, method)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _count(self, stats: GenerationStats, method: str) -> None:
        decoded = stats.emitted - stats.sources.count("prefill")
        self._rounds, self._tokens = self._rounds + stats.rounds, self._tokens + decoded
        self.generated.inc(stats.emitted)
        self.decoded.inc(decoded)
        # Where nothing may fall back, every round has the method's own plan.
        for plan, rounds in (stats.fallback or {method: stats.rounds}).items():
            self.rounds.labels(plan).inc(rounds)
        for checkpoint, rounds in stats.checkpoints.items():
            self.checkpoints.labels(checkpoint).inc(rounds)
        for source, position in proposed(stats.sources):
            self.accepted.labels(source, str(position)).inc()

    def _acceptance_length(self) -> float:
        return self._tokens / self._rounds if self._rounds else 1.0

    def _counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"graft_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"graft_{name}", meaning, labels, registry=self.registry)


def proposed(sources: Sequence[str]) -> list[tuple[str, int]]:
    """Who proposed each accepted token, and its place in its round; the target's own tokens end the rounds."""
    found, position = [], 1
    for source in sources:
        if source in ("prefill", "bonus"):
            position = 1
        else:
            found.append((source, position))
            position += 1
    return found
