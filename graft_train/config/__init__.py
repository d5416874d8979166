"""The one configuration every recipe composes, so that a misspelt key fails at once in all of them.

Each section is a dataclass of its own. They import nothing of the package, so that whatever works by them may.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from graft_inference.errors import GraftError
from graft_train.config.corpus import CorpusConfig
from graft_train.config.data import DataConfig
from graft_train.config.evaluation import EvaluateConfig
from graft_train.config.export import ExportConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.policy import CalibrateConfig
from graft_train.config.regenerate import RegenerateConfig
from graft_train.config.target import TargetConfig


@dataclass(slots=True, kw_only=True)
class Config:
    """Attributes:
    run_dir: where all stages read and write.
    seed: of everything that is drawn: prompts' order, answers, the untrained head, batches, samples.
    threads: CPU threads of torch; None leaves its own choice.
    """

    run_dir: str = "runs/mine"
    seed: int = 0
    threads: int | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    head: HeadTrainConfig = field(default_factory=HeadTrainConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    policy: CalibrateConfig = field(default_factory=CalibrateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise GraftError(f"threads={self.threads} must be at least 1, or null for torch's own choice")


def setting_names(section: Any = Config, prefix: str = "") -> list[str]:
    """Every setting of a section and those within it, as the command line has it."""
    names = []
    for one in fields(section):
        if is_dataclass(one.default_factory):
            names += setting_names(one.default_factory, f"{prefix}{one.name}.")
        else:
            names.append(prefix + one.name)
    return names
