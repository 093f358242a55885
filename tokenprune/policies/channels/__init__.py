"""Methods that drop channels of old KV tokens."""
