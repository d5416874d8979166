"""The dtype and threads that are measured: which is chosen, how it reaches policy and runtime, and what it leaves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graft_inference import GraftEngine, GraftError
from graft_train import arithmetic
from graft_train.arithmetic import fastest, least_milliseconds, measured_arithmetic, with_dtype
from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.config.target import TargetConfig
from graft_train.data.target import load_target
from graft_train.distill import distill
from graft_train.evaluate import evaluate
from graft_train.recipe import run_stages
from graft_train.regenerate import regenerate

from ..graft_inference.tiny_bundle import write_bundle, write_target
from .tiny_chat import PLAIN, word_tokenizer
from .tiny_run import tiny_config, write_sources


@pytest.fixture
def config(tmp_path):
    write_target(tmp_path / "target")
    tiny = tiny_config(tmp_path, tmp_path / "sources")
    return replace(tiny, threads=None, target=replace(tiny.target, dtype="auto"))


@pytest.fixture(autouse=True)
def _same_threads_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def say_how_long(monkeypatch, milliseconds):
    """Passes take what this says of (dtype, threads)."""
    real, now = arithmetic.Target, {}

    def target(model):
        now["dtype"] = str(model.dtype).removeprefix("torch.")
        return real(model)

    def least(run):
        run()
        return milliseconds(now["dtype"], torch.get_num_threads())

    monkeypatch.setattr(arithmetic, "Target", target)
    monkeypatch.setattr(arithmetic, "least_milliseconds", least)


@pytest.mark.parametrize(
    ("slowest", "dtype", "threads"),
    [(("float32", 4), "bfloat16", 2), (("bfloat16", 4), "float32", 2), (("float32", 1), "bfloat16", 2)],
)
def test_the_faster_kind_is_chosen_once_for_the_run(config, monkeypatch, slowest, dtype, threads):
    torch.set_num_threads(4)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[slowest[0]]
    say_how_long(monkeypatch, lambda kind, count: (3.0 if kind == other else 5.0) + abs(count - threads))
    chosen = with_dtype(config)
    assert (chosen.target.dtype, torch.get_num_threads()) == (dtype, threads)
    assert load_target(chosen.target).dtype == getattr(torch, dtype)
    found = measured_arithmetic(Path(config.run_dir))
    kinds = [(one["dtype"], one["threads"]) for one in found["measured"]]
    assert kinds == [(kind, count) for kind in ("float32", "bfloat16") for count in (4, 2, 1)]
    # Measured once: a second stage finds the choice, however long passes take now.
    torch.set_num_threads(4)
    say_how_long(monkeypatch, lambda kind, count: 1.0 if kind == other else 9.0)
    assert with_dtype(config) == chosen
    assert torch.get_num_threads() == threads


def test_threads_that_are_given_stay(config, monkeypatch):
    say_how_long(monkeypatch, lambda kind, count: 1.0)
    torch.set_num_threads(3)
    with_dtype(replace(config, threads=3))
    assert torch.get_num_threads() == 3
    assert {one["threads"] for one in measured_arithmetic(Path(config.run_dir))["measured"]} == {3}


def test_a_dtype_that_is_named_is_kept(config, tmp_path):
    named = replace(config, target=replace(config.target, dtype="float16"))
    assert with_dtype(named) is named
    assert not measured_arithmetic(tmp_path)
    with pytest.raises(GraftError, match=r"target\.dtype=float8 is unknown"):
        TargetConfig(dtype="float8")


def test_what_was_not_measured_is_loaded_in_float32_on_a_cpu(config, tmp_path):
    assert load_target(config.target).dtype == torch.float32
    assert not (tmp_path / "arithmetic").exists()


def test_a_target_that_is_not_loaded_is_not_measured(config, tmp_path, monkeypatch):
    """With the data's own answers, and where servers answer, its tokenizer is all that has to be there."""
    word_tokenizer(PLAIN).save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").rename(tmp_path / "elsewhere")
    letters = "abcdefghijklmnopqrstuvwxyz"
    chats = [[{"role": "user", "content": f"{a} b"}, {"role": "assistant", "content": "c d e"}] for a in letters]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    own = replace(
        config,
        data=replace(config.data, path=str(path)),
        regenerate=replace(config.regenerate, answers="data", held_out=2),
    )
    monkeypatch.setattr("graft_train.recipe.prepare", lambda composed: composed)
    run_stages(own, ["regenerate"])  # as the command does
    assert (tmp_path / "data" / "samples.jsonl").exists()
    build_corpus(replace(own, corpus=replace(own.corpus, text_only=True)))
    served = replace(own, evaluation=replace(own.evaluation, server="http://127.0.0.1:9/v1"))
    with pytest.raises(GraftError, match=r"127\.0\.0\.1:9"):
        evaluate(served)
    assert not (tmp_path / "arithmetic").exists()


