"""What `make mutants` found: counts by module, and the changes that no test noticed.

cd .mutants && python tests/mutants.py
"""

import json
from collections import Counter
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

DEAD = ("killed", "timeout", "segfault")


def main() -> None:
    survivors, total = [], Counter()
    print("| module | mutants | killed | survived | share |\n|---|---:|---:|---:|---:|")
    for module in config().only_mutate:
        codes = json.loads(Path("mutants", f"{module}.meta").read_text())["exit_code_by_key"]
        states = {name: status_by_exit_code[code] for name, code in codes.items() if code is not None}
        alive = [name for name, state in states.items() if state not in DEAD]
        survivors += [(module, name) for name in alive]
        total += Counter(mutants=len(states), survived=len(alive))
        print(_row(f"`{module}`", len(states), len(alive)))
    print(_row("all", total["mutants"], total["survived"]))
    for module, name in survivors:
        print(f"\n{name}\n{get_diff_for_mutant(name, path=module)}")


def _row(name: str, mutants: int, survived: int) -> str:
    share = survived / mutants if mutants else 0.0
    return f"| {name} | {mutants} | {mutants - survived} | {survived} | {share:.1%} |"


if __name__ == "__main__":
    main()
