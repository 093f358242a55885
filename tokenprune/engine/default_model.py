"""What `tokenprune serve` serves where its arguments name no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# a user's flag on the left speaks about the same thing as ours on the right, and would lose
_SAYS_TOO = {"--gpu-memory-utilization": "--kv-cache-memory-bytes"}


@dataclass(frozen=True)
class DefaultModel:
    """A model with the flags that suit it.

    Attributes:
        folder: Its checkpoint.
        flags: Flags of `vllm serve` with their values, None for a switch.
    """

    folder: Path
    flags: Mapping[str, str | None]

    def before(self, arguments: Sequence[str], from_file: Iterable[str] = ()) -> list[str]:
        """Return arguments that serve this model, to be put before the user's.

        Args:
            arguments: The user's; flags that they set are left out of ours.
            from_file: Flags that the user's configuration file sets, which would otherwise lose
                to ours on the command line.
        """
        given = {_bare(word) for word in (*arguments, *from_file)}
        given |= {ours for theirs, ours in _SAYS_TOO.items() if theirs in given}
        words = [str(self.folder)]
        for flag, value in self.flags.items():
            if flag not in given:
                words += [flag] if value is None else [flag, value]
        return words


def names_model(arguments: Sequence[str], from_file: Iterable[str] = ()) -> bool:
    """Return whether arguments of `vllm serve`, or the flags of its file, say what to serve.

    vLLM's own parser tells a model behind flags from a flag's value. It ends the process where the
    arguments are not legal, as it would later.
    """
    if not arguments:
        return False
    if "--model" in from_file or not arguments[0].startswith("-"):
        return True
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = list(arguments)
    if "--config" in words[:-1]:
        # its flags are known already, and without a model vLLM refuses the file
        at = words.index("--config")
        del words[at : at + 2]
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.set_defaults(model=None)
    parsed = parser.parse_args(words)
    return parsed.model_tag is not None or parsed.model is not None


def _bare(word: str) -> str:
    """Return the flag in a word of the command line: no value, no negation, dashes only."""
    flag = word.partition("=")[0].partition(".")[0].replace("_", "-")
    return f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else flag
