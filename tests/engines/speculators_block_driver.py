"""Block heads as speculators makes, saves and computes them: `python speculators_block_driver.py JOB.json RESULT.json`.

The job:
    target      directory of the target; its embeddings, lm_head and number of layers are read
    states      a safetensors file: input_ids [T], document_ids [T], position_ids [T], loss_mask [T], which is 1 at the
                anchors, and hidden_states [T, aux layers * H]
    heads       by name: kind (dflash or dspark), layers, full (those with full attention), window, settings (of
                `from_training_args`); may have arch (of the layers' configuration) and token_ids (the draft vocabulary)
    written     by name: the directory of a head that others wrote, which is read in place of `heads`

The result: by name of a head its directory, which has, besides what was saved, `logits.safetensors` with the logits of
every slot, [anchors, block, draft vocabulary].
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModelConfig
from speculators.models.dflash import core as dflash
from speculators.models.dspark import core as dspark
from speculators.train.cli import create_transformer_layer_config

KINDS = {"dflash": (dflash, dflash.DFlashDraftModel), "dspark": (dspark, dspark.DSparkDraftModel)}


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    states = load_file(job["states"])
    result = {}
    for name, head in job.get("heads", {}).items():
        directory = Path(result_path).parent / name
        model = make_head(job["target"], head)
        model.save_pretrained(directory)
        save_file({"logits": logits_of(model, head["kind"], states)}, directory / "logits.safetensors")
        result[name] = str(directory)
    for name, directory in job.get("written", {}).items():
        model, kind = read_head(directory)
        save_file({"logits": logits_of(model, kind, states)}, Path(directory) / "logits.safetensors")
        result[name] = directory
    Path(result_path).write_text(json.dumps(result))


def make_head(target: str, head: dict[str, Any]) -> Any:
    """As its trainer begins, but for weights that are far from nothing."""
    torch.manual_seed(0)
    arch = head.get("arch", "qwen3")
    layer = create_transformer_layer_config(target, head["layers"], arch, None, head["window"], head["full"])
    t2d, d2t, size = None, None, layer.vocab_size
    if "token_ids" in head:
        kept, size = torch.tensor(head["token_ids"]), len(head["token_ids"])
        d2t, t2d = kept - torch.arange(size), torch.isin(torch.arange(layer.vocab_size), kept)
    settings = head["settings"] | {"draft_vocab_size": size, "verifier_name_or_path": target}
    model = KINDS[head["kind"]][1].from_training_args(layer, t2d, d2t, draft_attn_impl="eager", **settings).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith(("embed_tokens", "lm_head", "verifier")):
            torch.nn.init.normal_(parameter.data, mean=float("norm" in name), std=0.2)
    return model


def read_head(directory: str) -> tuple[Any, str]:
    """A head as its own `from_pretrained` reads it, and its kind."""
    config = SpeculatorModelConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    kind = config.speculators_model_type
    model = KINDS[kind][1].from_pretrained(directory, config=config).eval()
    # 0.9.0 knows by NaN what is to be loaded from the target, but transformers leaves whatever was in the memory.
    saved = load_file(Path(directory) / "model.safetensors")
    for name in ("embed_tokens", "lm_head"):
        if f"{name}.weight" not in saved:
            torch.nn.init.constant_(getattr(model, name).weight, torch.nan)
    model.load_verifier_weights()
    return model, kind


@torch.no_grad()
def logits_of(model: Any, kind: str, states: dict[str, torch.Tensor]) -> torch.Tensor:
    """What its own forward computes a loss from, seen where that begins."""
    seen, module = [], KINDS[kind][0]
    module.compute_metrics = lambda logits, *arguments, **named: (seen.append(logits), {})
    inputs = {name: tensor[None] for name, tensor in states.items()}
    inputs["verifier_last_hidden_states"] = torch.zeros(1, inputs["input_ids"].shape[1], model.hidden_size)
    anchors = int(states["loss_mask"].sum())
    model(**inputs, max_anchors=anchors, loss_config={})
    return seen[0].unflatten(1, (anchors, model.block_size))[0].contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
