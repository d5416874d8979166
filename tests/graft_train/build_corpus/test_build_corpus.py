"""The stage: any number of processes, interrupted or not, gives the same corpus, bit for bit."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from graft_inference import GraftError
from graft_inference.bundle import load_successors
from graft_train.build_corpus import build_corpus, count_windows, describe_corpus, pairs, write_matrix
from graft_train.build_corpus.captured import find_captured
from graft_train.config.corpus import CorpusConfig
from graft_train.data.samples import Sample, answered, append_samples, read_samples
from graft_train.data.states import PackedTarget
from graft_train.data.target import load_target
from graft_train.distill.batches import to_tensors
from graft_train.distill.state_source import disk_states
from graft_train.files import write_json
from graft_train.stage import fingerprint_of
from tests.graft_inference.tiny import VOCAB
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run with a target and samples in a dozen windows."""
    monkeypatch.setattr(pairs, "WINDOW_BYTES", 700)
    config = tiny_config(tmp_path / "run", tmp_path)
    config.target.name_or_path = str(write_target(tmp_path / "target"))
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    samples = [answered(f"s{n}", ids(5 + n % 7), ids(12 - n % 5), {}) for n in range(60)]
    with (data / "samples.jsonl").open("wb") as file:
        append_samples(file, [*samples, Sample("held", "evaluation", ids(9))])
    write_json(data / "stage.json", {"fingerprint": "made"})
    config.corpus = CorpusConfig(successors=4, held_out=0.1, batch_tokens=100)
    return config


def build(config, tmp_path, name, processes=1, finished=()):
    """The matrix's bytes, with the processes one after the other."""
    counts = tmp_path / name / "counts"
    counts.mkdir(parents=True)
    for file in finished:
        (counts / file.name).write_bytes(file.read_bytes())
    samples, made_for = tmp_path / "run" / "data" / "samples.jsonl", describe_corpus(config.target)
    for process in reversed(range(processes)):
        count_windows(config, samples, counts, made_for, process, processes)
    write_matrix(config.corpus, counts, tmp_path / name, made_for)
    return (tmp_path / name / "successors.safetensors").read_bytes()


@pytest.mark.parametrize("text_only", [False, True])
def test_processes_and_windows_do_not_change_a_bit(config, tmp_path, monkeypatch, text_only):
    config.corpus = replace(config.corpus, text_only=text_only, batch_tokens=1)  # one sample a batch in any window
    one = build(config, tmp_path, "one")
    assert len(list((tmp_path / "one" / "counts").iterdir())) > 5
    assert build(config, tmp_path, "three", processes=3) == one
    monkeypatch.setattr(pairs, "WINDOW_BYTES", 1 << 20)
    assert build(config, tmp_path, "whole") == one
    assert len(list((tmp_path / "whole" / "counts").iterdir())) == 1


@pytest.mark.parametrize("text_only", [False, True])
def test_a_killed_build_resumes_to_the_same_bits(config, tmp_path, monkeypatch, text_only):
    """Some counts of three processes are there; two processes do the rest, and read nothing twice."""
    config.corpus = replace(config.corpus, text_only=text_only)
    whole = build(config, tmp_path, "whole", processes=3)
    finished = sorted((tmp_path / "whole" / "counts").iterdir())[1::2]
    read = []
    original = pairs.samples_of
    monkeypatch.setattr("graft_train.build_corpus.samples_of", lambda *args: read.append(args[0]) or original(*args))
    assert build(config, tmp_path, "resumed", processes=2, finished=finished) == whole
    total = len(list(pairs.windows(tmp_path / "run" / "data" / "samples.jsonl")))
    assert len({window.number for window in read}) == len(read) == total - len(finished) > 0


