"""The evaluation of servers as people read it: a table in the terminal, Markdown."""

from typing import Any

from graft_train.tables import asked_of, markdown_table, show_table, unsteady

COLUMNS = ("server", "n", "tokens/s", "speed-up", "95 %", "each", "speed-up", "95 %", "first", "next", "acceptance")
SHOWN = (0, 1, 2, 3, 5, 8, 9, 10)
"""Columns that fit a terminal."""


def show(evaluation: dict[str, Any]) -> None:
    """The columns that fit a terminal, medians alone."""
    rows = [tuple(row[index].partition(" (")[0] for index in SHOWN) for row in rows_of(evaluation)]
    title = f"{asked_of(evaluation['settings'])}; n requests at a time, first and next token in ms"
    show_table(title, tuple(COLUMNS[index] for index in SHOWN), rows)
    if doubt := unsteady(evaluation, "passes"):
        print(f"note: {doubt}")


def rows_of(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each server and number of requests at a time, in COLUMNS."""
    names = [server["url"].split("://")[1].removesuffix("/v1") for server in evaluation["servers"]]
    return [
        (
            name,
            str(level["concurrency"]),
            f"{found['tokens_per_second_in_all']:.1f}",
            *_ratio(found, "speedup_in_all"),
            f"{found['tokens_per_second']:.1f}",
            *_ratio(found, "speedup"),
            _spread(found["first_token_ms"]),
            _spread(found["between_tokens_ms"]),
            "-" if found["acceptance_length"] is None else f"{found['acceptance_length']:.2f}",
        )
        for level in evaluation["levels"]
        for name, found in zip(names, level["servers"], strict=True)
    ]


def to_markdown(evaluation: dict[str, Any]) -> str:
    """The table, and how it was measured."""
    settings, servers = evaluation["settings"], evaluation["servers"]
    low, high = settings["prompt_tokens"]
    facts = [
        *(f"- {server['url']}: {server['model']}" for server in servers),
        f"- temperature {settings['temperature']}; {settings['prompts']} {asked_of(settings)}, of {low}-{high} tokens, "
        f"at most {settings['max_new_tokens']} new tokens each; sent as token ids, answers streamed",
        f"- n: requests at a time. {settings['repeats']} passes over all prompts for each row, servers in turns; times "
        "are those that the client saw, so that its own work and the network count",
        "- tokens/s: all tokens of the answers by the time of the passes. each: tokens/s of one request behind its "
        "first piece, in the median pass of every prompt",
        "- first: ms to the first token. next: ms from one token to the next, the mean of a request, as a round's "
        "tokens come together. Median and 95th percentile of all requests",
        "- acceptance: tokens per target pass, by the server's /metrics (graft's or vLLM's names), where it has them; "
        "what others asked of it meanwhile is counted, too",
        "- every prompt is sent in each pass: a server that keeps prefixes reads it once",
    ]
    if len(servers) > 1:
        facts.append(
            f"- speed-up: over {servers[-1]['url']}; intervals by bootstrap, of each over prompts, in all over passes"
        )
    for level in evaluation["levels"]:
        for server, found in zip(servers, level["servers"], strict=True):
            if found.get("same_answers") is not None:
                facts.append(
                    f"- {server['url']}, {level['concurrency']} at a time: the tokens of {servers[-1]['url']} on "
                    f"{found['same_answers']:.0%} of the prompts"
                )
    doubt = unsteady(evaluation, "passes")
    beside = [f"**{doubt}**", ""] if doubt else []
    table = markdown_table(COLUMNS, rows_of(evaluation))
    return "\n".join(["# Evaluation of servers", "", *table, "", *beside, "## How", "", *facts, ""])


def _ratio(found: dict[str, Any], name: str) -> tuple[str, str]:
    if name not in found:
        return "-", "-"
    bounds = found[f"{name}_interval"]
    return f"{found[name]:.2f}x", "-" if bounds is None else f"{bounds[0]:.2f}-{bounds[1]:.2f}"


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.1f} ({found['p95']:.1f})"
