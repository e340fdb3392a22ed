"""`scripts/fuzz`: many cases of ill-meaning initiators, on every core."""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

from rich.progress import Progress

from tests.iscsi.fuzz import CaseError, campaign

_HELPING = 500  # cases of one target


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Bad PDUs and bad logins against the iSCSI target."
    )
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="how many (10000)")
    parser.add_argument("--long", action="store_const", const=100_000, dest="cases", help="100,000 cases")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="K", help="the first case (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes (one per core)")
    return parser.parse_args()


def helping(first: int, count: int) -> tuple[int, dict[int, int], int]:
    """(cases, answers by opcode, peak memory in bytes)."""
    gc.collect()  # the target of the helping before
    fuzzer = campaign(first, count)
    return count, fuzzer.answers, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    options = parse()
    began_s = time.monotonic()
    answers: Counter[int] = Counter()
    done = peak_bytes = 0
    end = options.first + options.cases
    helpings = [(first, min(_HELPING, end - first)) for first in range(options.first, end, _HELPING)]
    with ProcessPoolExecutor(options.jobs) as pool, Progress() as progress:
        bar = progress.add_task("cases", total=options.cases)
        futures = [pool.submit(helping, *each) for each in helpings]
        try:
            for future in as_completed(futures):
                count, counted, memory_bytes = future.result()
                done += count
                answers.update(counted)
                peak_bytes = max(peak_bytes, memory_bytes)
                progress.advance(bar, count)
        except CaseError as error:
            pool.shutdown(cancel_futures=True)
            print(error, file=sys.stderr)
            return 1
    told = ", ".join(f"{opcode:#04x} {count}" for opcode, count in sorted(answers.items()))
    print(f"{done} cases in {time.monotonic() - began_s:.0f} s, none harmful; peak memory {peak_bytes >> 20} MiB")
    print(f"answers by opcode: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
