"""Judging a change of a repository by hidden tests, which pytest runs beside the changed code.

Here tests and program share a process, so no run is believed alone: the program could read the tests, patch pytest or
write its report. A test has passed when it passes as it is, and when in each of several twins (twins.py), with one
comparison altered in about half of the tests, it fails or passes as it should. Which half is drawn from all that was
handed in. Who writes the program cannot know it, and the program can tell an altered literal only by its right answer.
For a test whose answer it does not know, it must guess a pattern over all twins. Tests that compare with no literal are
weaker: there a twin can be told by its look, and the verdict is flagged `weak_twins`.

Of an agent's files count plain ones outside of tests that steer neither Python nor pytest (repo_files.py). The tests
lie outside of the repository, whose root is the working folder, with the conftest.py files that the base has above
them. They may import from it, from its `src`, from each other and from the system's packages.
"""

import hashlib
import json
import marshal
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cispo.sandboxes import repo_launcher
from cispo.sandboxes.attempts import END_STATUS, RETRY_PAUSES_S, FailedAttemptsError, run_patiently, unknown_verdict
from cispo.sandboxes.repo_files import allowed_files, conftests_of, is_plain_path, pytest_archive
from cispo.sandboxes.twins import TURNED_ROUND, Edit, apply, edits_of, function_of
from cispo.sandboxes.types import ExecResult, ExecStatus, Limits, Sandbox, TestStatus, Verdict, VerdictStatus

LAUNCHER_SOURCE = Path(repo_launcher.__file__).read_text(encoding="utf-8")
# A program that knows all answers but one must guess one pattern in 254, and each twin of one that does is a run.
TWINS = 8
PHASES = ("setup", "call", "teardown")


def judge_repo(
    sandbox: Sandbox,
    base_files: Mapping[str, str],
    agent_files: Mapping[str, str],
    hidden_tests: Mapping[str, str],
    must_pass: Sequence[str],
    limits: Limits,
    *,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
) -> Verdict:
    """Lay the agent's files over the base, and run the tests `must_pass` (ids of pytest, from the hidden tests' root).

    All files are texts by their relative path. The limits hold for each run of pytest; there are nine where any
    test passes, fewer where none can any more. A sandbox that fails is tried again after each of the pauses; if it
    fails to the last the status is sandbox_error. Raises ValueError when the base or the tests are at fault: a path
    that leaves its folder, a test that is not there or compares nothing.
    """
    _check(base_files, hidden_tests, must_pass)
    conftests = conftests_of(base_files, hidden_tests)
    allowed, dropped = allowed_files(base_files, agent_files, hidden_tests)
    trees = (base_files, allowed)
    chance = _chance({**base_files, **allowed}, hidden_tests, must_pass)
    choices = {"::".join(function_of(test_id)): edits_of(hidden_tests, test_id, chance) for test_id in must_pass}
    plan = _plan_twins(hidden_tests, choices, chance)
    flags = ["dropped_files"] if dropped else []
    flags += ["weak_twins"] if any(edit.rank == TURNED_ROUND for edits in choices.values() for edit in edits) else []
    runs: list[_Run] = []
    altered: list[frozenset[str]] = []
    try:
        for tests, functions in [(hidden_tests, frozenset[str]()), *plan]:
            runs.append(_run(sandbox, trees, {**conftests, **tests}, must_pass, limits, pauses_s))
            altered.append(functions)
            if all(_status(runs, altered, test_id) is not TestStatus.PASSED for test_id in must_pass):
                break  # no further run can change that
    except FailedAttemptsError as error:
        return unknown_verdict(error, len(must_pass))
    statuses = [_status(runs, altered, test_id) for test_id in must_pass]
    is_ok = all(run.is_as_planned(must_pass, functions) for run, functions in zip(runs, altered, strict=True))
    if not is_ok and all(status is TestStatus.PASSED for status in statuses):
        # Some run reported more than it was asked for, or an end that does not fit.
        statuses = [TestStatus.WRONG_ANSWER] * len(must_pass)
    if statuses.count(TestStatus.PASSED) < sum(map(runs[0].has_passed, must_pass)):
        flags.append("twin_disagrees")
    first_failed = next((status for status in statuses if status is not TestStatus.PASSED), None)
    return Verdict(
        status=VerdictStatus.OK if first_failed is None else VerdictStatus(first_failed.value),
        passed=statuses.count(TestStatus.PASSED),
        total=len(must_pass),
        tests=tuple(statuses),
        flags=tuple(flags),
        is_well_formed=runs[0].has_ended,
        wall_s=sum(run.result.wall_s for run in runs),
        cpu_s=sum(run.result.cpu_s for run in runs),
    )


def _status(runs: Sequence["_Run"], altered: Sequence[frozenset[str]], test_id: str) -> TestStatus:
    """A test has passed when it passes as it is, and in every twin fails if it was altered and passes if not."""
    if not runs[0].has_passed(test_id):
        return runs[0].status_of(test_id)
    for run, functions in zip(runs, altered, strict=True):
        if not run.has_ended:
            return END_STATUS[run.result.status]
        if not run.is_test_as_planned(test_id, functions):
            return TestStatus.WRONG_ANSWER
    return TestStatus.PASSED