def test_the_stage_writes_a_corpus_that_loads_and_tells_about_it(config, tmp_path, capsys):
    corpus = build_corpus(config)
    made_for = describe_corpus(config.target)
    matrix = load_successors(corpus / "successors.safetensors", VOCAB, made_for)
    assert matrix.made_for == made_for
    assert not list(corpus.glob("counts*"))
    inspection = json.loads((corpus / "inspection.json").read_text())
    assert inspection["rows_filled"] == int((matrix.ids_VK[:, 0] >= 0).sum()) > 50
    assert 0 < inspection["recall"]["top_1"] < inspection["recall"]["top_k"] < inspection["recall"]["hit_rate"] <= 1
    said = capsys.readouterr().out
    assert "held-out tokens" in said
    assert "successors of the most frequent tokens" in said
    build_corpus(config)
    said = capsys.readouterr().out
    assert "reusing" in said
    assert "held-out tokens" in said


def test_recall_is_measured_on_what_was_held_out(config, tmp_path):
    """Text that repeats one cycle is foreseen entirely; random text hardly."""
    cycle = [(n * 7) % VOCAB for n in range(VOCAB)]
    lines = [answered(f"s{n}", cycle[n % 50 :][:4], (cycle * 2)[n % 50 + 4 :][:20], {}) for n in range(60)]
    with (tmp_path / "run" / "data" / "samples.jsonl").open("wb") as file:
        append_samples(file, lines)
    config.corpus = replace(config.corpus, text_only=True)
    inspection = json.loads((build_corpus(config) / "inspection.json").read_text())
    assert inspection["held_out_tokens"] > 20
    assert inspection["recall"] == {"hit_rate": 1.0, "top_1": 1.0, "top_k": 1.0, "k": 4}


def test_learned_rows_are_merged_back(config, tmp_path):
    config.corpus = replace(config.corpus, text_only=True)
    before = load_file(build_corpus(config) / "successors.safetensors")
    served = load_successors(tmp_path / "run" / "corpus" / "successors.safetensors", VOCAB)
    seen = torch.full((1000, VOCAB), -20.0)
    seen[:, 7] = 0
    served.update(torch.full((1000,), 3), seen)
    served.save(tmp_path / "learned.safetensors")
    config.run_dir = str(tmp_path / "again")
    (tmp_path / "run").rename(tmp_path / "again")
    (tmp_path / "again" / "corpus").rename(tmp_path / "old")
    config.corpus = replace(config.corpus, merge=[str(tmp_path / "learned.safetensors")])
    after = load_file(build_corpus(config) / "successors.safetensors")
    others = torch.arange(VOCAB) != 3
    assert all(torch.equal(after[name][others], before[name][others]) for name in before)
    assert int(after["counts"][3]) == int(before["counts"][3]) + 1000
    assert int(after["ids"][3, 0]) == 7
    assert float(after["probs"][3, 0]) == pytest.approx(1000 / int(after["counts"][3]), abs=0.02)


def edited(path, metadata, **tensors):
    save_file(load_file(path) | tensors, path, {"made_for": json.dumps(metadata)})


def test_a_learned_file_that_changes_while_windows_are_counted_is_told(config, tmp_path, monkeypatch):
    """Once it is back, the stage goes on."""
    config.corpus = replace(config.corpus, text_only=True)
    before = build_corpus(config).rename(tmp_path / "before")
    learned, config.corpus.merge = tmp_path / "learned.safetensors", [str(tmp_path / "learned.safetensors")]
    content = (before / "successors.safetensors").read_bytes()
    learned.write_bytes(content)

    def count_slowly(*arguments):
        edited(learned, describe_corpus(config.target), counts=load_file(learned)["counts"] + 1)
        count_windows(*arguments)

    with monkeypatch.context() as slow:
        slow.setattr("graft_train.build_corpus.count_windows", count_slowly)
        with pytest.raises(GraftError, match=r"a file of corpus\.merge changed"):
            build_corpus(config)
    assert not (tmp_path / "run" / "corpus").exists()
    learned.write_bytes(content)
    assert (build_corpus(config) / "successors.safetensors").exists()


