"""What prunes inside vLLM and overrides its internals; written against 0.32, Model Runner V2."""
