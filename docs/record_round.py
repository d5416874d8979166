"""Writes docs/round.json: what one real round proposed, verified and accepted, for docs/round.py to draw.

python docs/record_round.py --run runs/quickstart --prompt 13 --place 55
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from graft_inference import GraftEngine
from graft_inference.retrieval.sources import number_of
from graft_inference.speculator import Chosen, Speculation, Speculator
from graft_inference.tree import DraftTree, Source
from graft_train.data.samples import read_samples

Round = tuple[Chosen, list[DraftTree], DraftTree]
"""What the head and the sources proposed, and the tree that was verified."""
BEFORE = 24
"""Tokens of the text so far that are written, and of what is looked up."""


class Recorder(Speculator):
    """Keeps what every round of one request was offered, and the tree that was made of it."""

    def __init__(self, head: Any) -> None:
        super().__init__(head)
        self.rounds: list[Round] = []

    def build(self, requests: list[Speculation], drafts: list[Chosen]) -> list[Chosen]:
        chosen = super().build(requests, drafts)
        self.rounds.append((drafts[0], list(requests[0].retrieved or ()), chosen[0][1]))
        return chosen


def nodes_of(tree: DraftTree, tokenizer: Any) -> list[dict[str, Any]]:
    """A tree's nodes without those that only pad it."""
    columns = (tree.tokens_N, tree.parents_N, tree.depths_N, tree.logp_N.exp(), tree.sources_N)
    return [
        {"token": tokenizer.decode(token), "parent": parent, "depth": depth, "p": round(share, 4), "source": source}
        for token, parent, depth, share, source in zip(*(column.tolist() for column in columns), strict=True)
        if source != Source.EMPTY
    ]


def accepted(tree: DraftTree, emitted: list[int]) -> list[int]:
    """The root and the nodes that the emitted tokens follow."""
    path = [0]
    for token in emitted:
        found = [
            index
            for index in range(1, len(tree))
            if tree.parents_N[index] == path[-1] and tree.tokens_N[index] == token and tree.sources_N[index] > 0
        ]
        if not found:
            break
        path.append(found[0])
    return path


def round_at(place: int, rounds: list[Round], new: list[int]) -> tuple[list[int], Chosen, list[DraftTree], DraftTree]:
    """The round that begins there, and the nodes that were accepted."""
    begun = 1
    for drafts, retrieved, tree in rounds:
        path = accepted(tree, new[begun:])
        if begun == place:
            return path, drafts, retrieved, tree
        begun += len(path)
    raise SystemExit(f"no round begins at {place}")


def record(run: Path, prompt: int, place: int) -> dict[str, Any]:
    """The round whose root is the new token before this place, of a held-out prompt."""
    samples = read_samples(run / "data" / "samples.jsonl", "evaluation")
    engine = GraftEngine.from_pretrained(run / "bundle", run / "target", fallback=False)
    tokenizer: Any = engine.tokenizer
    recorder = engine.speculator = Recorder(engine.speculator.head)
    ids = torch.tensor(samples[prompt].prompt_ids)
    new = engine.generate(ids, max_new_tokens=place + BEFORE).sequences[0, len(ids) :].tolist()
    path, (checkpoint, drafted), retrieved, tree = round_at(place, recorder.rounds, new)
    words = {Source.ROOT: "root", Source.DRAFTED: "head", number_of("lookup"): "lookup", number_of("matrix"): "matrix"}
    nodes = nodes_of(tree, tokenizer)
    for index, node in enumerate(nodes):
        node |= {"source": words[node["source"]], "accepted": index in path}
    deepest = max(drafted.logp_N[drafted.depths_N == checkpoint.steps].exp().tolist())
    return {
        "target": "SmolLM2-135M-Instruct",
        "text": tokenizer.decode(new[max(place - 1 - BEFORE, 0) : place - 1]),
        "root": tokenizer.decode(new[place - 1]),
        "confidence": deepest,
        "threshold": checkpoint.threshold,
        "drafted": nodes_of(drafted, tokenizer),
        "lookup": [node for looked in retrieved for node in nodes_of(looked, tokenizer)[1:]],
        "tree": nodes,
        "bonus": tokenizer.decode(new[place + len(path) - 1]),
    }


def main() -> None:
    """What a person types."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--prompt", type=int, default=13, help="of the held-out ones")
    parser.add_argument("--place", type=int, default=55, help="of the round's first token among the new ones")
    options = parser.parse_args()
    found = record(options.run, options.prompt, options.place)
    Path(__file__).with_name("round.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
