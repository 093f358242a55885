"""Without a GPU, Triton interprets its kernels; it reads the switch when they are imported."""

import torch

from tokenprune.vllm_on_cpu import activate

if not torch.cuda.is_available():
    activate()
