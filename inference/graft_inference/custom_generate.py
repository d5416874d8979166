"""`target.generate(ids, custom_generate=BUNDLE, trust_remote_code=True)`: Graft inside transformers.

Export copies this module into the bundle as `custom_generate/generate.py`, with the modules that it imports
beside it, so graft_inference need not be installed. transformers runs that copy from a cache that holds code
only, hence the two constants: they lead back to the bundle.
"""

import hashlib
import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .bundle import Bundle, load_bundle, resolve
from .engine import GraftEngine
from .errors import GraftError
from .policy.fallback import Fallbacks
from .preparation import Prepared, prepare
from .request import Request

# Written by export: the bundle's absolute path or Hub id, and the SHA-256 of its model.safetensors.
BUNDLE = ""
WEIGHTS_SHA256 = ""

# Beside what a GenerationConfig holds. Other arguments of `generate` change what the model computes.
ACCEPTED = {"input_ids", "attention_mask", "logits_processor", "stopping_criteria"}

_bundles: WeakKeyDictionary[nn.Module, tuple[tuple[str, str | None], Any, Bundle]] = WeakKeyDictionary()
"""Of each model: where its bundle lies, the tokenizer that it was checked with, if any, and the bundle."""
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""A model's attention is ours while it serves a request, so that those of several threads take turns."""
_fallbacks: WeakKeyDictionary[nn.Module, Fallbacks] = WeakKeyDictionary()


@torch.no_grad()
def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: Any,
    draft: str | Path | None = None,
    method: str = "graft",
    streamer: BaseStreamer | None = None,
    tokenizer: Any | None = None,
    **kwargs: Any,
) -> Tensor:
    """Continues a prompt, or a batch of them, exactly as `model.generate` would, only faster.

    transformers prepares the request: lengths, special tokens, logits processors and stopping criteria are
    those of a plain `generate`, and so is the padding of a batch, on the left. Sampling is reproducible under
    `torch.manual_seed`, but other draws than those of a plain `generate` come out (of the same distribution; the
    same ones for every method).

    Args:
        draft: where the bundle is now, if it was moved after its export.
        method: one of `policy.METHODS`.
        streamer: gets the prompt, then every token as it is accepted; not of a batch.
        tokenizer: if given, checked to be the one the bundle was made for. Stop strings need it, wherever they stand.
        kwargs: as for `model.generate`; and `revision`, of the bundle, where it is on the Hub.

    Returns:
        Prompts and new tokens, [B, prompt + new] int64, padded on the right after the end of a sequence.

    Raises:
        GraftError: a setting that would change the output and is not supported, or a bundle that does not
            belong to this code or this model. The model is left as it was.
    """
    revision = kwargs.pop("revision", None)
    prepared = _prepared(model, inputs, generation_config, tokenizer, kwargs)
    config = prepared.config
    request = Request(
        prepared=True,
        # Without an end of sequence a plain `generate` fills stopped sequences with what comes next.
        pad_token_id=config.pad_token_id or 0,
        # The temperature itself is one of the processors.
        temperature=float(config.do_sample),
        method=method,
        seed=int(torch.randint(2**62, ())) if config.do_sample else None,
        logits_processor=prepared.processors,
        stopping_criteria=prepared.criteria,
        tokenizer=tokenizer,
        streamer=streamer,
    )
    with _locks.setdefault(model, threading.RLock()):
        check = model not in _bundles
        bundle = _load(model, str(draft or BUNDLE), revision, tokenizer)
        # Graphs would have to be captured for every request, as the model is given back after each.
        engine = GraftEngine.from_bundle(bundle, model, packed=False, check=check, captured=False)
        engine.fallbacks = _fallbacks.setdefault(model, {})
        try:
            return engine.run(request, prepared.input_ids, prepared.attention_mask).sequences
        finally:
            engine.target.release()


def _prepared(
    model: Any, inputs: Any, generation_config: GenerationConfig | None, tokenizer: Any | None, kwargs: dict[str, Any]
) -> Prepared:
    """The request as a plain `generate` prepares it. Raises GraftError for what would change the output."""
    known = ACCEPTED | GenerationConfig().to_dict().keys()
    unsupported = sorted(name for name, value in kwargs.items() if value is not None and name not in known)
    if unsupported:
        raise GraftError(f"custom_generate does not support {', '.join(unsupported)}: leave them out")
    criteria = kwargs.pop("stopping_criteria", None) or ()
    given = kwargs.get("input_ids") if inputs is None else inputs
    if given is not None and not (isinstance(given, Tensor) and given.dim() == 2 and given.numel()):
        raise GraftError(
            "a plain generate takes a tensor of token ids that is not empty, [prompts, length]; and what a tokenizer "
            "returns by name: pass **inputs"
        )
    prepared = prepare(model, {"inputs": inputs, **kwargs}, generation_config, tokenizer, criteria)
    if not bool(prepared.attention_mask[:, -1].all()):
        raise GraftError(
            "attention_mask (or a pad token at the end of a prompt) hides a prompt's last token, from which it is "
            "continued: pad on the left (padding_side='left'), or pass attention_mask=torch.ones_like(input_ids)"
        )
    config = prepared.config
    of_prompt = config.encoder_repetition_penalty not in (None, 1.0) or config.encoder_no_repeat_ngram_size
    if len(prepared.input_ids) > 1 and of_prompt:
        raise GraftError("encoder_repetition_penalty and encoder_no_repeat_ngram_size: pass prompts one by one")
    return prepared


def _load(model: Any, location: str, revision: str | None, tokenizer: Any | None) -> Bundle:
    """Reads a bundle once per model and tokenizer."""
    key = (location, revision)
    known, checked_with, bundle = _bundles.get(model, (None, None, None))
    if bundle is None or known != key or (tokenizer is not None and tokenizer is not checked_with):
        if not location:
            raise GraftError("this copy of the code belongs to no bundle: pass draft=PATH")
        try:
            directory = resolve(location, revision)
        except GraftError as error:
            raise GraftError(f"{error}; if the bundle was moved, pass draft=PATH") from error
        # Building the head draws random weights before it reads the real ones: keep the request's seed.
        with torch.random.fork_rng(devices=[]):
            bundle = load_bundle(directory, model.config.get_text_config(), tokenizer)
        _check_weights(directory / "model.safetensors")
        _bundles[model] = (key, tokenizer, bundle)
    return bundle


def _check_weights(path: Path) -> None:
    if not WEIGHTS_SHA256:
        return
    found = None  # an official head's weights have another name, and are none that a bundle was exported with
    if path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise GraftError(
            f"{path} holds other weights than this code was exported with: use the custom_generate of that "
            "bundle, or pass draft=PATH with the bundle this code came from"
        )
