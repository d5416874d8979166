"""Take a head that others have published, and learn what belongs to it: corpus and policy for this device.

    python examples/adopt_a_head.py someone/qwen3-8b-eagle3 Qwen/Qwen3-8B chats.jsonl

Hardware:    a device that holds the target. Nothing is trained.
Minutes:     not measured. Calibration takes policy.minutes, 10 unless said otherwise.
Acceptance:  not measured on a published head.
"""

import sys

from graft_train.adopt import adopt
from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.regenerate import RegenerateConfig
from graft_train.config.target import TargetConfig
from graft_train.export import export
from graft_train.regenerate import regenerate


def main(config: Config) -> None:
    """`config.head.init_from` names the head: a directory or a Hub id."""
    adopt(config)  # in place of a training; refused if it is another target's
    regenerate(config)  # answers for the corpus, prompts for the policy
    build_corpus(config)
    calibrate(config)
    export(config)


if __name__ == "__main__":
    head, target, data = sys.argv[1:]
    main(
        Config(
            run_dir="runs/adopted",
            target=TargetConfig(target),
            head=HeadTrainConfig(init_from=head),
            data=DataConfig(path=data),
            regenerate=RegenerateConfig(samples=5000),
        )
    )
