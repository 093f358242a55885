"""The Triton backend `cpu`: the compiler and the driver that Triton looks for in a backend."""
