"""Runs inside the sandbox: lays out a repository and its hidden tests, then runs pytest on them.

A script like driver.py. It reads one marshalled request from stdin (pytest as a zip archive, the files of the
repository, the agent's over them, those of the tests, whether the tests bring a conftest, and the ids to run) and
writes one line of JSON when all but the agent's files is there, one for each phase of each test and one for the end.
All of that happens in one process with the repository's code, which can forge the lines: judge_repo.py does not believe
a run alone.
"""

import json
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Reporter:
    """A plugin of pytest that says how each phase of a test ended."""

    def __init__(self, say: "Callable[..., None]") -> None:
        self.say = say

    def pytest_runtest_logreport(self, report: "Any") -> None:
        outcome = "xfail" if hasattr(report, "wasxfail") else report.outcome
        self.say("test", report.nodeid, report.when, outcome)


def write_files(folder: str, files: "dict[str, str]") -> None:
    for name, text in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)


def main() -> None:
    sys.path[:] = [folder for folder in sys.path if folder.startswith("/usr") or folder.startswith(sys.base_prefix)]
    archive, repository, agents, tests, has_conftest, ids = marshal.loads(sys.stdin.buffer.read())
    repository_folder, tests_folder = os.path.abspath("repository"), os.path.abspath("hidden")
    write_files(repository_folder, repository)
    write_files(tests_folder, tests)
    with open("pytest.zip", "wb") as file:
        file.write(archive)
    frames = os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def say(*frame: object) -> None:
        os.write(frames, json.dumps(frame).encode("ascii") + b"\n")

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, os.path.abspath("pytest.zip"))
    import pytest

    say("ready")
    write_files(repository_folder, agents)  # what cannot be written here is the agent's fault
    # Behind the standard library, so that no file of the repository can stand for one of it.
    sys.path += [repository_folder, os.path.join(repository_folder, "src"), tests_folder]
    os.chdir(repository_folder)  # as whoever runs the tests of a repository stands there
    options = ["-c", os.devnull, "--rootdir", tests_folder, "--import-mode=importlib", "--assert=plain", "--tb=line"]
    options += ["-p", "no:cacheprovider", "-p", "no:faulthandler", *([] if has_conftest else ["--noconftest"])]
    code = pytest.main([*options, *(os.path.join(tests_folder, test_id) for test_id in ids)], plugins=[Reporter(say)])
    sys.stdout.flush()
    say("end", int(code))
    os._exit(0)


if __name__ == "__main__":
    main()
