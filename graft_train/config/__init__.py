"""The one configuration every recipe composes, so that a misspelt key fails at once in all of them.

Each section is a dataclass of its own. They import nothing of the package, so that whatever works by them may.
"""

from dataclasses import dataclass, field, fields, is_dataclass

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


def setting_names() -> list[str]:
    """Every setting, as the command line has it."""
    names = []
    for group in fields(Config):
        if is_dataclass(group.default_factory):
            names += [f"{group.name}.{one.name}" for one in fields(group.default_factory)]
        else:
            names.append(group.name)
    return names
