import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from graft_inference import GraftError
from graft_train.data.states import PackedTarget
from graft_train.distill import state_source
from graft_train.distill.batches import collate, to_tensors
from graft_train.distill.state_source import disk_states, memory_states, online_states

from .pair import VOCAB, samples, tiny_target

ROWS = to_tensors(samples(), 64, VOCAB)


def target():
    return PackedTarget(tiny_target(), (0, 2, 3))


def on_disk(directory, rows=ROWS, dtype=None, fingerprint="of the target", top=None, batch_tokens=40):
    return disk_states(
        target(), rows, batch_tokens, directory / "states", fingerprint, dtype, Accelerator(cpu=True), top
    )


def dying(counted):
    """The target's states, of which the third pass is killed."""
    whole = PackedTarget.states

    def states(self, *arguments):
        counted.append(1)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    return states


def batch():
    return collate(ROWS, [3, 8, 1], torch.device("cpu"))


def assert_same(got, expected, atol=1e-5):
    torch.testing.assert_close(got.aux_SE, expected.aux_SE, atol=atol, rtol=atol)
    torch.testing.assert_close(got.final_SH, expected.final_SH, atol=atol, rtol=atol)
    assert torch.equal(got.choice_S, expected.choice_S)


def test_states_kept_in_memory_or_on_disk_are_the_online_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(state_source, "SHARD_TOKENS", 50)
    expected = online_states(target())(batch())
    assert_same(memory_states(target(), ROWS, 40)(batch()), expected)
    assert_same(on_disk(tmp_path)(batch()), expected)
    assert len(list((tmp_path / "states").glob("*.safetensors"))) > 1


def test_states_on_disk_are_written_once_and_in_the_dtype_asked_for(tmp_path, monkeypatch, capsys):
    exact = on_disk(tmp_path, dtype="bfloat16")(batch())
    assert "GiB on disk" in capsys.readouterr().out
    assert_same(exact, online_states(target())(batch()), atol=0.02)
    monkeypatch.setattr(PackedTarget, "states", None)
    assert_same(on_disk(tmp_path, dtype="bfloat16")(batch()), exact, atol=0)


def test_the_best_logits_take_the_place_of_the_final_states(tmp_path):
    whole, best = on_disk(tmp_path / "whole")(batch()), on_disk(tmp_path / "best", top=3)(batch())
    logits_SV = whole.final_SH @ target().lm_head_VH.T
    expected = logits_SV.topk(3)
    assert best.final_SH is None
    assert torch.equal(best.top_ids_SM, expected.indices)
    torch.testing.assert_close(best.top_logits_SM, expected.values - expected.values[:, :1], atol=1e-4, rtol=1e-4)
    assert torch.equal(best.choice_S, whole.choice_S)
    sizes = [
        sum(p.stat().st_size for p in (tmp_path / name / "states").glob("*.safetensors")) for name in ("whole", "best")
    ]
    tokens = sum(len(row.tokens_S) for row in ROWS)
    assert sizes[0] - sizes[1] == pytest.approx(tokens * (16 * 4 - 3 * 8), abs=200)  # but for the headers
    with pytest.raises(GraftError, match=r"head\.states_top_k=32 is more than the 31 tokens"):
        on_disk(tmp_path / "more", top=VOCAB + 1)


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(state_source, "SHARD_TOKENS", 50)
    whole, counted = PackedTarget.states, []
    monkeypatch.setattr(PackedTarget, "states", dying(counted))
    with pytest.raises(KeyboardInterrupt):
        on_disk(tmp_path)
    assert not (tmp_path / "states").exists()
    source = on_disk(tmp_path)
    shards = len(list((tmp_path / "states").glob("*.safetensors")))
    assert len(counted) < 2 * shards + 1
    monkeypatch.setattr(PackedTarget, "states", whole)
    assert_same(source(batch()), online_states(target())(batch()))


