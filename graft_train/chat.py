"""`graft chat [BUNDLE]`: a conversation with the target, each token coloured by where it came from."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from threading import Event
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from graft_inference import GenerationStats, GraftEngine, GraftError, Request
from graft_inference.bundle import recorded_target
from graft_inference.chat_template import check_template, encode_chat, opening, template_variables
from graft_inference.cli import check_method, load_engine
from graft_inference.prompts import check_text, is_plain
from graft_inference.retrieval.sources import SOURCES
from graft_inference.spelling import Spelling

with suppress(ImportError):
    import readline  # noqa: F401  # edits and remembers what is typed, where there is one

NAMES = {"drafted": "head", **{name: name for name in SOURCES}, "bonus": "target", "prefill": "target"}
"""What people call the sources of tokens."""
COLORS = ("green", "cyan", "magenta", "yellow", "blue", "red")
STYLES = {**dict(zip(("head", *SOURCES), cycle(COLORS))), "target": "default"}

Show = Callable[[str, str], None]
"""Is told the next piece of an answer, and the source of its last token."""
Screen = Callable[[GenerationStats], AbstractContextManager[Show]]
"""Shows one answer; the statistics change meanwhile."""


@dataclass(frozen=True)
class ChatOptions:
    """The options of the command, see its help."""

    bundle: str | None
    target: str | None
    system: str | None
    template_variable: tuple[str, ...]
    temperature: float
    seed: int | None
    max_new_tokens: int
    method: str
    device: str
    dtype: str
    plain: bool


def chat(options: ChatOptions) -> None:
    """Runs the command; a mistake ends it with one line and status 2."""
    try:
        _talk(options)
    except GraftError as error:
        _say_error(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _talk(options: ChatOptions) -> None:
    conversation = _conversation(options)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = plain if options.plain or not is_terminal else coloured(Console())
    for text in _turns(is_terminal):
        match text.strip():
            case "":
                pass
            case "/exit":
                return
            case "/new":
                conversation.begin()
                _say("a new conversation")
            case _:
                _answer(conversation, text, screen, is_terminal)


def _conversation(options: ChatOptions) -> "Conversation":
    """What can be told to be wrong is told before the target is loaded."""
    for text in (options.system or "", *options.template_variable):
        check_text(text, "--system or --template-variable")
    variables = template_variables(options.template_variable)
    Request.of(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    check_method(options.bundle, options.method)
    target = options.target or recorded_target(options.bundle)
    try:
        engine = load_engine(options.bundle, target, options.device, options.dtype, keep_prefix=True)
    except GraftError as error:
        remedy = "" if options.target else "; the bundle names this target, --target names another"
        raise GraftError(f"{error}{remedy}") from error
    check_template(engine.tokenizer, variables)
    return Conversation(engine, options, variables)


def _answer(conversation: "Conversation", text: str, screen: Screen, is_terminal: bool) -> None:
    """A turn that goes wrong ends a pipe, and on a terminal that turn alone."""
    try:
        is_stopped = conversation.answer(text, screen)
    except GraftError as error:
        if not is_terminal:
            raise
        _say_error(error)
    else:
        if is_stopped and not is_terminal:
            raise KeyboardInterrupt


@dataclass
class Conversation:
    """What was said, and who answers.

    Attributes:
        variables: what the chat template is told beside the messages.
        warned: it was said that answers are put back without their special tokens.
    """

    engine: GraftEngine
    options: ChatOptions
    variables: dict[str, Any]
    messages: list[dict[str, str]] = field(init=False)
    warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Anew, with the system prompt alone."""
        self.messages = opening(self.options.system)

    def answer(self, text: str, screen: Screen) -> bool:
        """One turn, which counts once something was answered; whether it was interrupted.

        Raises:
            GraftError: a text that the template refuses, or no room for an answer.
        """
        check_text(text, "this line")
        engine, options = self.engine, self.options
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt_S = encode_chat(engine.tokenizer, messages, self.variables)
        room = engine.target.max_positions - len(prompt_S)
        if room < 1:
            raise GraftError(
                f"with this turn the conversation has {len(prompt_S)} tokens, and the target's limit is "
                f"{engine.target.max_positions}: /new begins a new one"
            )
        count, stats = min(room, options.max_new_tokens), GenerationStats()
        tokens = engine.stream(prompt_S, count, options.temperature, options.method, options.seed, stats)
        spelling, is_stopped = show_tokens(tokens, engine.tokenizer, stats, screen)
        if is_stopped:
            _say("stopped")
        elif stats.emitted == count and spelling.ids[-1] not in engine.eos_token_ids:
            _say("the target's limit is reached: /new" if count == room else f"cut: --max-new-tokens {count}")
        if spelling.text:
            self._warn_if_lossy(spelling)
            self.messages = [*messages, {"role": "assistant", "content": spelling.text}]
        return is_stopped

    def _warn_if_lossy(self, spelling: Spelling) -> None:
        if not self.warned and not is_plain(self.engine.tokenizer, spelling.ids):
            self.warned = True
            _say("this answer has special tokens within, as of channels: later turns are told its text without them")


