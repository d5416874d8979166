"""A source of tokens of your own: look things up in a text that all requests share, such as your product's manual.

    python examples/own_source.py runs/mine manual.txt

`runs/mine` has data, head and corpus, and no policy yet. Calibration traces the source, prices it, and gives it the
nodes that it earns; if it does not pay, it is left out. A process that serves the bundle lists the source, too.

Hardware:    as calibration.
Minutes:     policy.minutes, 10 unless said otherwise.
Acceptance:  not measured; it depends on how often answers quote the text.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from graft_inference.retrieval.prompt_lookup import PromptLookup
from graft_inference.retrieval.sources import SOURCES
from graft_train.calibrate import calibrate
from graft_train.config import Config
from graft_train.config.target import TargetConfig


class Manual(PromptLookup):
    """Prompt lookup whose text begins with the manual's."""

    name = "manual"
    manual_S = torch.empty(0, dtype=torch.long)

    @classmethod
    def open(cls, opening):
        source = cls(opening.capacity + len(cls.manual_S), opening.device)
        source.extend(cls.manual_S.to(opening.device))
        source.extend(opening.tokens_S)
        return source


def main(config: Config, manual: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(config.target.name_or_path)
    Manual.manual_S = torch.tensor(tokenizer(manual).input_ids)
    SOURCES[Manual.name] = Manual  # the one line: in retrieval/sources.py, if it is to stay
    return calibrate(config)


if __name__ == "__main__":
    run_dir, file = sys.argv[1:]
    main(Config(run_dir=run_dir, target=TargetConfig(f"{run_dir}/target")), Path(file).read_text(encoding="utf-8"))
