"""The config files of this repository, and the defaults, against nanoGPT's values.

python -m pytest tests/test_config_files.py
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import configurator
from train_jax import TrainConfig

ROOT = Path(configurator.__file__).parent


EVAL = {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False}


CONFIG_FILES: dict[str, dict[str, Any]] = {
    "train_gpt2": {
        "wandb_log": True, "wandb_project": "owt", "wandb_run_name": "gpt2-124M", "batch_size": 12,
        "block_size": 1024, "gradient_accumulation_steps": 40, "max_iters": 600000, "lr_decay_iters": 600000,
        "eval_interval": 1000, "eval_iters": 200, "log_interval": 10, "weight_decay": 0.1,
    },
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char", "eval_interval": 250, "eval_iters": 200, "log_interval": 10,
        "always_save_checkpoint": False, "wandb_log": False, "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt", "dataset": "shakespeare_char", "gradient_accumulation_steps": 1,
        "batch_size": 64, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2,
        "learning_rate": 1e-3, "max_iters": 5000, "lr_decay_iters": 5000, "min_lr": 1e-4, "beta2": 0.99,
        "warmup_iters": 100,
    },
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare", "eval_interval": 5, "eval_iters": 40, "wandb_log": False,
        "wandb_project": "shakespeare", "wandb_run_name": ..., "dataset": "shakespeare", "init_from": "gpt2-xl",
        "always_save_checkpoint": False, "batch_size": 1, "gradient_accumulation_steps": 32, "max_iters": 20,
        "learning_rate": 3e-5, "decay_lr": False,
    },
    "eval_gpt2": {**EVAL, "init_from": "gpt2"},
    "eval_gpt2_medium": {**EVAL, "init_from": "gpt2-medium"},
    "eval_gpt2_large": {**EVAL, "init_from": "gpt2-large"},
    "eval_gpt2_xl": {**EVAL, "init_from": "gpt2-xl"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_our_config_files_have_nanogpts_values(name):
    path = str(ROOT / f"config/{name}.py")
    config, sources = configurator.parse_with_sources(TrainConfig, [path], quiet=True)
    expected = dict(CONFIG_FILES[name])
    assert set(sources) == set(expected)
    if expected.get("wandb_run_name") is ...:
        expected["wandb_run_name"] = config.wandb_run_name
        assert config.wandb_run_name.startswith("ft-")
    assert asdict(config) == {**asdict(TrainConfig()), **expected}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_accepted(path):
    configurator.parse(TrainConfig, [str(path)])


def test_the_defaults_are_nanogpts():
    nanogpt = {
        "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
        "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
        "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
        "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
        "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
        "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5,
        "backend": "nccl", "compile": True,
        # not nanoGPT's: where the run lives, and what the machine decides
        "out_dir": "out_jax", "device": "auto", "dtype": "auto", "seed": 1337,
    }  # fmt: skip
    defaults = asdict(TrainConfig())
    assert {key: defaults[key] for key in nanogpt} == nanogpt
