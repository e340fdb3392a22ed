"""Make the guest ready: ``python -m tests.lab``. `scripts/setup --debian` calls it."""

from __future__ import annotations

import sys

from tests.lab import initramfs, packages


def main() -> int:
    reason = packages.reason_against()
    if reason is None:
        try:
            packages.fetch()
            initramfs.ready()
        except packages.LabUnavailableError as error:
            reason = str(error)
    if reason is not None:
        print(f"kernel lab: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
