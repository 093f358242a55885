"""tokenprune: per-request pruning of visual tokens and KV cache inside unmodified vLLM."""

import os

__version__ = "0.1.0"

# a link in a checkout; git without symbolic links writes a text file in its place
if os.path.isfile(os.path.join(__path__[0], "server")):
    raise ImportError(
        "tokenprune/server must lead to a folder, got a checkout without symbolic links; "
        "git config core.symlinks true, then git checkout -- tokenprune"
    )
