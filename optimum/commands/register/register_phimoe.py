"""Teaches `optimum-cli export onnx` PhiMoE: optimum-cli imports every file of this namespace folder when it starts."""

from phimoe_onnx.cli import optimum_export

optimum_export.register()
REGISTER_COMMANDS: list[object] = []  # no command of its own
