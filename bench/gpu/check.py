"""Run the steps of `run.sh`, each in a process and with a time limit of its own."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.common import manifest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("kernels", "times", "eager", "graphs", "serve")
SEED = 20
_STOP_SECONDS = 30
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # float32 dot products of Triton kernels in full, so that the float64 loop can be close
    "TRITON_F32_DEFAULT": "ieee",
}


def look_installed(folder):
    """Write the metadata by which Python finds our entry points, without a build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = next(
        line.split('"')[1]
        for line in (ROOT / "tokenprune/__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    )
    name = project["name"]
    info = Path(folder, f"{name.replace('-', '_')}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def commands(step, options):
    """Return the commands of one step and what each adds to the environment."""
    python, cpu = sys.executable, options.device == "cpu"
    if step == "kernels":
        tests = ["tests/kernels", "-q", "-p", "no:cacheprovider"]
        # the interpreter needs many seconds for most of them
        tests += ["-k", "golden or every_mask"] if cpu else []
        return [([python, "-m", "pytest", *tests], {})]
    if step == "times":
        few = ["--op", "transition_scores", "--rounds", "2"] if cpu else []
        command = [python, "-m", "bench.ops", *few]
        return [([*command, "--out", str(options.out / "kernels.jsonl")], {})]
    if step == "serve":
        dtype = "float32" if cpu else "bfloat16"
        command = [python, "-m", "bench.serving", "--quick", "--dtype", dtype]
        runner = {} if cpu else {"VLLM_USE_V2_MODEL_RUNNER": "1"}
        return [([*command, "--out", str(options.out / "serve.jsonl")], runner)]
    vllm = [python, "-m", "bench.gpu.vllm_checks", step, options.device, options.dtype]
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    return [
        ([*vllm, "stock", str(options.out)], {**here, "VLLM_PLUGINS": ""}),
        ([*vllm, "ours", str(options.out)], here),
    ]


def run(command, environment, limit, log):
    """Return None, or why the command failed; its output goes to `log`."""
    with log.open("a") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            # a plain kill first: bench.serving stops its servers then
            child.terminate()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            return f"took longer than {limit:.0f} s"
    return f"ended with status {child.returncode}" if child.returncode else None


def run_step(step, options, environment):
    """Return the records of one step; the last one says how the step ended."""
    log, found = options.out / f"{step}.log", options.out / f"{step}.records"
    log.unlink(missing_ok=True)
    found.unlink(missing_ok=True)
    start, error = time.monotonic(), None
    for command, more in commands(step, options):
        left = options.limit - (time.monotonic() - start)
        error = run(command, environment | more, left, log)
        if error:
            break
    records = [json.loads(x) for x in found.read_text().splitlines()] if found.exists() else []
    found.unlink(missing_ok=True)
    seconds = round(time.monotonic() - start, 1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if error else None
    if tail is None:
        log.unlink(missing_ok=True)
    else:
        tail = tail.replace(str(ROOT), ".").replace(str(Path.home()), "~")
    end = {"check": "finished", "ok": error is None, "seconds": seconds, "error": error}
    return [*records, end | ({"log": tail} if tail else {})]


def brief(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(prog="bench/gpu/run.sh")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--limit", type=float, default=240, help="seconds per step")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "bench/results/gpu"))
    )
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"--steps must be among {', '.join(STEPS)}, got {sorted(unknown)}")
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    head = manifest("bench.gpu", SEED)
    if options.device == "cuda" and head["machine"]["gpu"] is None:
        parser.error("--device must be cpu where torch finds no GPU, got cuda")
    head |= {"device": options.device, "dtype": options.dtype}
    console, failed = Console(width=80, highlight=False), 0
    table = Table("step", "check", "", "figures", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    with tempfile.TemporaryDirectory() as site:
        look_installed(site)
        path = os.pathsep.join([site, str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path.rstrip(os.pathsep)}
        for step in options.steps:
            console.print(f"{step} ...")
            records = run_step(step, options, environment)
            with (options.out / "check.jsonl").open("a") as file:
                for record in records:
                    print(json.dumps(head | {"step": step} | record), file=file)
            for record in records:
                failed += not record["ok"]
                shown = {k: v for k, v in record.items() if k not in ("check", "ok", "log")}
                text = " ".join(f"{k}={brief(v)}" for k, v in shown.items() if v is not None)
                table.add_row(step, record["check"], "ok" if record["ok"] else "FAILED", text)
                if record.get("log"):
                    console.print(record["log"], markup=False)
    console.print(table)
    return 1 if failed else 0
