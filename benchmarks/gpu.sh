#!/usr/bin/env bash
# Every GPU figure in one call of under nine minutes, on a machine with jax (CUDA), flax, optax, orbax-checkpoint, tyro
# and tqdm; with torch and a checkout of nanoGPT its rows too:
#
#     bash benchmarks/gpu.sh --nanogpt=../nanoGPT --json=benchmarks/gpu.json
#
# The file is written after every part, and a part that is in it is not run again: called once more, it goes on.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
