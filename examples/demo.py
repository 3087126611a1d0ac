"""make demo: the whole path on embedded data, each step a command that you can type yourself.

Interrupted, it goes on where it was.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

DEMO = Path("demo")
FACES = DEMO / "faces"
LDG = DEMO / "ldg"
STUDENT = DEMO / "student"
ARTIFACTS = DEMO / "artifacts"
PORTRAIT = DEMO / "portrait.jpg"
BENCHMARK = DEMO / "benchmark"
DONE = DEMO / "done.txt"  # the commands that came to their end

SCRIPTS = Path(sys.executable).parent

# What the recipe has for long trainings would keep a short one from learning anything.
SHORT = "--augmentation mild --ema 0 --select last"

# Smaller than a real training so that two cores finish in minutes.
COMMANDS = {
    "an embedded data set of synthetic faces, in RAF-DB's layout": [
        f"python -m training.prepare synthetic --train 2000 --test 350 --out {FACES}",
    ],
    "a teacher (LDG) and a student (EfficientFace) on it": [
        f"python -m training.teacher --data {FACES} --arch resnet18 --input-size 64 --epochs 3 "
        f"--batch-size 32 --learning-rate 0.02 {SHORT} --out {LDG}",
        f"python -m training.student --data {FACES} --teacher {LDG}/teacher.safetensors "
        f"--input-size 64 --epochs 6 --batch-size 16 --learning-rate 0.05 "
        f"{SHORT} --out {STUDENT}",
        f"python -m training.evaluate --weights {STUDENT}/student.safetensors --data {FACES}",
    ],
    "ONNX in three precisions, and TensorRT engines": [
        f"efficientface-export --engine onnx --weights {STUDENT}/student.safetensors "
        f"--precision all --calib {FACES} --val {FACES} --out {ARTIFACTS}",
        f"efficientface-export --engine trt-rtx --weights {STUDENT}/student.safetensors "
        f"--val {FACES} --out {ARTIFACTS}",
        f"efficientface-export --engine trt-rtx --precision int8 --calib {FACES} --val {FACES} "
        f"--weights {STUDENT}/student.safetensors --out {ARTIFACTS}",
    ],
    "the bundled model on a real photograph": [
        f"python examples/portrait.py {PORTRAIT}",
        f"efficientface-predict {PORTRAIT}",
    ],
    "latency of what was made": [
        f"python benchmarks/latency.py {ARTIFACTS}/efficientface-fp32-cpu.onnx "
        f"{ARTIFACTS}/efficientface-int8-cpu.onnx {STUDENT}/student.safetensors "
        f"--batch 1 --seconds 1 --out {BENCHMARK}",
    ],
}


def main() -> int:
    """Run every step that is not done yet; stop at the first that fails."""
    done = DONE.read_text(encoding="utf-8").splitlines() if DONE.is_file() else []
    everything = [command for commands in COMMANDS.values() for command in commands]
    if set(done) >= set(everything) or (DEMO.exists() and not DONE.is_file()):
        print(f"error: {DEMO}/ is there already; remove it to run the demo again (rm -r {DEMO})")
        return 2
    DEMO.mkdir(exist_ok=True)
    DONE.touch()
    started = time.monotonic()
    for number, (title, commands) in enumerate(COMMANDS.items(), start=1):
        print(f"\n== {number}/{len(COMMANDS)}: {title}", flush=True)
        for command in commands:
            if command in done:
                print(f"\n(done before) $ {command}", flush=True)
                continue
            resumed = _resumed(command)
            print(f"\n$ {resumed}", flush=True)
            if code := _run(resumed):
                print(f"error: the command above ended with exit code {code}; make demo goes on")
                return code
            with DONE.open("a", encoding="utf-8") as file:
                file.write(command + "\n")
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nDone in {minutes:.1f} minutes. What was made:\n"
        f"  {FACES}/                 the data set\n"
        f"  {LDG}/, {STUDENT}/     weights, metrics.csv and curves.png of both trainings\n"
        f"  {ARTIFACTS}/             ONNX files, engines, report.md\n"
        f"  {BENCHMARK}/             latency as JSON and PNG\n"
        "Next: README.md, your own data set and weights."
    )
    return 0


def _run(command: str) -> int:
    """The command's exit code; Ctrl-C reaches it too, and it has the last word."""
    with subprocess.Popen(_resolve(command)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _resumed(command: str) -> str:
    """The command; a training that left a state goes on from it."""
    out = Path(shlex.split(command)[-1])
    return f"{command} --resume" if (out / "last.pt").is_file() else command


def _resolve(command: str) -> list[str]:
    """The command with this environment's programs."""
    program, *arguments = shlex.split(command)
    found = sys.executable if program == "python" else str(SCRIPTS / program)
    return [found, *arguments]


if __name__ == "__main__":
    sys.exit(main())
