"""`graft-generate BUNDLE --target T PROMPT`: text as it is accepted, then what the speculation did."""

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from .bundle import load_bundle, load_target_model
from .engine import GenerationStats, GraftEngine
from .errors import GraftError
from .policy import METHODS


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 2 on bad input, with one line on stderr that says what to do."""
    options = _parser().parse_args(arguments)
    try:
        stats = run(options)
    except GraftError as error:
        print(f"graft-generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(summary(stats), file=sys.stderr)
    return 0


def run(options: argparse.Namespace) -> GenerationStats:
    """Loads, generates and prints the continuation to stdout while it comes."""
    if not options.chat and (options.system is not None or options.template_variable):
        raise GraftError("--system and --template-variable are told to the chat template: add --chat")
    model, tokenizer = load_target_model(options.target, options.device, options.dtype)
    if tokenizer is None:
        raise GraftError(f"{options.target} has no tokenizer: put its files beside the model")
    bundle = load_bundle(options.bundle, model.config.get_text_config(), tokenizer)
    engine = GraftEngine.from_bundle(bundle, model, tokenizer=tokenizer)
    input_ids = encode(tokenizer, _read(options.prompt), options.chat, options.system, _variables(options))
    stats = GenerationStats()
    tokens = engine.stream(
        input_ids,
        options.max_new_tokens,
        options.temperature,
        options.method,
        options.seed,
        stats,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        stop_strings=options.stop,
    )
    # It holds back what may still change: unfinished words, and characters of several tokens.
    printer = TextStreamer(tokenizer, skip_special_tokens=True)
    for token in tokens:
        printer.put(torch.tensor([token]))
    printer.end()
    return stats


def encode(
    tokenizer: Any, prompt: str, chat: bool, system: str | None = None, variables: dict[str, Any] | None = None
) -> Tensor:
    """Prompt ids [S].

    Args:
        chat: wrap it in the tokenizer's chat template.
        system: what stands before it there.
        variables: what the template is told beside, such as enable_thinking.

    Raises:
        GraftError: no template, one that does not mention a variable and would ignore it, or a text that it or the
            tokenizer refuses.
    """
    try:
        if not chat:
            return tokenizer(prompt, return_tensors="pt").input_ids[0].long()
        text = _wrapped(tokenizer, prompt, system, variables or {})
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0].long()
    except GraftError:
        raise
    except Exception as error:  # templates and tokenizers raise many kinds
        raise GraftError(f"the target's tokenizer refuses the prompt: {error}") from error


def _wrapped(tokenizer: Any, prompt: str, system: str | None, variables: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        raise GraftError("the target's tokenizer has no chat template: leave out --chat")
    for name in variables:
        if name not in str(tokenizer.chat_template):
            raise GraftError(f"--template-variable: the target's chat template does not know {name}; leave it out")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)


def _variables(options: argparse.Namespace) -> dict[str, Any]:
    """By name, their values read as JSON."""
    variables = {}
    for given in options.template_variable:
        name, _, value = given.partition("=")
        try:
            variables[name] = json.loads(value)
        except ValueError as error:
            raise GraftError(
                f"--template-variable {given}: write NAME=VALUE, the value in JSON: false, 3 or '\"high\"' ({error})"
            ) from error
    return variables


def _read(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise GraftError(f"stdin is no {error.encoding} text: {error}") from error


def summary(stats: GenerationStats) -> str:
    """Two lines for people."""
    stages = ", ".join(f"{name} {rounds}" for name, rounds in sorted(stats.stages.items()))
    accepted = ", ".join(f"{source} {tokens}" for source, tokens in stats.accepted.items())
    governed = ", ".join(f"{name} {rounds}" for name, rounds in sorted(stats.governed.items()))
    governed = f"; by plan: {governed}" if governed else ""
    return (
        f"{stats.emitted} tokens, {stats.tokens_per_second:.1f} tokens/s, tau {stats.tau:.2f}, "
        f"prefill {stats.seconds['prefill'] * 1e3:.0f} ms\n"
        f"{stats.rounds} rounds stopped at: {stages or 'none'}; accepted: {accepted}{governed}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graft-generate", description="Lossless hybrid tree speculation.")
    parser.add_argument("bundle", help="directory or Hub id of an exported bundle")
    parser.add_argument("prompt", help="text to continue; - reads it from stdin")
    parser.add_argument("--target", required=True, help="directory or Hub id of the model it was made for")
    parser.add_argument("--method", choices=METHODS, default="graft")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, help="sample from the likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this probability only")
    parser.add_argument("--repetition-penalty", type=float, help="over 1 discourages what is there already")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end with this text; may be given repeatedly")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="default: bfloat16 on cuda, float32 on a CPU")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system prompt")
    parser.add_argument(
        "--template-variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --chat: what the template is told, in JSON, such as enable_thinking=false; may be given repeatedly",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
