"""`graft STAGE key=value ...`: the recipes as one command, from a clone or an installed wheel."""

from functools import partial

import click

STAGES = {
    "pretrain_target": "Pretrain the quickstart's small target.",
    "regenerate": "Have the target answer the training prompts, or take the data's own answers.",
    "distill": "Distil the draft head from the target.",
    "build_corpus": "Build the tables that tokens are retrieved from.",
    "calibrate": "Learn the policy from traces and this device's latencies.",
    "export": "Put head, corpus and policy into one bundle, and push it to the Hub if asked.",
    "evaluate": "Measure every method on held-out prompts, and check that output is unchanged.",
}
"""In the order in which they are run."""
WHOLE_ROAD = "quickstart"

HELP = """Train, calibrate, export and measure Graft speculative decoding.

Each command takes settings behind it: graft distill experiment=qwen3_8b head.epochs=4. `graft distill --help` shows
what there is to set, and `--cfg job` what is set. Training on several GPUs is started by accelerate, see the README.

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
