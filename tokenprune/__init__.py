"""tokenprune: per-request pruning of visual tokens and KV cache inside unmodified vLLM."""

__version__ = "0.1.0"
