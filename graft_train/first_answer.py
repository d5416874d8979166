"""The beginning of the quickstart: an answer that prompt lookup alone speeds up, before anything is trained."""

from rich.console import Console

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
"""Its answer repeats names and lines of it."""


def first_answer(config: Config) -> None:
    """Prints a prompt and the target's answer, without the fallback, which on a busy machine would not speculate."""
    engine, console = engine_of(config, None, config.target.dtype, fallback=False), Console()
    prompt_S = encode(engine.tokenizer, PROMPT, chat=bool(getattr(engine.tokenizer, "chat_template", None)))
    show_answer(engine, prompt_S, console)
