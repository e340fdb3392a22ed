"""libiscsi's test suite, iscsi-test-cu: run it, and say of every test what became of it.

Its verbose log is read (libiscsi 1.19, CUnit 2.1): `Suite: NAME`, `  Test: NAME ...`, what the test says, then
`passed` or `FAILED` at the start of a line, or behind the dots when the test says nothing. A skip is a test that
passes with `[SKIPPED]` in its words, at whatever step of it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.patience import patient

TIMEOUT_S = patient(900.0)  # of a run that takes 20 s on a quiet machine
RECORD = Path(__file__).with_name("expected.txt")
_TEST = re.compile(r"  Test: (\S+) \.\.\.(passed|FAILED)?(.*)")


@dataclass(frozen=True)
class Result:
    """``verdict``: passed, skipped, failed, or ended (the suite ended in its middle). ``words``: why, in its own."""

    name: str  # SUITE.TEST
    verdict: str
    words: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.verdict}{': ' if self.words else ''}{self.words}"


def run(url: str, second_url: str | None = None, *, test: str = "ALL", sanitize: bool = True) -> list[Result]:
    """All tests against one LUN, whose data they destroy. Skips without iscsi-test-cu."""
    if shutil.which("iscsi-test-cu") is None:
        pytest.skip("iscsi-test-cu is not installed (libiscsi-bin)")
    argv = ["iscsi-test-cu", "--dataloss", "--Verbose-scsi", f"--test={test}"]
    argv += [*(["--allow-sanitize"] if sanitize else []), url, *([second_url] if second_url else [])]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            output = process.communicate(timeout=TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    results = parse(output)
    assert results, f"iscsi-test-cu ran nothing: {output[-2000:]}"
    return results


def parse(output: str) -> list[Result]:
    results = []
    suite, name, words = "", "", [""]
    for line in output.splitlines():
        began = _TEST.match(line)
        if line.startswith("Suite: "):
            suite = line.split()[1]
        elif began:
            name, words = began[1], [began[3]]
            if began[2]:
                results.append(_result(suite, name, began[2], words))
                name = ""
        elif name and line.startswith(("passed", "FAILED")):
            results.append(_result(suite, name, line[:6], words))
            name = ""
        elif name:
            words.append(line.strip())
    if name:
        results.append(Result(f"{suite}.{name}", "ended", " / ".join(words[-3:])))
    return results


def _result(suite: str, name: str, verdict: str, words: list[str]) -> Result:
    def first(mark: str) -> str:
        return next((line[line.index(mark) + len(mark) :].strip() for line in words if mark in line), "")

    if verdict == "FAILED":
        return Result(f"{suite}.{name}", "failed", first("[FAILED]") or words[-1])
    skipped = first("[SKIPPED]")
    return Result(f"{suite}.{name}", "skipped" if skipped else "passed", skipped)


def recorded() -> dict[str, str]:
    """What each test is expected to come to, by name: passed, or skipped (the reason stands behind it)."""
    lines = [line.split("#")[0].split() for line in RECORD.read_text().splitlines()]
    return {words[0]: words[1] for words in lines if words}


def deviations(results: list[Result], expected: dict[str, str]) -> str:
    """Every test that did not come to what is expected of it, or did not run, a line each; empty when all is well."""
    found = [
        f"{result} (expected: {expected.get(result.name, 'no such test')})"
        for result in results
        if result.verdict != expected.get(result.name)
    ]
    ran = {result.name for result in results}
    return "\n".join(found + [f"{name} did not run" for name in expected if name not in ran])
