"""Preview: samples as text, with the tokens that are trained on coloured."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from graft_train.data.samples import Sample

SHOWN = 3
TRAINED = "bold green"


def show(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, console: Console | None = None) -> None:
    """Prints the first samples, and the share of trained tokens of all that are given."""
    console = console or Console(highlight=False)
    for sample in samples[:SHOWN]:
        console.rule(sample.id)
        console.print(_coloured(sample, tokenizer))
    trained, tokens = trained_tokens(samples)
    console.rule()
    console.print(
        Text("trained tokens", TRAINED)
        + f": {trained:,} of {tokens:,} ({trained / tokens:.1%}) in {len(samples)} samples"
    )


def trained_tokens(samples: Sequence[Sample]) -> tuple[int, int]:
    """(tokens of answers, all tokens)."""
    trained = sum(end - start for sample in samples for start, end in sample.answers)
    return trained, sum(len(sample.ids) for sample in samples)


def _coloured(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Runs are decoded whole: a token alone may be half a character."""
    text, place, ids = Text(), 0, list(sample.ids)
    for start, end in [*sample.answers, [len(ids)] * 2]:
        text.append(str(tokenizer.decode(ids[place:start])), "dim")
        text.append(str(tokenizer.decode(ids[start:end])), TRAINED)
        place = end
    return text
