"""Settings of the `evaluate` stage, and where the suites are that it knows by name."""

from dataclasses import dataclass, field
from typing import Any

from graft_inference.errors import GraftError
from graft_train.config.bounds import check_least, check_servers


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A published set of questions. Its file in EAGLE's layout (question_id, category, turns) is read, too.

    Attributes:
        path, subset, split: on the Hub; no path where it is published as a file alone.
        identity: its field that tells questions apart; None where their number does.
        asked: its fields with what the user asks, or the one with the list of the user's turns.
        before: what stands in front of that.
        category: of all its questions; None where each has its own.
        continues: a tokenizer without a chat template will do, as the questions are texts to go on with.
    """

    path: str | None = None
    subset: str | None = None
    split: str = "test"
    identity: str | None = None
    asked: tuple[str, ...] = ("turns",)
    before: str = ""
    category: str | None = None
    continues: bool = False


SUITES = {
    "mt_bench": Suite(path="HuggingFaceH4/mt_bench_prompts", split="train", identity="prompt_id", asked=("prompt",)),
    "humaneval": Suite(
        path="openai/openai_humaneval", identity="task_id", asked=("prompt",), category="code", continues=True
    ),
    "gsm8k": Suite(path="openai/gsm8k", subset="main", asked=("question",), category="math"),
    "alpaca": Suite(path="tatsu-lab/alpaca", split="train", asked=("instruction", "input"), category="instructions"),
    "spec_bench": Suite(),
    "sum": Suite(
        path="abisee/cnn_dailymail",
        subset="3.0.0",
        identity="id",
        asked=("article",),
        before="Summarize: ",
        category="summarization",
    ),
    "qa": Suite(path="google-research-datasets/nq_open", split="validation", asked=("question",), category="qa"),
    "speed_bench": Suite(path="nvidia/SPEED-Bench", subset="qualitative"),
}


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """What is measured.

    Attributes:
        suite: mt_bench, humaneval, gsm8k, alpaca, spec_bench, sum, qa or speed_bench, with all turns and categories,
            in place of the run's own held-out prompts.
        path: a data set that prompts are taken from, as data.path has it, in place of the run's own held-out ones;
            what is found goes to {run_dir}/evaluation-NAME, and onto the bundle's card beside them. With a suite,
            where that is read from; null means the Hub.
        hub_split: which split of it is read, where it is from the Hub; null means the suite's own, or test.
        hub_subset: which subset, where it has several; null means the suite's own.
        prompts: as many as are measured; all of them are checked for losslessness. Of a suite, as many questions,
            equally many of each category, each with all its turns.
        max_new_tokens: per prompt and method.
        temperature: of the timed runs; losslessness is checked greedily.
        repeats: timed runs of every prompt with every method; the median counts.
        fallback: graft may narrow its tree or stop speculating where it does not pay, as it does by default.
        check_lossless: compare every method's greedy tokens in fp32, which takes a target of that size, with
            transformers' own.
        server: an OpenAI-compatible server of the target, speculating or not, that is timed in place of the engine,
            for example http://localhost:8000/v1; or a list of several, which take turns and are compared with the
            last. Its key, if it wants one, is read from OPENAI_API_KEY.
        concurrency: requests that a server is sent at a time; each number is measured for itself.
    """

    suite: str | None = None
    path: str | None = None
    hub_split: str | None = None
    hub_subset: str | None = None
    prompts: int = 80
    max_new_tokens: int = 512
    temperature: float = 0.0
    repeats: int = 5
    fallback: bool = True
    check_lossless: bool = True
    server: Any = None
    concurrency: list[int] = field(default_factory=lambda: [1, 8, 32])

    def __post_init__(self) -> None:
        # The prefill gives the first token.
        check_least("evaluation", self, {"prompts": 1, "max_new_tokens": 2, "repeats": 1})
        if self.temperature < 0:
            raise GraftError(f"evaluation.temperature={self.temperature}: 0 is greedy, more samples")
        if self.suite is not None and self.suite not in SUITES:
            raise GraftError(f"evaluation.suite={self.suite} is unknown; choose one of {', '.join(SUITES)}")
        if self.suite is not None and self.path is None and SUITES[self.suite].path is None:
            raise GraftError(
                f"evaluation.suite={self.suite} is read from a file, as no data set on the Hub is known to hold it: "
                "give its question.jsonl as evaluation.path"
            )

        _check_servers(self.server, self.servers())
        if not self.concurrency or min(self.concurrency) < 1 or len(set(self.concurrency)) < len(self.concurrency):
            raise GraftError(
                f"evaluation.concurrency={self.concurrency} must be a list of numbers, each at least 1 and there once"
            )

    def servers(self) -> list[str]:
        """The addresses, without a slash at the end; none where the engine is measured."""
        given = self.server if isinstance(self.server, list) else [self.server]
        return [str(url).rstrip("/") for url in given if url is not None]

    @property
    def is_own(self) -> bool:
        """Whether the run's own held-out prompts are measured."""
        return self.path is None and self.suite is None


def _check_servers(given: Any, urls: list[str]) -> None:
    if given is not None and not urls:
        raise GraftError(f"evaluation.server={given} must be one http(s) address or a list of them")
    check_servers("evaluation.server", given, urls)
    if len(set(urls)) < len(urls):
        raise GraftError(f"evaluation.server={given} names a server twice")