def show_tokens(
    tokens: Generator[int, None, None], tokenizer: Any, stats: GenerationStats, screen: Screen
) -> tuple[Spelling, bool]:
    """Shows an answer as its tokens come; Ctrl-C stops it.

    Args:
        stats: of the engine's stream that gives the tokens.

    Returns:
        What was shown, and whether it was stopped.
    """
    spelling = Spelling(tokenizer)
    with screen(stats) as show:
        with closing(tokens), _interruptible() as interrupted:
            for token in tokens:
                show(spelling.put(token), stats.sources[-1])
                if interrupted.is_set():
                    break
        show(spelling.end(), stats.sources[-1])
    return spelling, interrupted.is_set()


@contextmanager
def plain(stats: GenerationStats) -> Iterator[Show]:
    """Text to stdout as it comes, the statistics to stderr."""
    yield lambda piece, source: print(piece, end="", flush=True)
    print(flush=True)
    _say(figures(stats).plain)


def coloured(console: Console) -> Screen:
    """Whole lines scroll by; the one that grows, and the statistics beneath it, are drawn anew as tokens come."""
    legend = [part for name, style in STYLES.items() for part in ((name, style), " ")]
    console.print(Text.assemble("tokens by source: ", *legend))

    @contextmanager
    def screen(stats: GenerationStats) -> Iterator[Show]:
        line = Text()
        with Live(console=console, refresh_per_second=12) as live:

            def show(piece: str, source: str) -> None:
                nonlocal line
                whole, line = _lines(line + Text(piece.expandtabs(4), STYLES[NAMES[source]]), console)
                for one in whole:
                    console.print(one)
                live.update(Group(*[line] if line else [], figures(stats)))

            yield show

    return screen


def _lines(text: Text, console: Console) -> tuple[list[Text], Text]:
    """Lines of the console's width that can no longer change, and the rest of the text."""
    *whole, last = text.wrap(console, console.width) or [text]
    # Wrapping strips the space at its end, which the rest still needs.
    return whole, text[text.plain.rindex(last.plain) :] if whole else text


def figures(stats: GenerationStats) -> Text:
    """What the speculation did, in one line."""
    counts = {NAMES[source]: count for source, count in stats.accepted.items()}
    counts["target"] += stats.sources.count("prefill")
    sources = [part for name, style in STYLES.items() for part in ((f"{name} {counts[name]}", style), " ")]
    speed = f"{stats.tokens_per_second:.1f} tokens/s, acceptance length {stats.acceptance_length:.2f} | "
    kept = f"| {stats.reused} kept"
    return Text.assemble((speed, "dim"), *sources, (kept, "dim"), no_wrap=True, overflow="ellipsis")


def _turns(is_terminal: bool) -> Iterator[str]:
    try:
        yield from _typed() if is_terminal else (line.rstrip("\n") for line in sys.stdin)
    except UnicodeDecodeError as error:
        raise GraftError(f"stdin is no {error.encoding} text: {error}") from error


def _typed() -> Iterator[str]:
    """Until Ctrl-D; Ctrl-C gives up a line."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Ctrl-C sets the event, between two tokens; a second one interrupts as ever."""
    interrupted = Event()

    def note(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _say_error(error: GraftError) -> None:
    _say(f"error: {' '.join(str(error).split())}")
