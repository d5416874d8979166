"""A package's modules in one folder: what transformers copies of a repository's code lies side by side."""

import re
from pathlib import Path

RELATIVE = re.compile(r"^from (\.+)([\w.]+) import", re.MULTILINE)


def flat_modules(package: Path, entry: str) -> dict[str, str]:
    """Source of a module and of all that it imports of its package, by flat name: `decode.round` is `decode_round`.

    Args:
        entry: dotted name of the module within the package; it keeps its own name.
    """
    found: dict[str, str] = {}
    waiting = [tuple(entry.split("."))]
    while waiting:
        module = waiting.pop()
        if "_".join(module) in found:
            continue
        folder = module[:-1]
        text = package.joinpath(*folder, f"{module[-1]}.py").read_text(encoding="utf-8")
        waiting += [_target(folder, match) for match in RELATIVE.finditer(text)]
        found["_".join(module)] = RELATIVE.sub(
            lambda match, folder=folder: f"from .{'_'.join(_target(folder, match))} import",  # type: ignore[misc]
            text,
        )
    return found


def _target(folder: tuple[str, ...], match: re.Match[str]) -> tuple[str, ...]:
    """The module that a relative import in this folder names, from the package on."""
    above = len(match[1]) - 1
    return (*folder[: len(folder) - above], *match[2].split("."))
