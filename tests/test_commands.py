"""What all commands have in common: help, version, errors of one line, a quiet early Ctrl-C, and no import that
Windows lacks.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pytest

import phimoe_onnx
from phimoe_onnx.cli import _start

COMMANDS = ("export", "generate", "chat", "classify", "verify", "bench", "experts")
PACKAGE = Path(phimoe_onnx.__file__).parent
POSIX = ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "readline", "curses", "syslog")
FOREIGN = (
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai", "safetensors.torch", "psutil",
    "huggingface_hub", "filelock", "prompt_toolkit.shortcuts", "rich.progress", "tokenizers", "jinja2.sandbox",
    "msgspec", "numpy", "asyncio", "multiprocessing", "concurrent.futures",
)  # fmt: skip


def run(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of a command that ends before its work."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"phimoe_onnx.cli.{command}").main(arguments)
    return stop.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert run(command, ["--help"], monkeypatch) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.startswith(f"usage: phimoe-{command} ")
    assert max(map(len, output.splitlines())) <= 80
    _, _, examples = output.partition("\nexamples:\n")
    assert len(examples.splitlines()) >= 2
    assert all(line.startswith(f"  phimoe-{command} ") for line in examples.splitlines())
    options = re.split(r"\n  (?=-)", output.partition("\nexamples:\n")[0])[1:]
    assert "--version" in {option.split()[0] for option in options}
    for option in options:  # each that takes a value says what it is otherwise
        names = option.replace(", ", ",").split("  ")[0]
        required = names.split()[0] in {"verify": ("--reference", "--golden"), "experts": ("--text",)}.get(command, ())
        if " " in names.strip() and not required:
            assert "default:" in option, option


@pytest.mark.parametrize("command", COMMANDS)
def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert run(command, ["--version"], monkeypatch) == 0
    output = capsys.readouterr().out
    assert re.fullmatch(rf"phimoe-{command} {phimoe_onnx.__version__} \(onnxruntime\S* \S+\)\n", output)
    assert onnxruntime.__version__ in output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "error: "),
        (["a", "b", "--reference", "c", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["a", "b", "--threads", "0"], "argument --threads: 0: expected 1 or more"),
    ],
)
def test_what_argparse_refuses_is_a_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    assert run(command, arguments, monkeypatch) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.endswith(f"; phimoe-{command} --help says more\n")
    assert errors.count("\n") == 1
    lacks = {"verify": "--threads", "experts": "--device"}
    if command != "export" and lacks.get(command) not in arguments:
        assert message in errors


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "export",
            ["a", "--quantize", "int5"],
            "--quantize: invalid choice: 'int5' (choose from none, fp16",
        ),
        ("export", ["a", "--target", "tpu"], "--target: invalid choice: 'tpu' (choose from cpu, cuda, portable)"),
        ("export", ["a", "--kv-cache", "int2"], "--kv-cache: invalid choice: 'int2'"),
        ("export", ["a", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ("export", ["a", "--task", "translation"], "--task: invalid choice: 'translation'"),
        ("export", ["a", "--block-size", "24"], "--block-size: invalid choice: 24"),
        ("export", ["a", "--store", "head"], "--store: head: expected PATTERN=FORM, such as lm_head.weight=int8"),
        ("export", ["a", "--store", "head=int5"], "--store: head=int5: the form is 'int5', expected one of none, fp16"),
        ("verify", ["a", "--reference", "b", "--tokens", "0"], "--tokens: 0: expected 1 or more"),
        ("verify", ["a", "--reference", "b", "--max-kl", "x"], "--max-kl: invalid float value: 'x'"),
    ],
)
def test_a_bad_option_is_said_before_torch_is_imported(command: str, arguments: list[str], message: str) -> None:
    code = f"import atexit, sys; from phimoe_onnx.cli._start import {command}; sys.argv[1:] = {arguments}\n"
    code += "atexit.register(lambda: print('torch' in sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit({command}())"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert (
        done.stderr.replace("'none', 'fp16', 'int8', 'int4'", "none, fp16, int8, int4")
        .replace("'cpu', 'cuda', 'portable'", "cpu, cuda, portable")
        .startswith(f"error: argument {message}")
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("export", "rich"),  # by the command's own file
        ("export", "torch"),  # when its work begins
        ("generate", "onnxruntime"),
        ("chat", "argparse"),
        ("chat", "onnxruntime"),
        ("classify", "onnxruntime"),
        ("verify", "torch"),
        ("bench", "numpy"),
        ("experts", "numpy"),
    ],
)
def test_an_early_ctrl_c_is_quiet(tmp_path: Path, command: str, module: str) -> None:
    """It comes while a module is imported that swallows it, as some do."""
    mark = tmp_path / "mark"
    (tmp_path / f"{module}.py").write_text(f"""
import time
open({str(mark)!r}, "w").close()
try:
    time.sleep(60)
except KeyboardInterrupt:
    pass
""")
    more = {"verify": ["--reference", "nowhere"], "generate": ["a"], "experts": ["--text", __file__]}
    arguments = ["nowhere", *more.get(command, [])]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from phimoe_onnx.cli import _start\n"
    code += f"sys.argv[1:] = {arguments}; sys.exit(_start.{command}())"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not mark.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (130, "", "\n")


def test_later_ctrl_c_is_an_exception_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _start.imports():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _start.imports():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_between_imports_and_work_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from phimoe_onnx.cli import generate

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "main", interrupted)
    assert _start.generate() == 130


def test_nothing_is_imported_that_windows_lacks() -> None:
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    modules = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    modules.remove("phimoe_onnx.lm_eval")  # it needs the package of that name, which is not installed here
    code = f"""
import importlib, sys
for name in {FOREIGN}:
    importlib.import_module(name)
sys.modules.update(dict.fromkeys({POSIX}))  # importing one now raises ModuleNotFoundError
for name in {modules}:
    importlib.import_module(name)
print(len({modules}))
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 80
