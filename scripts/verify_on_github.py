"""phimoe-verify for action.yml: its report goes to the job's summary and, on a pull request, into one comment that is
kept current.

Takes phimoe-verify's own arguments. Exits as it does; a comment that cannot be made is a warning only, since the token
of a pull request from a fork may not write.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from phimoe_onnx.cli.verify import main as verify


def main(arguments: list[str]) -> int:
    """Verifies, reports and returns phimoe-verify's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.md")
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            try:
                code = verify([*arguments, "--markdown", str(report)])
            except SystemExit:  # argparse's, for an argument that phimoe-verify does not know
                code = 2
        sys.stderr.write(errors.getvalue())
        if report.exists():
            body = report.read_text(encoding="utf-8")
        else:  # nothing was compared
            body = f"### phimoe-verify: `{arguments[0]}` failed\n\n```\n{errors.getvalue()}```\n"
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(body)
    if os.environ.get("COMMENT") == "true" and (number := _pull_request()):
        try:
            _comment(number, f"<!-- phimoe-verify {arguments[0]} -->\n{body}")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            print(f"::warning::phimoe-verify: no comment on the pull request ({str(reason).strip()})")
    return code


def _pull_request() -> int | None:
    """The number of the pull request that this run is for, if it is for one."""
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
    number: int | None = event.get("pull_request", {}).get("number")
    return number


def _comment(number: int, body: str) -> None:
    """Edits the comment that an earlier run began with the same line, or makes one."""
    repository = os.environ["GITHUB_REPOSITORY"]
    comments = f"repos/{repository}/issues/{number}/comments"
    mark = json.dumps(body.partition("\n")[0])
    earlier = _gh("api", "--paginate", comments, "--jq", f".[] | select(.body | startswith({mark})) | .id").split()
    where = (
        ["--method", "PATCH", f"repos/{repository}/issues/comments/{earlier[0]}"]
        if earlier
        else ["--method", "POST", comments]
    )
    _gh("api", *where, "--input", "-", stdin=json.dumps({"body": body}))


def _gh(*arguments: str, stdin: str | None = None) -> str:
    return subprocess.run(["gh", *arguments], input=stdin, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
