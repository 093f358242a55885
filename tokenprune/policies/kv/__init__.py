"""Methods that evict KV tokens of live requests."""
