"""Loads and runs one bundle in each language and prints what each needs: the same ONNX Runtime release, graph and
threads.

    python -m benchmarks.compare_languages BUNDLE --languages java node --python VENV/bin/python --threads 2

VENV has the ONNX Runtime release of the languages that are named: `--languages java`, `csharp`, `node` or several.
Every language runs in a process of its own, in turns, and continues the same token ids greedily, twice; the second time
counts. The table has the medians.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

EMBED = Path(__file__).parent.parent / "embed"
JAVA = EMBED / "java"
CSHARP = EMBED / "csharp" / "examples" / "Generate"
NODE = EMBED / "node"
COLUMNS = {
    "load": "load, s",
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
    "resident": "resident, MiB",
    "anonymous": "of it anonymous, at most, MiB",
}


def run(bundle: str, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    """Python's own turn; prints one line of JSON, as the other languages' do."""
    from phimoe_onnx import PhiMoE

    ids = [300 + place * 7 % 1000 for place in range(prompt_tokens)]
    start = time.perf_counter()
    model = PhiMoE.load(bundle, threads=threads)
    load = time.perf_counter() - start
    model.generate(ids, max_new_tokens=new_tokens)
    generation = model.generate(ids, max_new_tokens=new_tokens)
    status = dict(
        line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    figures = {
        "load": load,
        "prefill": prompt_tokens / generation.first_token_seconds,
        "decode": generation.tokens_per_second,
        "new_tokens": len(generation.token_ids),
        "resident": int(status["VmRSS"].split()[0]) // 1024,
    }
    print(json.dumps(figures))


def turn(command: list[str]) -> dict[str, float]:
    """A language's turn; its process is looked at meanwhile for the memory that it has for itself."""
    anonymous = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            anonymous = max(anonymous, int(found[1]) if found else 0)
            time.sleep(0.05)
        lines = process.stdout.read().splitlines()
    if process.returncode or not lines:
        sys.exit(f"{command[0]} ended with {process.returncode} and {len(lines)} lines; see above")
    figures: dict[str, float] = json.loads(lines[-1])
    return figures | {"anonymous": anonymous / 1024}


def java_command() -> list[str]:
    """Compiles embed/java and its benchmark; the command without its arguments."""
    classpath = JAVA / "target" / "classpath"
    subprocess.run(
        [
            "mvn",
            "-q",
            "-B",
            "-f",
            JAVA / "pom.xml",
            "test-compile",
            "dependency:build-classpath",
            f"-Dmdep.outputFile={classpath}",
        ],
        check=True,
    )
    parts = [JAVA / "target" / "classes", JAVA / "target" / "test-classes", classpath.read_text().strip()]
    return ["java", "-cp", ":".join(map(str, parts)), "phimoe.Benchmark"]


def csharp_command() -> list[str]:
    """Compiles embed/csharp and its example; the command without its arguments."""
    subprocess.run(["dotnet", "build", "-v", "q", "-c", "Release", CSHARP], check=True, stdout=subprocess.DEVNULL)
    return ["dotnet", str(CSHARP / "bin" / "Release" / "net8.0" / "Generate.dll"), "benchmark"]


def node_command() -> list[str]:
    """Compiles embed/node; the command without its arguments."""
    if not (NODE / "node_modules").exists():
        raise SystemExit(f"{NODE}: its packages are not installed; run npm ci there")
    subprocess.run(["npm", "--prefix", NODE, "run", "--silent", "build"], check=True)
    return ["node", str(NODE / "benchmark.mjs")]


LANGUAGES = {"java": ("Java", java_command), "csharp": ("C#", csharp_command), "node": ("Node", node_command)}


def main() -> None:
    """Runs every language in turns and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument(
        "--python", default=sys.executable, help="a Python with ONNX Runtime, tokenizers, numpy and jinja2"
    )
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=["java"], help="to compare with Python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    numbers = [str(number) for number in (arguments.threads, arguments.prompt_tokens, arguments.new_tokens)]
    python = "import sys; from benchmarks.compare_languages import run; run(sys.argv[1], *map(int, sys.argv[2:]))"
    commands = {"Python": [arguments.python, "-c", python]}
    for language in arguments.languages:
        name, command_of = LANGUAGES[language]
        commands[name] = command_of()
    figures: dict[str, list[dict[str, float]]] = {language: [] for language in commands}
    for _ in range(arguments.rounds):
        for language, command in commands.items():
            figures[language].append(turn([*command, arguments.bundle, *numbers]))
    print(f"| language | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
    for language, rounds in figures.items():
        assert len({each["new_tokens"] for each in rounds}) == 1
        values = [f"{statistics.median(each[name] for each in rounds):.5g}" for name in COLUMNS]
        print(f"| {language} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
