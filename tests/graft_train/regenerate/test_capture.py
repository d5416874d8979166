"""What is kept while the target answers is what a pass of the target gives, and the later stages run none."""

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import graft_train.regenerate.capture as capture
import graft_train.regenerate.in_process as module
from graft_inference import GraftError
from graft_train.build_corpus import build_corpus
from graft_train.data.samples import read_samples
from graft_train.data.states import PackedTarget
from graft_train.data.target import load_target
from graft_train.distill import distill
from graft_train.distill.batches import to_tensors, with_room
from graft_train.distill.shards import Shards, widths_of
from graft_train.distill.state_source import places_of
from graft_train.regenerate import RegenerateConfig, regenerate
from tests.graft_inference.tiny import VOCAB
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources

LAYERS = (0, 2, 3)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(capture, "SHARD_TOKENS", 50)


@pytest.fixture
def config(tmp_path):
    return capturing(tmp_path)


def capturing(root):
    write_sources(root / "sources")
    config = tiny_config(root / "run", root / "sources")
    write_target(root / "run" / "target")
    config.regenerate.states = True
    config.head = replace(config.head, states="disk", aux_layer_ids=list(LAYERS), max_length=18)
    return config


def stored(config):
    """The states of each sample, cut as distillation cuts it, by its id."""
    samples = with_room(read_samples(path_of(config), "train"), 18)
    directory = path_of(config).parent / "states"
    index = json.loads((directory / "index.json").read_text())
    places = places_of(index, [len(sample.cut(18).ids) for sample in samples])
    shards = Shards(directory, places, torch.float32, widths_of(32, len(LAYERS), None))
    return {sample.id: shards.read(place, VOCAB) for sample, place in zip(samples, places, strict=True)}


def path_of(config):
    return capture.Path(config.run_dir) / "data" / "samples.jsonl"


def test_states_are_those_of_a_pass_over_the_samples(config):
    regenerate(config)
    found = stored(config)
    target = PackedTarget(load_target(config.target), LAYERS)
    samples = with_room(read_samples(path_of(config), "train"), 18)
    assert len({len(sample.ids) > 18 for sample in samples}) == 2, "some are cut, some are not"
    for sample, row in zip(samples, to_tensors(samples, 18, VOCAB), strict=True):
        expected, got = target.states(row.tokens_S, [len(row.tokens_S)]), found[sample.id]
        torch.testing.assert_close(got["aux"], expected.aux_SE, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got["final"], expected.final_SH, atol=1e-4, rtol=1e-4)
        assert got["choice"].tolist() == expected.choice_S.tolist()
    assert len(list((path_of(config).parent / "states").glob("shard-*"))) > 2


def test_distill_and_build_corpus_run_no_target(config, tmp_path, monkeypatch):
    regenerate(config)
    plain = tiny_config(tmp_path / "plain", tmp_path)
    plain.target, plain.data, plain.corpus = config.target, config.data, config.corpus
    plain.head = replace(config.head, states="online")
    regenerate(plain)
    (tmp_path / "plain" / "data" / "samples.jsonl").write_bytes(path_of(config).read_bytes())
    expected = load_file(build_corpus(plain) / "successors.safetensors")
    trained = load_file(distill(plain) / "model.safetensors")

    def not_called(*arguments, **named):
        raise AssertionError("the target ran")

    monkeypatch.setattr(PackedTarget, "states", not_called)
    got = load_file(distill(config) / "model.safetensors")
    torch.testing.assert_close(got, trained, atol=1e-4, rtol=1e-3)
    config.head.max_length = 18
    ran = []
    monkeypatch.setattr(
        "graft_train.build_corpus.predicted_pairs", lambda model, samples, *rest: ran.extend(samples) or ()
    )
    found = load_file(build_corpus(config) / "successors.safetensors")
    assert {len(one) > 18 for one in ran} <= {True}, "but for samples that distillation cuts"
    assert int(found["counts"].sum()) + sum(int(one.counted_S.sum()) for one in ran) == int(expected["counts"].sum())


@pytest.mark.parametrize("changes", [{"states_top_k": 5}, {"states_dtype": "bfloat16"}, {"family": "block"}])
def test_what_distill_asks_of_its_states_is_kept(config, monkeypatch, changes):
    """The layers that a family reads where none are named, too."""
    config.head = replace(config.head, aux_layer_ids=None, **changes)
    regenerate(config)
    monkeypatch.setattr(PackedTarget, "states", None)
    assert (distill(config) / "model.safetensors").is_file()


@pytest.mark.parametrize("lost", [False, True])
def test_killed_and_resumed_states_belong_to_their_samples(config, tmp_path, monkeypatch, lost):
    """Also where the machine failed before the last shard had reached the disk."""
    regenerate(config)
    expected = stored(config)
    killed = capturing(tmp_path / "killed")
    answers = module.answers

    def dying(*arguments):
        yield from islice(answers(*arguments), 8)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "answers", dying)
        regenerate(killed)
    partial = tmp_path / "killed" / "run" / "data.partial"
    kept = (partial / "samples.jsonl").read_bytes().splitlines()
    assert 0 < len(kept) < 8, "answers are written with their shard"
    if lost:
        max((partial / "states").glob("shard-*")).unlink()
    asked = []
    monkeypatch.setattr(
        module, "answers", lambda engine, pending, *rest: asked.extend(pending) or answers(engine, pending, *rest)
    )
    regenerate(killed)
    assert len(asked) < 12
    assert (len(asked) > 12 - len(kept)) == lost
    assert len(read_samples(path_of(killed), "train")) == 12
    found = stored(killed)
    assert found.keys() == expected.keys()
    for name, states in expected.items():
        torch.testing.assert_close(found[name], states, atol=1e-4, rtol=1e-4)


def test_states_of_other_layers_are_refused_with_what_to_do(config):
    regenerate(config)
    config.head.aux_layer_ids = [0, 1, 2]
    with pytest.raises(GraftError, match=r"aux_layer_ids: \[0, 2, 3\] -> \[0, 1, 2\].*delete .*data/states"):
        distill(config)
    with pytest.raises(GraftError, match=r"states\.aux_layer_ids"):
        regenerate(config)


def test_a_disk_too_small_stops_it_before_anything_is_answered(config, monkeypatch):
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(module, "plain_engine", None)
    with pytest.raises(GraftError, match=r"GiB free, but target states need .* set regenerate\.states=false"):
        regenerate(config)


def test_more_logits_than_the_target_has_are_refused(config):
    config.head = replace(config.head, states_top_k=VOCAB + 1)
    with pytest.raises(GraftError, match=f"states_top_k={VOCAB + 1} is more than the {VOCAB} tokens"):
        regenerate(config)


def test_settings_that_exclude_each_other_are_told_before_any_work(config):
    config.head = replace(config.head, states="online")
    with pytest.raises(GraftError, match=r"head\.states=disk reads, but it is online"):
        regenerate(config)
    config.head = replace(config.head, states="disk", init_from="somewhere", aux_layer_ids=None)
    with pytest.raises(GraftError, match=r"set head\.aux_layer_ids"):
        regenerate(config)
    with pytest.raises(GraftError, match=r"no regenerate\.base_url"):
        RegenerateConfig(states=True, base_url="http://localhost/v1")
    assert not (capture.Path(config.run_dir) / "data.partial").exists()
