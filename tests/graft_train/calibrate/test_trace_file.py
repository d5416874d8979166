"""What calibration leaves and reads again: traces and tables of latencies, of which nothing else is taken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference import GraftError
from graft_train.calibrate.latency import elsewhere
from graft_train.calibrate.trace_file import read_traces
from graft_train.calibrate.traces import record_traces
from graft_train.config.policy import CalibrateConfig
from tests.graft_inference.tiny import tiny_engine, tiny_model

from .test_calibrate import LATENCY

SETTINGS = CalibrateConfig(max_new_tokens=8, topk=2, num_steps=3, num_draft_tokens=[1, 4], retrieval_depth=3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "traces.safetensors"
    engine = tiny_engine(tiny_model("llama"))
    record_traces(engine, [torch.tensor([5, 9, 5, 9]), torch.tensor([7, 3, 7])], SETTINGS).save(path, {"head": "a"})
    return path


def rewritten(stored, directory, edit, metadata='{"head": "a"}'):
    tensors = load_file(stored)
    edit(tensors)
    path = directory / "traces.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"made_of": metadata})
    return path


def test_sound_traces_are_read(stored, tmp_path):
    assert len(read_traces(rewritten(stored, tmp_path, lambda tensors: None), {"head": "a"}))


def at(name, place, value):
    """One element is another."""

    def edit(tensors):
        tensors[name].view(-1)[place] = value

    return edit


def changed(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (at("prompt_T", -1, 0), "prompt_T falls"),
        (at("prompt_T", 0, -1), "prompt_T holds numbers below 0"),
        (at("context_T", 1, 99), "context_T has gaps"),
        (at("context_T", 0, 2**40), "context_T holds numbers below 0, or too large ones"),
        (at("truth_TD", 0, -2), "truth_TD holds numbers below -1"),
        (at("confidence_TP", 0, torch.nan), "confidence_TP holds what is no probability"),
        (at("confidence_TP", 0, 1.5), "confidence_TP holds what is no probability"),
        (at("tokens_TC", 3, -1), "tokens_TC holds numbers below 0"),
        (at("parents_TC", 0, 1), "parents_TC begins with others than the root"),
        (at("parents_TC", 2, 5), "parents_TC skips a layer"),
        (at("parents_TC", 2, -1), "parents_TC skips a layer"),
        (at("logp_TC", 0, -torch.inf), "logp_TC holds what is no logarithm"),
        (at("logp_TC", 0, 5.0), "logp_TC holds what is no logarithm"),
        (at("depths_C", 0, 2), "depths_C is torch.int64"),
        (changed("depths_C", lambda part: part.half()), "depths_C is torch.float16"),
        (at("depths_C", -1, 2), "depths_C is none of a draft"),
        (at("reach_TC", 0, -0.5), "reach_TC holds what is no probability"),
        (at("matrix.logp_TR", 0, torch.nan), "matrix.logp_TR holds what is no logarithm"),
        (at("matrix.template_RL", 0, -1), "the template of matrix needs ranks|gap in a path"),
        (at("lookup.evidence_T", 0, 99), "lookup.evidence_T has an unknown kind"),
        (at("lookup.tokens_TR", 0, -2), "lookup.tokens_TR holds numbers below -1"),
        (changed("tokens_TC", lambda part: part[:, :-1]), "tokens_TC is torch.int32"),
        (changed("tokens_TC", lambda part: part.float()), "tokens_TC is torch.float32"),
        (changed("reach_TC", lambda part: part.double()), "reach_TC is torch.float64"),
        (changed("truth_TD", lambda part: part[:, :1]), "truth_TD is shorter than a draft"),
        (changed("prompt_T", lambda part: part[:0]), "it has no position"),
        (changed("confidence_TP", lambda part: part.flatten()), "must have 2 dimensions"),
        (changed("matrix.template_RL", lambda part: part[:0]), "matrix has no template"),
        (lambda tensors: tensors.pop("logp_TC"), "is not a file of traces"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "is not a file of traces"),
    ],
)
def test_what_no_recording_writes_is_refused(stored, tmp_path, edit, told):
    with pytest.raises(GraftError, match=told):
        read_traces(rewritten(stored, tmp_path, edit), {})


@pytest.mark.parametrize("metadata", ["[]", "3", "{", "[" * 100_000, '{"head": "b"}', '{"head": NaN}'])
def test_what_traces_were_made_of_is_read_strictly(stored, tmp_path, metadata):
    path = rewritten(stored, tmp_path, lambda tensors: None, metadata)
    with pytest.raises(GraftError, match=r"was traced with another head|cannot be read"):
        read_traces(path, {"head": "a"})


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"build_ms": "fast"}, "times must be numbers from 0"),
        ({"read_ms": -1.0}, "times must be numbers from 0"),
        ({"read_ms": 1e308}, "times must be numbers from 0"),
        ({"source_ms": {"matrix": 0.1}}, "source_ms must have matrix, lookup"),
        ({"source_ms": {"matrix": 0.1, "lookup": [1]}}, "times must be numbers from 0"),
        ({"source_ms": 3}, "no attribute 'keys'"),
    ],
)
def test_an_own_table_with_other_values_is_refused(tmp_path, own, told):
    sound = LATENCY.to_dict()
    given = {name: sound[name] for name in ("num_draft_tokens", "contexts", "verify_ms", "draft_ms")} | {
        "measured_on": {}
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    (tmp_path / "own.json").write_text(json.dumps(sound))
    assert elsewhere(tmp_path / "given.json", tmp_path / "own.json", SETTINGS)
    (tmp_path / "own.json").write_text(json.dumps(sound | own))
    with pytest.raises(GraftError, match=f"no table of latencies .*{told}"):
        elsewhere(tmp_path / "given.json", tmp_path / "own.json", SETTINGS)


@pytest.mark.parametrize("counts", [[1, 4, 10**30], [1, True, 8]])
def test_num_draft_tokens_are_counts(tmp_path, counts):
    sound = LATENCY.to_dict()
    given = {
        "num_draft_tokens": counts,
        "contexts": [16],
        "verify_ms": [[1.0, 1.0, 1.0]],
        "draft_ms": [0.0, 1.0, 1.0, 1.0],
    }
    (tmp_path / "given.json").write_text(json.dumps(given | {"measured_on": {}}))
    (tmp_path / "own.json").write_text(json.dumps(sound))
    with pytest.raises(GraftError, match="num_draft_tokens must be whole numbers that rise"):
        elsewhere(tmp_path / "given.json", tmp_path / "own.json", SETTINGS)
