"""`scripts/simulate --model [--long]`: each scope of the small model to its end."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from tests.sim.model.explore import Explorer
from tests.sim.model.scope import LONG, SCOPES
from tests.sim.world import Violation


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate --model", description="Every interleaving of a small group."
    )
    parser.add_argument("--long", action="store_true", help="also scopes that take long")
    parser.add_argument("--scope", help="only scopes whose names contain this")
    parser.add_argument("--exactly", action="store_true", help="… or are this")
    parser.add_argument("--whole", action="store_true", help="without reductions")
    parser.add_argument("--minutes", type=float, default=0.0, help="at most so long per scope")
    parser.add_argument("--states", type=int, default=0, help="at most so many states per scope")
    args = parser.parse_args()
    explorer, status = Explorer(), 0
    for scope in SCOPES + (LONG if args.long else []):
        if args.scope and (args.scope != scope.name if args.exactly else args.scope not in scope.name):
            continue
        try:
            wanted = replace(scope, reduced=not args.whole)
            report = explorer.explore(wanted, max_states=args.states, max_s=args.minutes * 60)
        except Violation as violation:
            print(f"{scope.name}: {violation}")
            return 1
        print(report, flush=True)
        status = status or (0 if report.exhausted else 3)
    return status


if __name__ == "__main__":
    sys.exit(main())
