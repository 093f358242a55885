#!/usr/bin/env bash
# Check and time tokenprune on a GPU machine without a network, from a checkout alone.
#
#   bench/gpu/run.sh [--steps kernels,times,eager,graphs,serve] [--limit 240] [--dtype float32]
#   bench/gpu/run.sh --device cpu      dry run of the same code on a CPU, with small sizes
#
# Steps (each has a time limit of its own, `--limit` seconds; give only some to stay below the
# limit of one call):
#   kernels  tests/kernels on the GPU
#   times    bench.ops
#   eager    vLLM without graphs: off equals stock, pruned equals a float64 loop, blocks return
#   graphs   the same with CUDA graphs FULL_DECODE_ONLY, and graphs read lengths at one address
#   serve    bench.serving --quick
# Results: one JSON line per check in $OUT/check.jsonl; OUT defaults to bench/results/gpu.
#
# Expected there: Python 3.12 with torch 2.11 (CUDA 13), triton 3.6, transformers 5.17, numpy,
# pillow, rich, prometheus-client, pytest, pytest-timeout; scikit-learn and typer for `serve`.
# `kernels` and `times` need nothing else.
#
# The other steps need vLLM 0.32. WHEELS (default .whl, which git ignores) names a folder of
# wheels that are unpacked first, into a folder of their own: a vLLM that runs without compiled
# kernels, and whatever it needs that the machine lacks. Of our own dependencies, pydantic (with
# pydantic-core, annotated-types, typing-inspection) and openai (with jiter, httpx and sniffio)
# must be among them or on the machine. Without that folder the vLLM that Python finds is used.
#
# tokenprune is not installed there: check.py makes its checkout look installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m bench.gpu "$@"
