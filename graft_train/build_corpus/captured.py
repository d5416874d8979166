"""The target's predictions from states that another stage has captured: lm_head alone instead of the whole target."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_train.build_corpus.counts import Pairs
from graft_train.build_corpus.pairs import CHUNK, Counted, weigh
from graft_train.config import Config
from graft_train.data.samples import Sample, read_samples
from graft_train.data.target import target_path
from graft_train.distill.batches import to_tensors, with_room
from graft_train.distill.shards import Place, Shards, widths_of
from graft_train.distill.state_source import INDEX, hash_of, places_of, read_index, states_directory
from graft_train.processes import say
from graft_train.stage import fingerprint_of


class CapturedStates:
    """Final states by sample, read when they are asked for.

    Args:
        places: shard, start and end of each sample's states, by its tokens.
        lm_head_VH: the target's.
    """

    def __init__(self, shards: Shards, places: dict[bytes, Place], lm_head_VH: Tensor) -> None:
        self.shards = shards
        self.places = places
        self.lm_head_VH = lm_head_VH

    def holds(self, sample: Sample) -> bool:
        """Whether every token's state is there: a sample that distillation cut is not held."""
        return _key(sample.ids) in self.places

    @torch.inference_mode()
    def pairs(self, samples: list[Counted], k: int) -> Iterator[Pairs]:
        """What `predicted_pairs` yields, by sample; all of them must be held."""
        for one in samples:
            tokens_S, counted_S = torch.tensor(one.sample.ids), torch.from_numpy(one.counted_S)
            final_MH = self._final(one.sample)[counted_S].to(self.lm_head_VH)
            for tokens_M, final_CH in zip(tokens_S[counted_S].split(CHUNK), final_MH.split(CHUNK), strict=True):
                yield weigh(tokens_M.to(final_CH.device), final_CH @ self.lm_head_VH.T, k)

    def _final(self, sample: Sample) -> Tensor:
        return self.shards.read(self.places[_key(sample.ids)], len(self.lm_head_VH), ("final",))["final"]


def find_captured(config: Config, model: Any) -> CapturedStates | None:
    """The states of this run's samples and target in its dtype, if they are there; says why if they do not fit."""
    directory = states_directory(config.run_dir)
    if not (directory / INDEX).is_file():
        return None
    samples = read_samples(Path(config.run_dir) / "data" / "samples.jsonl", "train")
    samples = with_room(samples, config.head.max_length)
    cut = to_tensors(samples, config.head.max_length, model.config.get_text_config().vocab_size)
    wanted = {
        "target": fingerprint_of(target_path(config.target)),
        "samples": hash_of(cut),
        "dtype": str(model.dtype).removeprefix("torch."),
        "top_k": None,
    }
    index = read_index(directory)
    differing = [name for name, value in wanted.items() if index.get(name) != value]
    try:
        found = [] if differing else places_of(index, [len(one.tokens_S) for one in cut])
        aux_layers = len(index["aux_layer_ids"])
    except (ValueError, LookupError, TypeError) as error:
        raise GraftError(f"{directory / INDEX} is damaged ({error}); delete {directory}") from error
    if differing:
        say(f"build_corpus: the states in {directory} are of other {', '.join(differing)}: the target runs instead")
        return None
    places = {
        _key(sample.ids): place
        for sample, one, place in zip(samples, cut, found, strict=True)
        if len(one.tokens_S) == len(sample.ids)
    }
    say(f"build_corpus: {len(places):,} of {len(cut):,} samples are read from {directory}, the target runs for others")
    lm_head_VH = model.get_output_embeddings().weight.detach()
    shards = Shards(directory, found, model.dtype, widths_of(lm_head_VH.shape[1], aux_layers, None))
    return CapturedStates(shards, places, lm_head_VH)


def _key(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype=np.int64).tobytes()
