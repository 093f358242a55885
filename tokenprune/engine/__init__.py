"""The only room that imports vLLM internals; written against vLLM 0.32, Model Runner V2."""