def _check(base_files: Mapping[str, str], hidden_tests: Mapping[str, str], must_pass: Sequence[str]) -> None:
    wrong = [name for name in (*base_files, *hidden_tests) if not is_plain_path(name)]
    if wrong:
        raise ValueError(f"the path {wrong[0]!r} is not relative and normal; mend the data set")
    if not must_pass or len(set(must_pass)) < len(must_pass):
        raise ValueError("must_pass must name at least one test, and each once; mend the data set")


def _chance(tree: Mapping[str, str], tests: Mapping[str, str], must_pass: Sequence[str]) -> random.Random:
    """The same for the same input, so that a verdict repeats."""
    text = json.dumps([sorted(tree.items()), sorted(tests.items()), list(must_pass)])
    return random.Random(hashlib.sha256(text.encode()).digest())


def _plan_twins(
    tests: Mapping[str, str], choices: Mapping[str, list[Edit]], chance: random.Random
) -> list[tuple[dict[str, str], frozenset[str]]]:
    """Twins of all files, each with the functions (`path::name`) that are altered in it.

    Each is altered in some twin and left alone in another.
    """
    masks = {name: chance.randrange(1, (1 << TWINS) - 1) for name in choices}
    twins = []
    for place in range(TWINS):
        altered = frozenset(name for name, mask in masks.items() if mask >> place & 1)
        edits: dict[str, list[Edit]] = {}
        for name in sorted(altered):
            edits.setdefault(name.partition("::")[0], []).append(chance.choice(choices[name]))
        twins.append(({path: apply(text, edits.get(path, [])) for path, text in tests.items()}, altered))
    return twins


@dataclass
class _Run:
    """What one run of pytest reported: outcomes by phase, for each test."""

    result: ExecResult
    phases: dict[str, dict[str, str]] = field(default_factory=dict)
    exit_code: int | None = None
    is_malformed: bool = False

    @property
    def has_ended(self) -> bool:
        return self.result.status is ExecStatus.OK and self.exit_code in (0, 1) and not self.is_malformed

    def has_passed(self, test_id: str) -> bool:
        return self.phases.get(test_id) == dict.fromkeys(PHASES, "passed")

    def is_test_as_planned(self, test_id: str, altered: frozenset[str]) -> bool:
        """Whether a test of an altered function fails, in itself, or another one passes."""
        if "::".join(function_of(test_id)) in altered:
            return self.phases.get(test_id, {}).get("call") == "failed"
        return self.has_passed(test_id)

    def is_as_planned(self, must_pass: Sequence[str], altered: frozenset[str]) -> bool:
        """Whether that holds for all tests, and the run says nothing else."""
        is_complete = self.has_ended and set(self.phases) == set(must_pass) and self.exit_code == (1 if altered else 0)
        return is_complete and all(self.is_test_as_planned(test_id, altered) for test_id in must_pass)

    def status_of(self, test_id: str) -> TestStatus:
        phases = self.phases.get(test_id, {})
        if self.has_passed(test_id):
            return TestStatus.PASSED
        if "failed" in phases.values() or "skipped" in phases.values() or "xfail" in phases.values():
            return TestStatus.WRONG_ANSWER
        return END_STATUS[self.result.status]


def _run(
    sandbox: Sandbox,
    trees: Sequence[Mapping[str, str]],
    tests: Mapping[str, str],
    must_pass: Sequence[str],
    limits: Limits,
    pauses_s: Sequence[float],
) -> _Run:
    """trees: the base and what of the agent's is laid over it; where that cannot be written, the failure is its own."""
    has_conftest = any(path.rpartition("/")[2] == "conftest.py" for path in tests)
    base, over = ({path: text.encode("utf-8", "replace").decode() for path, text in tree.items()} for tree in trees)
    request = marshal.dumps((pytest_archive(), base, over, dict(tests), has_conftest, list(must_pass)), 2)
    argv = [sandbox.capabilities().python, "-s", "-B", "-c", LAUNCHER_SOURCE]
    run = _Run(run_patiently(sandbox, argv, limits, stdin=request, pauses_s=pauses_s))
    ready, *lines = run.result.stdout.split(b"\n")
    if ready != b'["ready"]' and run.result.status in (ExecStatus.OK, ExecStatus.RUNTIME_ERROR):
        # Nothing of the agent's has run yet.
        why = run.result.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        raise FailedAttemptsError(f"pytest cannot be started in the sandbox: {why}")
    for line in lines[:-1]:
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):
            frame = None
        if not _take(run, frame):
            run.is_malformed = True
            break
    return run


def _take(run: _Run, frame: object) -> bool:
    """Whether a line is one that the launcher would write at this point."""
    if run.exit_code is not None or not isinstance(frame, list) or not frame:
        return False
    if frame[0] == "end" and len(frame) == 2 and type(frame[1]) is int:
        run.exit_code = frame[1]
        return True
    if frame[0] != "test" or len(frame) != 4 or not all(isinstance(part, str) for part in frame):
        return False
    _, test_id, phase, outcome = frame
    phases = run.phases.setdefault(test_id, {})
    if phase in phases:
        return False
    phases[phase] = outcome
    return True
