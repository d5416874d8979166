"""Answer a question with the engine, and say where its tokens came from.

    python examples/decode.py runs/quickstart/bundle runs/quickstart/target "What does fileinput.lineno do?"

Hardware:    whatever holds the target; a CPU will do.
Minutes:     under one: loading the model takes longer than the answer.
Acceptance:  2.37 tokens per pass for the question that ends `make quickstart`, at 70.8 tokens/s (two cores of an AMD
             EPYC).
"""

import sys

from graft_inference import Generation, GraftEngine


def main(bundle: str, target: str, question: str, max_new_tokens: int = 128) -> Generation:
    engine = GraftEngine.from_pretrained(bundle, target)
    messages = [{"role": "user", "content": question}]
    prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = engine.generate(prompt, max_new_tokens=max_new_tokens)
    stats = out.stats
    print(engine.tokenizer.decode(out.sequences[0, -stats.emitted :], skip_special_tokens=True))
    print(f"\n{stats.tokens_per_second:.1f} tokens/s, {stats.acceptance_length:.2f} tokens per pass of the target")
    print("accepted:", ", ".join(f"{count} {source}" for source, count in stats.accepted.items()))
    return out


if __name__ == "__main__":
    main(*sys.argv[1:])