@pytest.mark.parametrize("killed", [False, True])
def test_a_pass_that_goes_on_with_other_batches_cuts_its_shards_anew(tmp_path, monkeypatch, killed):
    """Out of memory, say, and lowered: the rows of the shards that are there would be others."""
    monkeypatch.setattr(state_source, "SHARD_TOKENS", 20)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PackedTarget, "states", dying([]))
        on_disk(tmp_path, batch_tokens=40)
    if killed:  # in the middle of removing them
        (tmp_path / "states.partial" / "identity.json").unlink()
    everything = collate(ROWS, list(range(len(ROWS))), torch.device("cpu"))
    assert_same(on_disk(tmp_path, batch_tokens=25)(everything), online_states(target())(everything))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "of another"}, "stale .target: of the target -> of another"),
        ({"rows": ROWS[:-1]}, "stale .samples"),
        ({"dtype": "bfloat16"}, "stale .dtype: float32 -> bfloat16"),
        ({"top": 3}, "stale .top_k: None -> 3"),
    ],
)
def test_states_of_something_else_are_refused(tmp_path, changes, message):
    on_disk(tmp_path)
    with pytest.raises(GraftError, match=message):
        on_disk(tmp_path, **changes)


def test_a_disk_too_small_stops_it_before_the_target_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(state_source.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    monkeypatch.setattr(PackedTarget, "states", None)
    with pytest.raises(GraftError, match=r"head\.states=online"):
        on_disk(tmp_path)


def edit_index(directory, change):
    index = json.loads((directory / "index.json").read_text())
    change(index)
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["lengths"].__setitem__(0, 10**9),
        lambda index: index["lengths"].reverse(),
        lambda index: index["shards"][0].reverse() or index["shards"][0].pop(),
        lambda index: index["shards"][0].append(0),
        lambda index: index["shards"].insert(0, "x"),
        lambda index: index.update(shards=3),
        lambda index: index.pop("lengths"),
    ],
    ids=["absurd", "other order", "one is missing", "one twice", "text", "number", "none"],
)
def test_an_index_of_other_rows_is_refused(tmp_path, change):
    on_disk(tmp_path)
    edit_index(tmp_path / "states", change)
    with pytest.raises(GraftError, match=r"index\.json is damaged"):
        on_disk(tmp_path)


def test_states_without_an_index_are_told_before_the_target_runs(tmp_path, monkeypatch):
    on_disk(tmp_path)
    (tmp_path / "states" / "index.json").unlink()
    monkeypatch.setattr(PackedTarget, "states", None)
    with pytest.raises(GraftError, match=r"states has no index\.json, so it is damaged; delete it"):
        on_disk(tmp_path)


def test_an_index_that_nests_without_end_is_refused(tmp_path):
    on_disk(tmp_path)
    (tmp_path / "states" / "index.json").write_text("[" * 100_000)
    with pytest.raises(GraftError, match=r"index\.json is not valid JSON \(it is nested too deeply\)"):
        on_disk(tmp_path)


def changed(name, change):
    """A shard in which one part is another."""

    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (changed("aux", lambda part: part * torch.nan), "aux holds what is no number"),
        (changed("final", lambda part: part * 1e38 * 10), "final holds what is no number"),
        (changed("choice", lambda part: part + VOCAB), "choice holds what is no token"),
        (changed("choice", lambda part: part - VOCAB), "choice holds what is no token"),
        (changed("choice", lambda part: part.long()), "is missing or damaged"),
        (changed("aux", lambda part: part.bfloat16()), "is missing or damaged"),
        (changed("aux", lambda part: part[:, :-1]), "is missing or damaged"),
        (changed("final", lambda part: part[:-1]), "is missing or damaged"),
        (lambda tensors: tensors.pop("final"), "is missing or damaged"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "is missing or damaged"),
    ],
)
def test_a_shard_with_what_no_target_makes_is_refused(tmp_path, edit, told):
    on_disk(tmp_path)
    path = tmp_path / "states" / "shard-00000.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(GraftError, match=rf"shard-00000\.safetensors:? {told}"):
        on_disk(tmp_path)(batch())


def test_a_damaged_index_or_shard_is_named(tmp_path):
    on_disk(tmp_path)
    shard = next((tmp_path / "states").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(GraftError, match=f"{shard.name} is missing or damaged"):
        on_disk(tmp_path)(batch())
    index = tmp_path / "states" / "index.json"
    index.write_text(json.dumps({"target": "x"}))
    with pytest.raises(GraftError, match=r"index\.json is damaged"):
        on_disk(tmp_path)
