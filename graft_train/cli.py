"""`graft STAGE key=value ...`: the recipes as one command, from a clone or a wheel; and what is done with a bundle."""

from functools import partial
from typing import Any

import click

from graft_train.road import STAGES, WHOLE_ROAD

HELP = """Train, calibrate, export, measure, try and serve Graft speculative decoding.

Each stage takes settings after its name: graft distill experiment=qwen3_8b head.epochs=4. `graft distill --help` shows
what there is to set, and `--cfg job` what is set. Training on several GPUs is started by accelerate: see
docs/training.md.

For completion in bash: eval "$(_GRAFT_COMPLETE=bash_source graft)"; zsh and fish likewise.
"""


class _InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """As the stages are run, not by the alphabet."""
        return list(self.commands)


@click.group(cls=_InOrder, help=HELP, context_settings={"max_content_width": 120})
def main() -> None:
    """What a person types."""


def _run(name: str, overrides: tuple[str, ...]) -> None:
    from graft_train.recipe import run  # here, as it takes seconds to import and help needs none of it

    run(name, list(overrides))


def _completions(context: click.Context, argument: click.Argument, begun: str) -> list[str]:
    """Experiments by name, then every setting."""
    from graft_train.config import setting_names
    from graft_train.recipe import CONF

    experiments = [f"experiment={path.stem}" for path in sorted((CONF / "experiment").glob("*.yaml"))]
    return [name for name in [*experiments, *(f"{name}=" for name in setting_names())] if name.startswith(begun)]


def _command(name: str, line: str) -> click.Command:
    overrides = click.Argument(["overrides"], nargs=-1, type=click.UNPROCESSED, shell_complete=_completions)
    # Hydra knows options of its own, --help among them.
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    return click.Command(name, settings, partial(_run, name), [overrides], help=line, short_help=line)


for _name, _line in (STAGES | {WHOLE_ROAD: "All of them in a row, at the quickstart's size."}).items():
    main.add_command(_command(_name, _line))


@click.command("inspect", short_help="Show what is inside an exported bundle.")
@click.argument("bundle", type=click.Path())
def _inspect(bundle: str) -> None:
    """Show what is inside BUNDLE, a directory or a Hub id: target, head, policy, corpus, engines, evaluations."""
    from graft_inference import GraftError
    from graft_train.inspect import inspect

    try:
        inspect(bundle)
    except GraftError as error:
        raise click.ClickException(str(error)) from error


main.add_command(_inspect)

DOCTOR_HELP = """Say why the acceptance length of PLACE is low: a run directory, a bundle, or the Hub id of one.

Its answers are read again by target and head, and some prompts are decoded. Causes come first, each with what was
seen, what is usual, and what helps; docs/troubleshooting.md explains them. Nothing in PLACE is changed.
"""


@click.command("doctor", help=DOCTOR_HELP, short_help="Say why the acceptance length of a run or a bundle is low.")
@click.argument("place", type=click.Path())
@click.option("--target", type=click.Path(), help="Directory or Hub id of the model; else the one the bundle names.")
@click.option("--prompts", type=click.Path(), help="Prompts of your own to examine too: a file as data.path reads it.")
@click.option(
    "--template-variable",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable of the chat template as you serve it, in JSON. May be given repeatedly.",
)
@click.option("--device", default="auto", help="Default: cuda where there is one, else cpu.")
@click.option("--dtype", default="auto", help="Default: bfloat16 on cuda; on a CPU the policy's own, else float32.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def _doctor(**options: Any) -> None:
    from graft_inference import GraftError
    from graft_train.doctor import DoctorOptions, doctor

    try:
        doctor(DoctorOptions(**options))
    except GraftError as error:
        raise click.ClickException(str(error)) from error


main.add_command(_doctor)


@click.command("texts", short_help="Write a run's texts for SGLang's own retrieval.")
@click.argument("run_dir", type=click.Path())
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--target", type=click.Path(), required=True, help="Directory or Hub id of the run's target.")
def _texts(run_dir: str, target: str, file: str) -> None:
    """Write the training samples of RUN_DIR to FILE, a JSON string a line, as SGLang's NGRAM takes external corpora."""
    from pathlib import Path

    from graft_inference import GraftError
    from graft_train.texts import write_texts

    try:
        write_texts(Path(run_dir), target, Path(file))
    except GraftError as error:
        raise click.ClickException(str(error)) from error


main.add_command(_texts)


@click.command("report", short_help="Write all of a run as one HTML page, with a viewer of its rounds.")
@click.argument("run", type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), help="The page; else report.html in RUN.")
def _report(run: str, out: str | None) -> None:
    """Write what the run directory RUN holds as one HTML page that needs no network.

    It has speed, acceptance, where the milliseconds go, calibration, training, corpus and settings, and the rounds of
    some answers, token by token. A run may be unfinished: what is missing is named.
    """
    from graft_inference import GraftError
    from graft_train.report import report

    try:
        print(report(run, out))
    except GraftError as error:
        raise click.ClickException(str(error)) from error


main.add_command(_report)


METHODS = ("graft", "eagle3", "retrieve", "autoregressive")
"""Those of graft_inference, which takes seconds to import."""

CHAT_HELP = """Talk to the target of BUNDLE, a directory or a Hub id.

Without a bundle prompt lookup alone speculates, for the model that --target names.

The text is coloured by where each token came from: the draft head, look-up in the conversation's own text, the
successor matrix, or the target itself. Ctrl-C stops an answer, Ctrl-D or /exit leaves, /new begins a new conversation.

Where stdin or stdout is no terminal each line of stdin is a turn; plain text goes to stdout, statistics to stderr. For
a prompt of several lines use graft-generate --chat.
"""


@click.command("chat", help=CHAT_HELP, short_help="Talk to the target, speculating with an exported bundle.")
@click.argument("bundle", type=click.Path(), required=False)
@click.option("--target", type=click.Path(), help="Directory or Hub id of the model; else the one the bundle names.")
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option(
    "--template-variable",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable of the chat template, in JSON, such as enable_thinking=false. May be given repeatedly.",
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, help="Of the sampling, for each answer.")
@click.option("--max-new-tokens", default=1024, show_default=True, help="Most tokens of an answer.")
@click.option("--method", type=click.Choice(METHODS), default="graft", show_default=True)
@click.option("--device", default="auto", help="Default: cuda where there is one, else cpu.")
@click.option("--dtype", default="auto", help="Default: bfloat16 on cuda; on a CPU the policy's own, else float32.")
@click.option("--plain", is_flag=True, help="No colours and no live line on a terminal either.")
def _chat(**options: Any) -> None:
    from graft_train.chat import ChatOptions, chat

    chat(ChatOptions(**options))


main.add_command(_chat)


def _serve(arguments: tuple[str, ...]) -> None:
    from graft_inference.serve.cli import main as serve

    raise SystemExit(serve(arguments, prog="graft serve"))


main.add_command(
    click.Command(
        "serve",
        # The runtime's own command, which knows its options, --help among them.
        {"ignore_unknown_options": True, "help_option_names": []},
        _serve,
        [click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        short_help="Serve the target through OpenAI's API, speculating with an exported bundle.",
    )
)
