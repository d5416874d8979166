"""Every stage for two steps, in a row, then again."""

import json
from dataclasses import replace

import pytest

from graft_inference import METHODS, GraftEngine
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.eagle3.model import DraftHead
from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.config.block import BlockHeadTrainConfig
from graft_train.distill import distill
from graft_train.evaluate import evaluate
from graft_train.export import export
from graft_train.regenerate import regenerate
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources

STAGES = (regenerate, distill, build_corpus, calibrate, export, evaluate)
DIRECTORIES = ["bundle", "corpus", "data", "evaluation", "head", "policy", "target"]


@pytest.mark.parametrize("family", ["eagle3", "block"])
def test_the_whole_road(tmp_path, capsys, family):
    write_sources(tmp_path / "sources")
    config = tiny_config(tmp_path / "run", tmp_path / "sources")
    config.head = replace(config.head, family=family, block=BlockHeadTrainConfig(block_size=4, anchors=8))
    write_target(tmp_path / "run" / "target")
    for stage in STAGES:
        stage(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == DIRECTORIES

    evaluation = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert set(evaluation["methods"]) == set(METHODS)
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    for method in evaluation["methods"].values():
        assert method["acceptance_length"] >= 1
    assert (tmp_path / "run" / "evaluation" / "report.png").stat().st_size > 10_000
    assert "graft" in (tmp_path / "run" / "bundle" / "README.md").read_text()

    engine = GraftEngine.from_pretrained(tmp_path / "run" / "bundle", tmp_path / "run" / "target")
    assert isinstance(engine.head, {"eagle3": DraftHead, "block": BlockHead}[family])
    assert engine.policy.graft.num_draft_tokens <= config.policy.num_draft_tokens[-1]

    capsys.readouterr()
    for stage in STAGES:
        stage(config)
    said = capsys.readouterr().out
    assert [line.split(":")[1].split()[0] for line in said.splitlines() if ": reusing" in line] == ["reusing"] * 6
