"""What action.yml runs: verify_on_github.py with a summary file, and with a `gh` that writes down how it is called."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from phimoe_onnx import verify

Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
GH = """#!{python}
import json, os, sys
if os.environ["GH_FAILS"]:
    sys.exit("HTTP 403: Resource not accessible by integration")
posts = "--input" in sys.argv
with open(os.environ["GH_CALLS"], "a") as file:
    file.write(json.dumps([sys.argv[1:], json.load(sys.stdin)["body"] if posts else None]) + "\\n")
if not posts:
    print(os.environ["GH_EARLIER"])
"""


class Run:
    """One run of the script in a folder of its own."""

    def __init__(
        self, folder: Path, *arguments: str | Path, event: dict[str, Any], earlier: str = "", gh_fails: str = ""
    ) -> None:
        (folder / "bin").mkdir()
        (folder / "bin" / "gh").write_text(GH.format(python=sys.executable))
        (folder / "bin" / "gh").chmod(0o755)
        (folder / "event.json").write_text(json.dumps(event))
        environment = {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COMMENT": "true",
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            "GITHUB_EVENT_PATH": str(folder / "event.json"),
            "GITHUB_REPOSITORY": "someone/model",
            "GH_CALLS": str(folder / "calls"),
            "GH_EARLIER": earlier,
            "GH_FAILS": gh_fails,
        }
        command = [sys.executable, ROOT / "scripts" / "verify_on_github.py", *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        self.code, self.output, self.errors = done.returncode, done.stdout, done.stderr
        self.summary = (folder / "summary.md").read_text()
        lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
        self.calls = [json.loads(line) for line in lines]


PULL_REQUEST = {"pull_request": {"number": 12}}
SHORT = ("--tokens", "60", "--new-tokens", "4")


def test_a_good_bundle_is_commented_on_once(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = Path(shutil.copytree(bundle("longrope-window", "portable", "none"), tmp_path / "bundle"))
    run = Run(tmp_path, folder, "--reference", checkpoint("longrope-window"), *SHORT, event=PULL_REQUEST)
    assert run.code == 0, run.errors
    assert run.summary.startswith(f"### phimoe-verify: `{folder}` (portable, none) passed\n")
    assert "60 tokens in 1 windows of up to 60" in run.summary
    assert "greedy continuations, 4 of 4 tokens equal" in run.summary
    (listing, _), (posting, body) = run.calls
    assert listing[:3] == ["api", "--paginate", "repos/someone/model/issues/12/comments"]
    assert posting == ["api", "--method", "POST", "repos/someone/model/issues/12/comments", "--input", "-"]
    mark, _, rest = body.partition("\n")
    assert f"startswith({json.dumps(mark)})" in listing[-1]
    assert rest == run.summary


def test_a_golden_file_is_enough(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = Path(shutil.copytree(bundle("longrope-window", "portable", "none"), tmp_path / "bundle"))
    verify(folder, checkpoint("longrope-window"), tokens=60, new_tokens=4, save_golden=tmp_path / "golden")
    run = Run(tmp_path, folder, "--golden", tmp_path / "golden", event=PULL_REQUEST)
    assert run.code == 0, run.errors
    assert run.summary.startswith(f"### phimoe-verify: `{folder}` (portable, none) passed\n")
    assert "max |d| is a lower bound" in run.summary


def test_a_failing_bundle_fails_and_edits_the_earlier_comment(
    tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint
) -> None:
    limits = ("--max-max-difference", "0")
    folder = Path(shutil.copytree(bundle("longrope-window", "portable", "none"), tmp_path / "bundle"))
    run = Run(
        tmp_path,
        folder,
        "--reference",
        checkpoint("longrope-window"),
        *SHORT,
        *limits,
        event=PULL_REQUEST,
        earlier="77\n78",
    )
    assert run.code == 1
    assert re.search(r"failed\n\n\*\*max_difference is .*, allowed is 0\*\*\n", run.summary)
    assert run.calls[-1] == [
        ["api", "--method", "PATCH", "repos/someone/model/issues/comments/77", "--input", "-"],
        f"<!-- phimoe-verify {folder} -->\n{run.summary}",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"), [((), 1, "error: not a bundle"), (("--what",), 2, "unrecognized arguments: --what")]
)
def test_what_could_not_be_compared_is_reported_too(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    run = Run(tmp_path, tmp_path, "--reference", tmp_path, *arguments, event=PULL_REQUEST)
    assert run.code == code
    assert words in run.summary
    assert words in run.errors
    assert run.calls[-1][1].endswith(run.summary)


def test_a_comment_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    run = Run(tmp_path, tmp_path, "--reference", tmp_path, event=PULL_REQUEST, gh_fails="yes")
    assert run.code == 1
    assert "::warning::phimoe-verify: no comment on the pull request (HTTP 403" in run.output


def test_a_push_is_not_commented_on(tmp_path: Path) -> None:
    assert Run(tmp_path, tmp_path, "--reference", tmp_path, event={"ref": "refs/heads/main"}).calls == []


def test_the_action_and_its_workflow_fit_each_other() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    workflow = yaml.safe_load((ROOT / "docs" / "verify-on-pull-requests.yml").read_text())
    used = set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", (ROOT / "action.yml").read_text()))
    assert used == action["inputs"].keys()
    (job,) = workflow["jobs"].values()
    (step,) = (step for step in job["steps"] if "phimoe-onnx@" in step.get("uses", ""))
    required = {name for name, entry in action["inputs"].items() if entry.get("required")}
    assert required <= step["with"].keys() <= action["inputs"].keys()
    assert workflow["permissions"]["pull-requests"] == "write"
    assert {"golden", "reference"} <= action["inputs"].keys()
    install, check = (step["run"] for step in action["runs"]["steps"] if "run" in step)
    assert install.endswith('"$GITHUB_ACTION_PATH[$EXTRAS]"')
    check = check.replace('python "$GITHUB_ACTION_PATH/scripts/verify_on_github.py"', "printf '%s\\n'")
    for given, expected in (
        ({"GOLDEN": "my file"}, ["my bundle", "--golden", "my file"]),
        (
            {"REFERENCE": "c", "ADAPTER": "a", "ARGUMENTS": "-x 1"},
            ["my bundle", *["--reference", "c", "--adapter", "a", "-x", "1"]],
        ),
    ):
        environment = {"PATH": os.environ["PATH"], "BUNDLE": "my bundle", **given}
        done = subprocess.run(["bash", "-c", check], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == expected
    scripts = re.findall(r"GITHUB_ACTION_PATH/([\w/.]+)", (ROOT / "action.yml").read_text())
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
