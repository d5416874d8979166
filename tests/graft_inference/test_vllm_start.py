"""What Graft's worker refuses when vLLM starts it; vLLM is stubbed, `tests/engines` has the real one."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy.optimize import isotonic_regression

from graft_inference import GraftError

MODULES = (
    "vllm", "vllm.config", "vllm.platforms", "vllm.tokenizers", "vllm.v1", "vllm.v1.spec_decode",
    "vllm.v1.spec_decode.eagle", "vllm.v1.worker", "vllm.v1.worker.cpu_worker",
)  # fmt: skip


class EagleProposer:
    """As far as it is looked at."""

    def propose(self, num_speculative_tokens, next_token_ids, sampling_metadata, common_attn_metadata):
        """Drafts."""

    def _sample_draft_tokens(self):
        """Samples."""


@pytest.fixture
def integration(monkeypatch):
    """`integrations/vllm.py` beside a vLLM of the version that it was written for."""
    stubs = {name: ModuleType(name) for name in MODULES}
    stubs["vllm"].__version__ = "0.32.0"
    stubs["vllm"].LLM = stubs["vllm"].SamplingParams = object
    stubs["vllm.config"].VllmConfig = object
    stubs["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    stubs["vllm.tokenizers"].cached_tokenizer_from_config = None
    stubs["vllm.v1.spec_decode.eagle"].EagleProposer = EagleProposer
    stubs["vllm.v1.worker.cpu_worker"].CPUWorker = object
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    name = "graft_inference.integrations.vllm"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def worker(**changes):
    """Started as docs/vllm.md says, but for the changes."""
    speculative = {"method": "eagle3", "disable_padded_drafter_batch": True}
    parallel = {"data_parallel_size": 1, "pipeline_parallel_size": 1}
    own = {name: value for name, value in changes.items() if name not in speculative and name not in parallel}
    speculative |= {name: changes[name] for name in speculative.keys() & changes}
    parallel |= {name: changes[name] for name in parallel.keys() & changes}
    config = SimpleNamespace(speculative_config=SimpleNamespace(**speculative))
    settings = {"vllm_config": config, "parallel_config": SimpleNamespace(**parallel), "use_v2_model_runner": False}
    return SimpleNamespace(**settings | own)


def test_a_start_as_the_docs_say_is_taken(integration):
    integration._check_start(worker())


@pytest.mark.parametrize("version", ["0.33.0", "0.31.2", "0.320.1", "1.32.0"])
def test_another_version_is_refused(integration, version):
    integration.vllm.__version__ = version
    with pytest.raises(GraftError, match=rf"this is vLLM {version}, and Graft runs in 0\.32\.x: install that"):
        integration._check_start(worker())
    with pytest.raises(GraftError, match=rf"this is vLLM {version}"):
        integration.GraftRetriever(SimpleNamespace(additional_config={"graft_bundle": "somewhere"}))


def test_a_retriever_without_a_bundle_says_where_it_is_told(integration):
    with pytest.raises(GraftError, match=r'the bundle is missing: --additional-config .*"graft_bundle"'):
        integration.GraftRetriever(SimpleNamespace(additional_config={}))


@pytest.mark.parametrize("lacks", ["propose", "_sample_draft_tokens"])
def test_another_drafter_in_the_same_version_is_refused(integration, monkeypatch, lacks):
    if lacks == "propose":
        monkeypatch.setattr(EagleProposer, "propose", lambda self, next_token_ids: None)
    else:
        monkeypatch.delattr(EagleProposer, "_sample_draft_tokens")
    with pytest.raises(GraftError, match=r"EagleProposer of this vLLM 0\.32\.0 is another one"):
        integration._check_start(worker())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ngram"}, "method must be eagle3, not ngram"),
        ({"vllm_config": SimpleNamespace(speculative_config=None)}, "method must be eagle3, not None"),
        ({"disable_padded_drafter_batch": False}, "set disable_padded_drafter_batch to true"),
        ({"use_v2_model_runner": True}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"data_parallel_size": 2}, "without data and pipeline parallelism"),
        ({"pipeline_parallel_size": 2}, "without data and pipeline parallelism"),
    ],
)
def test_a_start_with_other_settings_is_refused(integration, changes, message):
    with pytest.raises(GraftError, match=message):
        integration._check_start(worker(**changes))


@pytest.fixture
def latency(integration):
    """`integrations/vllm_latency.py` beside the same vLLM."""
    name = "graft_inference.integrations.vllm_latency"
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_measured_times_that_fall_are_made_to_rise_as_little_as_can_be(latency):
    assert latency.rising([0.0, 1.0, 3.0, 2.0, 4.0]) == [0.0, 1.0, 2.5, 2.5, 4.0]
    for times in torch.randn((50, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist():
        assert latency.rising(times) == pytest.approx(isotonic_regression(times).x.tolist())


def test_how_much_rounds_of_the_same_plan_varied(latency):
    """A plan that takes longer than another does not vary for that."""
    assert latency.variation([[1.0] * 5, [2.0] * 5]) == 0
    assert latency.variation([[0.8, 1.0, 1.2], [1.6, 2.0, 2.4]]) == pytest.approx(0.3)
    assert latency.variation([[0.9, 0.9, 1.0, 1.1, 1.1]]) == pytest.approx(0.2)
