"""The beginning of the quickstart: an answer that prompt lookup alone speeds up, before anything is trained."""

from typing import Any

from rich.console import Console

from graft_inference.bundle import check_tokenizer
from graft_inference.cli import encode
from graft_train.config import Config
from graft_train.demonstrate import show_answer
from graft_train.evaluate.timing import engine_of

PROMPT = """Explain this Python code line by line:

```python
def read_lines(path):
    with open(path) as file:
        return file.read().splitlines()


def count_lines(path):
    return len(read_lines(path))
```"""
"""The answer repeats names and lines of it."""


def first_answer(config: Config) -> None:
    """Prints a prompt and the target's answer, without the fallback, which on a busy machine would not speculate.

    Raises:
        GraftError: what `GraftEngine.from_pretrained` raises, or a target without a tokenizer.
    """
    engine, console = engine_of(config, None, config.target.dtype, fallback=False), Console()
    tokenizer: Any = engine.tokenizer
    check_tokenizer(tokenizer, config.target.name_or_path)
    prompt_S = encode(tokenizer, PROMPT, chat=bool(tokenizer.chat_template))
    show_answer(engine, prompt_S, console)