def test_the_first_stage_that_loads_the_target_measures(config, tmp_path, monkeypatch):
    write_sources(tmp_path / "sources")
    say_how_long(monkeypatch, lambda kind, count: {"float32": 5.0, "bfloat16": 3.0}[kind])
    regenerate(config)
    assert measured_arithmetic(tmp_path)["dtype"] == "bfloat16"
    distill(config)
    settings = json.loads((tmp_path / "head" / "stage.json").read_text())["settings"]
    assert settings["dtype"] == "bfloat16"


@pytest.mark.parametrize("stage", [distill, build_corpus, calibrate, evaluate])
def test_a_missing_stage_is_told_before_anything_is_measured(config, tmp_path, stage):
    with pytest.raises(GraftError, match="is missing; run graft "):
        stage(config)
    assert not (tmp_path / "arithmetic").exists()


@pytest.mark.parametrize("damage", ["{", "{}", '{"dtype": "int8", "threads": 1, "measured": []}', "[1]"])
def test_what_was_measured_is_read_strictly(config, tmp_path, damage):
    with_dtype(config)
    (tmp_path / "arithmetic" / "arithmetic.json").write_text(damage)
    for read in (lambda: with_dtype(config), lambda: measured_arithmetic(tmp_path)):
        with pytest.raises(GraftError, match=r"arithmetic\.json .*delete .*arithmetic to have it measured again"):
            read()


def test_a_pass_is_timed_by_its_least(monkeypatch):
    # Warm-up, then: begun at 10; three runs of 2, 1 and 3 seconds, which is when the time is up.
    ticks = iter([10.0, *(10.0, 12.0), 12.0, *(12.0, 13.0), 13.0, *(13.0, 16.0), 16.0])
    runs = []
    assert least_milliseconds(lambda: runs.append(1), lambda: next(ticks)) == 1000.0
    assert len(runs) == 4


def test_the_least_sum_wins():
    times = [
        {"dtype": "float32", "threads": 2, "milliseconds": {"1": 2.0, "8": 9.0}},
        {"dtype": "bfloat16", "threads": 2, "milliseconds": {"1": 3.0, "8": 4.0}},
    ]
    assert fastest(times) is times[1]


@pytest.mark.parametrize(
    ("measured_on", "dtype"),
    [
        ({"device": {"type": "cpu"}, "dtype": "bfloat16"}, torch.bfloat16),
        ({"device": {"type": "cuda"}, "dtype": "bfloat16"}, torch.float32),
        ({"device": {"type": "cpu"}}, torch.float32),
    ],
)
def test_the_runtime_serves_in_the_dtype_of_its_policy(tmp_path, measured_on, dtype):
    (tmp_path / "bundle").mkdir()
    target = write_target(tmp_path / "target")
    bundle = write_bundle(tmp_path / "bundle", target)
    graft = json.loads((bundle / "graft.json").read_text())
    graft["policy"]["measured_on"] = measured_on
    (bundle / "graft.json").write_text(json.dumps(graft))
    engine = GraftEngine.from_pretrained(bundle, tmp_path / "target", "cpu")
    assert engine.target.model.dtype == dtype
    assert engine.head.fc.weight.dtype == dtype
    named = GraftEngine.from_pretrained(bundle, tmp_path / "target", "cpu", dtype="float32")
    assert named.target.model.dtype == torch.float32
