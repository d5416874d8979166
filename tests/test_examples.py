"""Every script of examples/ runs, on a tiny pair, and does what it says."""

import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import equal
from transformers import AutoTokenizer

from graft_inference import METHODS, GraftEngine, Policy
from graft_inference.retrieval.sources import SOURCES
from graft_train.evaluate import EvaluateConfig
from tests.graft_inference.serving import TEMPLATE
from tests.graft_inference.serving import served as serving
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import WORDS, tiny_config, write_sources

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The settings of a run that train_a_head made."""
    root = tmp_path_factory.mktemp("examples")
    write_sources(root / "sources")
    config = tiny_config(root / "run", root / "sources")
    target = write_target(root / "run" / "target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    main_of("train_a_head")(config)
    return config


@pytest.fixture
def pair(trained):
    """Bundle and target."""
    return f"{trained.run_dir}/bundle", f"{trained.run_dir}/target"


def test_a_head_is_trained_and_measured(trained):
    evaluation = json.loads(Path(trained.run_dir, "evaluation", "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)


def test_a_head_is_adopted(trained, tmp_path):
    shutil.copytree(Path(trained.run_dir, "target"), tmp_path / "target")
    config = replace(trained, run_dir=str(tmp_path))
    config.target = replace(config.target, name_or_path=str(tmp_path / "target"))
    config.head = replace(config.head, init_from=f"{trained.run_dir}/head")
    main_of("adopt_a_head")(config)
    theirs, ours = (Path(run, "bundle", "model.safetensors") for run in (trained.run_dir, tmp_path))
    assert theirs.read_bytes() == ours.read_bytes()


def test_an_answer_is_the_targets_own(pair, capsys):
    out = main_of("decode")(*pair, "alpha beta", max_new_tokens=12)
    engine = GraftEngine.from_pretrained(*pair)
    plain = engine.generate(out.sequences[:, : -out.stats.emitted], 12, method="autoregressive")
    assert equal(out.sequences, plain.sequences)
    assert f"{out.stats.acceptance_length:.2f} tokens per pass" in capsys.readouterr().out


def test_prompts_of_a_batch_are_continued_as_alone(pair, capsys):
    prompts = ["alpha", "beta gamma delta"]
    out = main_of("batch")(*pair, prompts, max_new_tokens=8)
    engine = GraftEngine.from_pretrained(*pair)
    said = capsys.readouterr().out
    for prompt, stats in zip(prompts, out.each, strict=True):
        alone = engine.generate(engine.tokenizer(prompt).input_ids, 8)
        text = engine.tokenizer.decode(alone.sequences[0, -alone.stats.emitted :], skip_special_tokens=True)
        assert f"--- {prompt!r}: {stats.acceptance_length:.2f} tokens per pass\n{text}\n" in said


def test_a_chat_is_streamed_turn_by_turn(pair, capsys):
    messages = main_of("stream_chat")(*pair, ["alpha\n", "beta\n"], max_new_tokens=8)
    said = capsys.readouterr().out
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert all(message["content"] in said for message in messages if message["role"] == "assistant")
    first, second = (int(kept) for kept in re.findall(r"per pass, (\d+) of the prompt's tokens kept", said))
    assert first == 0 < second


def test_a_server_is_measured(trained, pair):
    with serving(pair[0]) as server:
        asked = EvaluateConfig(server=server.url, prompts=2, max_new_tokens=6, concurrency=[1], repeats=1)
        directory = main_of("measure_a_server")(replace(trained, evaluation=asked))
    (level,) = json.loads((directory / "evaluation.json").read_text())["levels"]
    assert level["servers"][0]["requests"] == 2


@pytest.fixture
def unlisted():
    yield
    SOURCES.pop("manual", None)


@pytest.mark.usefixtures("unlisted")
def test_a_source_of_ones_own_is_traced_and_priced(trained, tmp_path):
    for part in ("target", "data", "head", "corpus"):
        shutil.copytree(Path(trained.run_dir, part), tmp_path / part)
    config = replace(trained, run_dir=str(tmp_path))
    directory = main_of("own_source")(config, " ".join(WORDS))
    assert "manual" in json.loads((directory / "latency.json").read_text())["source_ms"]
    assert "manual" in json.loads((directory / "report.json").read_text())["calibration_error"]
    Policy.from_dict(json.loads((directory / "policy.json").read_text()))
