"""A head's files as engines load them: in the bundle, and where it is pushed while training goes on."""

from collections.abc import Callable
from pathlib import Path

from graft_inference.heads.checkpoint import Verifier
from graft_inference.heads.families import Head, save_any_head
from graft_train.config import Config
from graft_train.data.target import target_path, whole_config


def head_writer(config: Config) -> Callable[[Head, Path], None]:
    """What writes a head of this run into a directory: in its target's dtype, and with its target's name.

    SGLang computes a head in the head's own dtype, which must be the target's. A target whose checkpoint does not say
    its dtype leaves the head's.
    """
    path = target_path(config)
    whole = whole_config(path)
    dtype = whole.dtype or whole.get_text_config().dtype
    name = config.target.name_or_path or str(path)
    place = Path(name).expanduser()
    verifier = Verifier(str(place.resolve()) if place.exists() else name, tuple(whole.architectures or ()))

    def write(head: Head, directory: Path) -> None:
        save_any_head(head if dtype is None else head.to(dtype), directory, verifier)

    return write
