"""Exported EAGLE-3 heads in speculators: converted, its model computes our head's logits."""

import pytest
import torch

from graft_inference.heads.eagle3.checkpoint import load_head
from graft_train.data.states import PackedTarget
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.unroll import unroll

from .environments import HERE, run_driver
from .pair import PROMPTS

pytestmark = pytest.mark.engines("speculators")


# Its converter takes heads of three layers only.
@pytest.mark.parametrize("name", ["eagle3", "eagle3 with norm_before_residual"])
def test_speculators_computes_the_logits_of_our_head(tmp_path, target, bundle_of, name):
    directory, model = target
    head = load_head(bundle_of(name))
    tokens_S = PROMPTS.flatten()[:40]
    packed = PackedTarget(model, head.config.aux_layer_ids)
    states = packed.states(tokens_S, [40])
    embedding_SH = packed.embed(tokens_S)
    packed.release()
    layout = make_layout([40], torch.ones(40, dtype=torch.bool))
    with torch.no_grad():
        ours_CD = head.logits(unroll(head, embedding_SH, states.aux_SE, layout, 1)[0])
    job = {
        "target": str(directory),
        "head": str(bundle_of(name)),
        "norm_before_residual": head.config.norm_before_residual,
    }
    job |= {"aux_layer_ids": [layer + 1 for layer in head.config.aux_layer_ids], "tokens": tokens_S[1:].tolist()}
    job |= {"states": states.aux_SE[:-1].tolist()}
    found = run_driver("speculators", HERE / "speculators_driver.py", tmp_path, job)
    theirs_SD = torch.tensor(found["logits"])
    # A column's draft reads the token behind it, which the last one does not have.
    read = layout.columns_C < 39
    assert int(read.sum()) > 30
    torch.testing.assert_close(theirs_SD[layout.columns_C[read]], ours_CD[read], atol=1e-4, rtol=1e-4)
