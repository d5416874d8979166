"""`graft-generate BUNDLE --target T PROMPT`: text as it is accepted, then what the speculation did."""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from .bundle import check_tokenizer, load_bundle, load_target_model, served_dtype
from .chat_template import check_template, encode_chat, naming_refusals, opening, template_variables
from .engine import GenerationStats, GraftEngine
from .errors import GraftError
from .policy.policy import METHODS, lookup_policy
from .prompts import check_text, text_ids

BUNDLE_HELP = "directory or Hub id of an exported bundle or a head; without one, prompt lookup alone speculates"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 2 on bad input, with one line on stderr that says what to do."""
    options = _parser().parse_intermixed_args(arguments)  # a bundle may be left out, wherever the options stand
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
        raise GraftError("--system and --template-variable are for the chat template: add --chat")
    prompt, variables = _read(options.prompt), template_variables(options.template_variable)
    _check_texts(options)
    check_method(options.bundle, options.method)
    engine = load_engine(options.bundle, options.target, options.device, options.dtype)
    tokenizer: Any = engine.tokenizer
    input_ids = encode(tokenizer, prompt, options.chat, options.system, variables)
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


def check_method(bundle: str | None, method: str) -> None:
    """Raises GraftError for a method that drafts where there is no bundle, and so no head; it loads nothing."""
    if bundle is None and lookup_policy().plan(method).drafts:
        raise GraftError(
            f"--method {method} drafts, and without a bundle there is no head: give one, or another method"
        )


def load_engine(
    bundle: str | None, target: str, device: str = "auto", dtype: str = "auto", **settings: Any
) -> GraftEngine:
    """An engine that has the target's tokenizer; `settings` are those of `GraftEngine`.

    Args:
        bundle: None where there is none: prompt lookup alone speculates then.

    Raises:
        GraftError: what `GraftEngine.from_pretrained` raises, or a target without tokenizer.
    """
    model, tokenizer = load_target_model(target, device, served_dtype(bundle, device, dtype))
    check_tokenizer(tokenizer, target)
    loaded = load_bundle(bundle, model.config.get_text_config(), tokenizer)
    return GraftEngine.from_bundle(loaded, model, tokenizer=tokenizer, **settings)


def encode(
    tokenizer: Any, prompt: str, chat: bool, system: str | None = None, variables: dict[str, Any] | None = None
) -> Tensor:
    """Prompt ids [S] int64.

    Args:
        chat: wrap it in the tokenizer's chat template.
        system: what stands before it there.
        variables: of the template, such as enable_thinking.

    Raises:
        GraftError: what `check_template` raises, or a text that the template or the tokenizer refuses.
    """
    if not chat:
        with naming_refusals():
            return torch.tensor(text_ids(tokenizer, prompt), dtype=torch.long)
    check_template(tokenizer, variables or {})
    return encode_chat(tokenizer, [*opening(system), {"role": "user", "content": prompt}], variables or {})


def _read(prompt: str) -> str:
    is_piped = prompt == "-"
    try:
        text = sys.stdin.read() if is_piped else prompt
    except UnicodeDecodeError as error:
        raise GraftError(f"stdin is no {error.encoding} text: {error}") from error
    check_text(text, "stdin" if is_piped else "the prompt")
    return text


def _check_texts(options: argparse.Namespace) -> None:
    given = {"--system": [options.system or ""], "--stop": options.stop or []}
    for name, texts in {**given, "--template-variable": options.template_variable}.items():
        for text in texts:
            check_text(text, name)


def summary(stats: GenerationStats) -> str:
    """Two lines for people."""
    checkpoints = ", ".join(f"{name} {rounds}" for name, rounds in sorted(stats.checkpoints.items()))
    accepted = ", ".join(f"{source} {tokens}" for source, tokens in stats.accepted.items())
    fallback = ", ".join(f"{name} {rounds}" for name, rounds in sorted(stats.fallback.items()))
    fallback = f"; by plan: {fallback}" if fallback else ""
    return (
        f"{stats.emitted} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {stats.acceptance_length:.2f}, prefill {stats.seconds['prefill'] * 1e3:.0f} ms\n"
        f"{stats.rounds} rounds stopped at: {checkpoints or 'none'}; accepted: {accepted}{fallback}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graft-generate", description="Lossless hybrid tree speculation.")
    parser.add_argument("bundle", nargs="?", help=BUNDLE_HELP)
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
    parser.add_argument(
        "--dtype", default="auto", help="default: bfloat16 on cuda; on a CPU the policy's own, else float32"
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system prompt")
    parser.add_argument(
        "--template-variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --chat: a variable of the template, in JSON, such as enable_thinking=false; may be given repeatedly",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
