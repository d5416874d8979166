"""The text of a few traced answers, by which people read their rounds (`graft report`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graft_inference import GraftEngine, GraftError
from graft_inference.files import read_json
from graft_inference.spelling import Spelling
from graft_train.calibrate.traces import Traces

TEXTS = "texts.json"
SHOWN, MOST_TOKENS = 4, 256
"""Answers that are kept, and tokens of each."""
MOST_CHARACTERS = 4000
"""Of a prompt, from its end."""


@dataclass(frozen=True)
class TracedText:
    """One answer.

    Attributes:
        number: of the prompt in the traces.
        prompt: its text, or the end of it.
        tokens: ids; the first one is the prefill's, each of the others the one behind a traced position.
        pieces: what each token adds to the text; "" where a character goes on in the next token.
    """

    number: int
    prompt: str
    tokens: list[int]
    pieces: list[str]


def texts_of(engine: GraftEngine, prompts: Sequence[Tensor], traces: Sequence[Traces], temperature: float) -> Any:
    """Of the first answers, as JSON values: their text, and that of every token that was proposed in them.

    Args:
        traces: of the same continuations, with the noise told and without.
    """
    tokenizer: Any = engine.tokenizer
    answers, named = [], set()
    for number in traces[0].prompt_T.unique()[:SHOWN].tolist():
        prompt_S = prompts[number]
        first = engine.generate(prompt_S, 1, temperature, "autoregressive", seed=number).sequences[0, -1:].tolist()
        tokens = (first + following(traces[0], number))[:MOST_TOKENS]
        prompt = tokenizer.decode(prompt_S, clean_up_tokenization_spaces=False)[-MOST_CHARACTERS:]
        answers.append({"number": number, "prompt": prompt, "tokens": tokens, "pieces": _pieces(tokenizer, tokens)})
        for one in traces:
            named |= _proposed(one, number, len(tokens))
    return {"answers": answers, "tokens": _spelled(tokenizer, sorted(named))}


def read_texts(path: Path, traces: Traces) -> tuple[list[TracedText], dict[int, str]]:
    """The answers, and the texts of the tokens that were proposed in them.

    Raises:
        GraftError: a damaged file, or the texts of other traces.
    """
    remedy = f"delete {path.parent} and run graft calibrate"
    values = read_json(path, remedy)
    try:
        answers = [TracedText(**one) for one in values["answers"]]
        spelled = {int(token): str(text) for token, text in values["tokens"].items()}
        fits = set(values) == {"answers", "tokens"} and all(_fits(one, traces, spelled) for one in answers)
    except (KeyError, TypeError, AttributeError) as error:
        raise GraftError(f"{path} is not as graft calibrate writes it ({error!r}): {remedy}") from error
    if not fits:
        raise GraftError(f"{path} has the text of other traces than those beside it: {remedy}")
    return answers, spelled


def following(traces: Traces, number: int) -> list[int]:
    """The tokens behind the traced positions of a prompt."""
    return traces.truth_TD[traces.prompt_T == number, 0].tolist()


def _fits(one: TracedText, traces: Traces, spelled: dict[int, str]) -> bool:
    known = following(traces, one.number)[: MOST_TOKENS - 1]
    is_text = isinstance(one.prompt, str) and all(isinstance(piece, str) for piece in one.pieces)
    proposed = _proposed(traces, one.number, len(one.tokens))
    return is_text and len(one.pieces) == len(one.tokens) and one.tokens[1:] == known and proposed <= spelled.keys()


def _proposed(traces: Traces, number: int, count: int) -> set[int]:
    """The tokens that head and sources proposed at the first positions of a prompt."""
    rows = (traces.prompt_T == number).nonzero()[:, 0][:count]
    columns = [traces.tokens_TC, *(source.tokens_TR for source in traces.sources.values())]
    return {int(token) for column in columns for token in column[rows].unique() if token >= 0}


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    spelling = Spelling(tokenizer, skip_special=False)
    pieces = [spelling.put(token) for token in tokens]
    return [*pieces[:-1], pieces[-1] + spelling.end()]


def _spelled(tokenizer: Any, tokens: list[int]) -> dict[int, str]:
    """The text of each token, as it stands behind others: alone, some tokenizers would drop a leading space."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    texts = [anchor, *(anchor + [token] for token in tokens)]
    lines = tokenizer.batch_decode(texts, clean_up_tokenization_spaces=False)
    before = len(lines[0])
    return {token: line[before:] for token, line in zip(tokens, lines[1:], strict=True)}
