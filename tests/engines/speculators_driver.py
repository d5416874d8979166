"""Converts a bundle's head to a model of speculators and runs it: `python speculators_driver.py JOB.json RESULT.json`.

The job: `target`, `head` (directories), `aux_layer_ids` (as speculators counts them), `norm_before_residual`, `tokens`
(each behind the one whose states are read) and `states` (of the target, for each).
The result: `logits` of the first draft step, for each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from speculators.models.eagle3.core import Eagle3DraftModel


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    logits = run(job, Path(result_path).parent / "converted")
    Path(result_path).write_text(json.dumps({"logits": logits}))


@torch.no_grad()
def run(job: dict[str, Any], converted: Path) -> list[list[float]]:
    Eagle3Converter().convert(
        job["head"],
        converted,
        base_model=job["target"],
        validate=False,
        norm_before_residual=job["norm_before_residual"],
        eagle_aux_hidden_state_layer_ids=job["aux_layer_ids"],
    )
    model = Eagle3DraftModel.from_pretrained(converted).float().eval()
    # The head's embeddings are the target's. 0.9.0 knows by NaN that they are to be loaded, but transformers leaves
    # whatever was in the memory of a tensor that the checkpoint lacks.
    torch.nn.init.constant_(model.embed_tokens.weight, torch.nan)
    model.load_verifier_weights()
    found: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output))
    tokens_BS = torch.tensor([job["tokens"]])
    model(torch.tensor([job["states"]]), tokens_BS, torch.zeros_like(tokens_BS), ttt_steps=1)
    return found[0][0].tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
