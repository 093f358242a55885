"""A tiny random Llama, and engines that serve it in processes of their own.

A bench that compares engines starts each with `--serve NAME ...` on its own command line. Such a
child prints `ready` once its engine stands and then answers lines.
"""

import os
import subprocess
import sys

VOCAB, SEED = 32000, 20
# each child chooses for itself
_SWITCHES = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")


def save_model(folder, max_positions=2048):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        max_position_embeddings=max_positions,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def start(bench, name, arguments, log):
    """Start the engine `name` of a bench and return its process once it is ready.

    Args:
        bench: Module of the bench.
        name: What the bench calls the engine.
        arguments: What follows the name after `--serve`.
        log: Open file for what the engine prints.
    """
    env = {key: value for key, value in os.environ.items() if key not in _SWITCHES}
    command = [sys.executable, "-m", bench, "--serve", name, *map(str, arguments)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
    )
    if child.stdout.readline() != "ready\n":
        log.seek(0)
        raise SystemExit(f"the {name} engine must start, got:\n{log.read()[-3000:]}")
    return child
