"""Draws `docs/chat.svg`: two turns of `graft chat`, as a terminal shows them. `python docs/chat.py runs/quickstart`"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from graft_inference.cli import load_engine
from graft_train.chat import ChatOptions, Conversation, coloured

TURNS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Now write the same function without recursion.",
)
WIDTH, TOKENS = 96, 160


def main(run: str) -> None:
    engine = load_engine(f"{run}/bundle", f"{run}/target", keep_prefix=True)
    # No terminal: each line is recorded once, as it stands in the end.
    console = Console(file=io.StringIO(), record=True, width=WIDTH)
    options = ChatOptions(
        bundle=f"{run}/bundle", target=None, system=None, template_variable=(), temperature=0.0, seed=None,
        max_new_tokens=TOKENS, method="graft", device="cpu", dtype="auto", plain=False,
    )  # fmt: skip
    conversation, screen = Conversation(engine, options, {}), coloured(console)
    for turn in TURNS:
        console.print(Text(f"> {turn}", "bold"))
        conversation.answer(turn, screen)
        console.print()
    drawn = console.export_svg(title="graft chat runs/quickstart/bundle")
    # No font is fetched from elsewhere.
    Path(__file__).with_name("chat.svg").write_text(re.sub(r"@font-face\s*{[^}]*}", "", drawn), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
