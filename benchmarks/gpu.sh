#!/usr/bin/env bash
# The GPU figures of steps and runs, in calls of under nine minutes, on a machine with what requirements_jax.txt names
# (jax with CUDA) and data/shakespeare_char prepared; with torch and a checkout of nanoGPT its rows too:
#
#     bash benchmarks/gpu.sh --nanogpt=../nanoGPT --json=benchmarks/gpu.json
#
# The file is written after every part, and a part that is in it is not run again: called once more, it goes on.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
