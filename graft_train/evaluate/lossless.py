"""The check that every method writes what the target alone would."""

import gc
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from graft_inference import METHODS, GraftEngine, GraftError
from graft_inference.bundle import load_target_model
from graft_inference.request import ends_of
from graft_train.config import Config
from graft_train.config.target import TargetConfig
from graft_train.data.samples import Sample
from graft_train.data.target import resolve_device, target_path
from graft_train.evaluate.timing import new_engine
from graft_train.processes import is_main


def losslessness(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Greedy fp32 output of every method against transformers' own `generate` on an untouched model.

    Raises:
        GraftError: in fp32 the target does not fit the device.
    """
    if not config.evaluation.check_lossless:
        return {"lossless": dict.fromkeys(METHODS), "divergences": {}}
    try:
        return _compared(config, samples)
    except torch.OutOfMemoryError as error:
        raise GraftError(
            f"there is no memory to check losslessness with the target in fp32 ({str(error).partition('. ')[0]}): set "
            "evaluation.check_lossless=false, or target.device_map=auto; the timed runs are kept"
        ) from error


def _compared(config: Config, samples: list[Sample]) -> dict[str, Any]:
    tokens = config.evaluation.max_new_tokens
    torch.set_float32_matmul_precision("highest")  # TensorFloat-32 parts passes of other widths on near ties
    references = _references(config.target, samples, tokens)
    gc.collect()
    # Without falling back: each method's own plan is to be checked, whether it pays in fp32 or not.
    engine = new_engine(config, "float32", fallback=False)
    divergences: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    checked = zip(samples, references, strict=True)
    for sample, expected in tqdm(checked, "evaluate: losslessness", len(samples), unit="prompt", disable=not is_main()):
        for name in METHODS:
            found = engine.generate(torch.tensor([sample.prompt_ids]), tokens, method=name).sequences[0].cpu()
            if found.tolist() != expected.tolist():
                divergences[name].append(_divergence(engine, sample.id, expected, found))
    return {
        "lossless": {name: not found for name, found in divergences.items()},
        "divergences": {name: found for name, found in divergences.items() if found},
    }


def _references(settings: TargetConfig, samples: list[Sample], tokens: int) -> list[torch.Tensor]:
    """Greedy fp32 continuations by transformers alone, with their prompts."""
    model, tokenizer = load_target_model(
        target_path(settings), str(resolve_device(settings.device)), "float32", settings.device_map, settings.tp_plan
    )
    # generate fills what a call leaves unsaid from the model's own settings: penalties, for instance.
    ends = sorted(ends_of(model.generation_config.eos_token_id, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=0)
    found = []
    for sample in tqdm(samples, "evaluate: references", unit="prompt", disable=not is_main()):
        prompt = torch.tensor([sample.prompt_ids], device=model.device)
        found.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
            )[0].cpu()
        )
    return found


@torch.inference_mode()
def _divergence(engine: GraftEngine, identity: str, expected: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Where two outputs part, and by how much the target preferred its choice there."""
    shared = min(len(expected), len(found))
    differs = (expected[:shared] != found[:shared]).nonzero()
    position = int(differs[0]) if len(differs) else shared
    with engine.target.own_attention() as model:
        top = model(expected[None, :position].to(engine.target.device)).logits[0, -1].topk(2).values
    return {"prompt": identity, "position": position, "top2_margin": float(top[0] - top[1])}