def test_a_corpus_for_another_target_is_refused(config, tmp_path):
    corpus, made_for = build_corpus(config), describe_corpus(config.target)
    for name in ("tokenizer", "fingerprint", "hidden_size"):
        edited(corpus / "successors.safetensors", made_for | {name: "other"})
        with pytest.raises(GraftError, match=f"successors.*another target: its {name} is other"):
            load_successors(corpus / "successors.safetensors", VOCAB, made_for)
    config.run_dir = str((tmp_path / "run").rename(tmp_path / "again"))
    (tmp_path / "again" / "corpus").rename(tmp_path / "old")
    config.corpus = replace(config.corpus, merge=[str(tmp_path / "old" / "successors.safetensors")])
    with pytest.raises(GraftError, match=r"old/successors\.safetensors was built for another target"):
        build_corpus(config)


def test_a_target_spread_over_all_devices_is_one_process(config, monkeypatch):
    monkeypatch.setattr("graft_train.build_corpus.PartialState", lambda **_: mock.Mock(num_processes=2))
    config.target.device_map = "auto"
    with pytest.raises(GraftError, match=r"device_map=auto would give each of 2 processes a whole target"):
        build_corpus(config)


def test_bad_settings_are_refused(config, tmp_path):
    with pytest.raises(GraftError, match=r"corpus\.successors=0 must be at least 1"):
        CorpusConfig(successors=0)
    with pytest.raises(GraftError, match=r"corpus\.held_out=1"):
        CorpusConfig(held_out=1.0)
    config.corpus = replace(config.corpus, merge=["nowhere.safetensors"])
    with pytest.raises(GraftError, match=r"nowhere\.safetensors does not exist"):
        build_corpus(config)
    assert not (tmp_path / "run" / "corpus.partial").exists()


def captured(config, tmp_path):
    """What distill leaves of the training samples, the longest of them cut."""
    model = load_target(config.target)
    config.head.max_length = 17
    samples = read_samples(tmp_path / "run" / "data" / "samples.jsonl", "train")
    rows = to_tensors(samples, config.head.max_length, VOCAB)
    target = PackedTarget(model, (0, 1, 2))
    fingerprint = fingerprint_of(tmp_path / "target")
    disk_states(target, rows, 64, tmp_path / "run" / "states", fingerprint, None, Accelerator(cpu=True))
    return sum(len(row.tokens_S) == len(sample.ids) for row, sample in zip(rows, samples, strict=True))


def test_captured_states_give_what_the_target_gives(config, tmp_path, monkeypatch):
    for prompts in (True, False):
        config.corpus = replace(config.corpus, prompts=prompts)
        build(config, tmp_path, f"ran{prompts}")
    held = captured(config, tmp_path)
    left = []
    run = pairs.predicted_pairs
    monkeypatch.setattr(
        "graft_train.build_corpus.predicted_pairs",
        lambda model, samples, *rest: left.extend(samples) or run(model, samples, *rest),
    )
    for prompts in (True, False):
        config.corpus = replace(config.corpus, prompts=prompts)
        build(config, tmp_path, f"read{prompts}")
        assert 0 < held < 60, "some samples were cut, some were not"
        assert {len(one) > 17 for one in left} == {True}
        left.clear()
        ran, read = (load_file(tmp_path / f"{name}{prompts}" / "successors.safetensors") for name in ("ran", "read"))
        assert all(torch.equal(ran[name], read[name]) for name in ran)


@pytest.mark.parametrize("changed", ["target", "samples", "dtype"])
def test_captured_states_of_something_else_are_not_read(config, tmp_path, capsys, changed):
    captured(config, tmp_path)
    index = tmp_path / "run" / "states" / "index.json"
    write_json(index, json.loads(index.read_text()) | {changed: "other"})
    assert find_captured(config, load_target(config.target)) is None
    assert f"of other {changed}: the target runs" in capsys.readouterr().out
    index.write_text("{")
    with pytest.raises(GraftError, match=r"index\.json is not valid JSON .*; delete"):
        find_captured(config, load_target(config.target))
