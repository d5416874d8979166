"""Settings of `regenerate`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from graft_inference.errors import GraftError
from graft_train.config.bounds import check_least, check_servers


@dataclass(slots=True, kw_only=True)
class RegenerateConfig:
    """Attributes:
    samples: training samples made; fewer where the data has fewer.
    held_out: prompts kept for calibration, and as many for evaluation.
    answers: target (it answers the prompts itself, so that the head learns its habits) or data (the
        conversations' own answers are trained on).
    max_prompt_tokens: longest prompt; a conversation with a longer one asks with fewer turns, or is left out.
        Prompt and answer together should fit head.max_length.
    max_new_tokens: longest answer.
    batch: prompts answered at a time; with servers, requests in flight at each.
    temperatures: dealt out to the prompts (in process and not on a CPU: to the batches) in turn; 0 is greedy.
    states: keep the target's hidden states while it answers, in {run_dir}/data/states, so that neither distill
        (with head.states=disk) nor build_corpus runs it again; the space is that of head.states=disk.
    base_url: an OpenAI-compatible server of the target that answers in place of this process, or a list of
        such, for example http://localhost:8000/v1. Its key, if it wants one, is read from OPENAI_API_KEY.
    server_extensions: send what vLLM and SGLang know beyond OpenAI's fields, to get exact tokens back and to
        keep a server's own sampling defaults out; false for servers that refuse unknown fields.
    retries: attempts after a failed request, with a growing pause before each, up to 8 seconds.
    """

    samples: int = 50_000
    held_out: int = 200
    answers: str = "target"
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 1024
    batch: int = 32
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.8])
    states: bool = False
    base_url: Any = None
    server_extensions: bool = True
    retries: int = 10

    def __post_init__(self) -> None:
        if self.answers not in ("target", "data"):
            raise GraftError(f"regenerate.answers={self.answers} is unknown; choose target or data")
        names = ("samples", "held_out", "max_prompt_tokens", "max_new_tokens", "batch")
        check_least("regenerate", self, dict.fromkeys(names, 1) | {"retries": 0})
        if not self.temperatures or min(self.temperatures) < 0:
            raise GraftError(f"regenerate.temperatures={self.temperatures} must be a list of numbers, none negative")
        if self.states and (self.answers != "target" or self.base_url is not None):
            raise GraftError(
                "regenerate.states=true keeps the states of answers that this process computes: set "
                "regenerate.answers=target and no regenerate.base_url"
            )
        check_servers("regenerate.base_url", self.base_url, self.servers())

    def servers(self) -> list[str]:
        if self.base_url is None:
            return []
        return self.base_url if isinstance(self.base_url, list) else [self.base_url]

    def decisive(self) -> dict[str, Any]:
        """What the samples depend on: which servers answered, and how many at a time, does not matter."""
        settings = asdict(self) | {"base_url": bool(self.servers())}
        left_out = {"retries", "states"} | ({"batch"} if self.servers() else set())
        return {name: value for name, value in settings.items() if name not in left_out}
