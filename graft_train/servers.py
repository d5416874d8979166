"""How OpenAI-compatible servers are spoken to."""

import os
from typing import Any

import openai

EXTENSIONS = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""The plain distribution, and the tokens drawn from it: a server may default to the model's generation settings."""
TIMEOUT = openai.Timeout(3600.0, connect=10.0)
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises that has not the promised form; the client checks none."""


def options(url: str) -> dict[str, Any]:
    """How a server is spoken to; the client wants a key even where the server does not."""
    return {"base_url": url, "api_key": os.environ.get("OPENAI_API_KEY") or "none"}


def context_limit(urls: list[str]) -> int | None:
    """The fewest tokens that a server takes for prompt and answer (vLLM's and SGLang's max_model_len).

    None where none says so; one that does not answer now is asked again, with patience, for its answers.
    """
    limits = []
    for url in urls:
        try:
            with openai.OpenAI(**options(url), timeout=10.0, max_retries=0) as client:
                limits.append(getattr(client.models.list().data[0], "max_model_len", None))
        except (openai.OpenAIError, *MALFORMED):
            continue
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def trouble(error: openai.APIError) -> str:
    """What went wrong, in one line, without the key, which some servers repeat."""
    if isinstance(error, openai.APIStatusError):
        return f"{error.status_code} {without_key(error.response.text)[:300]}"
    return without_key(f"{type(error).__name__} {error.__cause__ or error}")


def without_key(said: str) -> str:
    """What a server said, for people."""
    key = os.environ.get("OPENAI_API_KEY")
    return said.replace(key, "***") if key else said
