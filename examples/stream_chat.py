"""A conversation whose answers are streamed; each turn reads only what is new.

    python examples/stream_chat.py runs/quickstart/bundle runs/quickstart/target

Hardware:    whatever holds the target; a CPU will do.
Minutes:     as long as you talk.
Acceptance:  not measured for conversations. It is printed after each answer.
"""

import sys
from collections.abc import Iterable

from graft_inference import GenerationStats, GraftEngine


def main(bundle: str, target: str, lines: Iterable[str], max_new_tokens: int = 256) -> list[dict[str, str]]:
    engine = GraftEngine.from_pretrained(bundle, target, keep_prefix=True)
    messages: list[dict[str, str]] = []
    for line in lines:
        messages.append({"role": "user", "content": line.strip()})
        prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        stats, tokens, written = GenerationStats(), [], ""
        for token in engine.stream(prompt, max_new_tokens=max_new_tokens, stats=stats):
            tokens.append(token)
            answer = engine.tokenizer.decode(tokens, skip_special_tokens=True)
            print(answer[len(written) :], end="", flush=True)
            written = answer
        print(f"\n({stats.acceptance_length:.2f} tokens per pass, {stats.reused} of the prompt's tokens kept)")
        messages.append({"role": "assistant", "content": written})
    return messages


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.stdin)
