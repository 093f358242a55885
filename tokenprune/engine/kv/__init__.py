"""The worker's part of KV pruning: what happens to the paged cache after a step."""
