import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft_inference import GraftError
from graft_inference.target.kv_cache import TreeCache
from graft_inference.target.model import Target
from graft_train.data import states as states_module
from graft_train.data.states import PackedTarget

from ...graft_inference.families import family_model


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def test_states_are_those_the_runtime_taps_whatever_stands_beside_them(monkeypatch):
    monkeypatch.setattr(states_module, "CHUNK", 3)
    tokens_S = torch.randint(31, (11,), generator=torch.Generator().manual_seed(1))
    states = PackedTarget(tiny(), (0, 3)).states(tokens_S, [7, 4])
    runtime = Target(tiny(), (0, 3))
    for start, end in ((0, 7), (7, 11)):
        with torch.no_grad():
            served = runtime.prefill(tokens_S[start:end], TreeCache(4, 16))
        torch.testing.assert_close(states.aux_SE[start:end], served.aux_NE, atol=1e-5, rtol=1e-4)
        assert states.choice_S[end - 1] == served.logits_NV[-1].argmax()


def test_final_state_times_lm_head_gives_the_logits():
    model = tiny()
    tokens_S = torch.randint(31, (9,))
    expected_SV = model(tokens_S[None]).logits[0].detach()
    target = PackedTarget(model, (1,))
    logits_SV = target.states(tokens_S, [9]).final_SH @ target.lm_head_VH.T
    torch.testing.assert_close(logits_SV, expected_SV, atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(GraftError, match=r"aux_layer_ids=\[1, 4\].*0\.\.3"):
        PackedTarget(tiny(), (1, 4))


def test_a_target_that_changes_its_logits_is_refused():
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 3
            return out

    model = Capped(tiny().config).eval()
    with pytest.raises(GraftError, match="Capped changes its logits"):
        PackedTarget(model, (1,))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_head_reads_the_rows_of_the_targets_embeddings_in_training_and_when_it_is_served(family):
    """Gemma multiplies them by the root of their width for its own layers. Nobody does so for heads."""
    capped = {"final_logit_softcapping": None} if family == "gemma2" else {}
    tokens_BS = torch.randint(31, (1, 7))
    model = family_model(family, **capped)
    rows_BSH = model.get_input_embeddings().weight[tokens_BS]
    torch.testing.assert_close(PackedTarget(model, (0, 3)).embed(tokens_BS), rows_BSH)
    torch.testing.assert_close(Target(model, (0, 3)).embed(tokens_BS), rows_BSH)
