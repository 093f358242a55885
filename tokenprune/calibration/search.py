"""The search: a Gaussian process proposes parameters, the engine says how good they are.

The first trial is the method's default, some are uniform, and the others maximise the logarithm
of the expected improvement (optuna's GP sampler; the paper's criterion is expected improvement,
which has the same maximum).

Trials are kept in a file, so that an interrupted search goes on and a finished one is read. What a
trial proposes depends on the seed and on the trials before it, not on where a run began.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.calibration.space import SearchSpace
from tokenprune.errors import ConfigurationError, InstallationError
from tokenprune.installation import install_command

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

# a repeated trial may differ by this much, where the device adds in another order
_REPEATABLE = 1e-3


@dataclass(frozen=True, slots=True)
class Trial:
    """One point and how good it is.

    Attributes:
        number: Place in the search; 0 is the start.
        point: Coordinates in the search space.
        score: The objective; higher is better.
    """

    number: int
    point: Mapping[str, float]
    score: float


def check_installed() -> None:
    """Refuse to begin without the libraries of the extra.

    Raises:
        InstallationError: Naming the extra.
    """
    for library in ("matplotlib", "optuna", "scipy"):
        try:
            importlib.import_module(library)
        except ImportError:
            raise InstallationError(
                f"{library} must be installed to calibrate, got none; "
                f"{install_command('calibrate')}"
            ) from None


def search(
    space: SearchSpace,
    evaluate: Callable[[Mapping[str, float]], float],
    *,
    storage: Path,
    identity: Mapping[str, Any],
    num_trials: int,
    seed: int,
    on_trial: Callable[[Trial], object],
) -> list[Trial]:
    """Return all trials of a search, in order.

    Args:
        space: Where to search.
        evaluate: Scores a point; the same point always gets the same score.
        storage: File of the trials. Searches of another identity, space or seed may share it.
        identity: What else the scores depend on, as plain data.
        num_trials: Trials in all, those of earlier runs and the start included.
        seed: Seed of the proposals.
        on_trial: Called with each trial, also with those of earlier runs.

    Raises:
        ConfigurationError: The file is not of this kind, or the model answers differently by now.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    # its warnings are about its own speed
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _open(storage, _name(space, identity, seed))
    distributions: dict[str, BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(low, high)
        for name, (low, high) in space.coordinates.items()
    }
    for unfinished in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # left by a run that was killed
        study.tell(unfinished.number, state=TrialState.FAIL)
    start = Trial(0, space.start_point, evaluate(space.start_point))
    trials = _completed(study)
    if not trials:
        study.add_trial(
            create_trial(params=dict(start.point), distributions=distributions, value=start.score)
        )
        trials = [start]
    elif abs(trials[0].score - start.score) > _REPEATABLE:
        raise ConfigurationError(
            f"{storage} must hold trials of this model, got {trials[0].score:.4f} for the start, "
            f"which scores {start.score:.4f} now; move it away to search anew"
        )
    for trial in trials[:num_trials]:
        on_trial(trial)
    while len(trials) < num_trials:
        study.sampler = _sampler(seed, len(trials))
        proposal = study.ask(distributions)
        try:
            score = evaluate(proposal.params)
        except BaseException:
            study.tell(proposal, state=TrialState.FAIL)
            raise
        study.tell(proposal, score)
        trials.append(Trial(len(trials), dict(proposal.params), score))
        on_trial(trials[-1])
    return trials[:num_trials]


def best_of(trials: list[Trial]) -> Trial:
    """Return the trial with the highest score, the earliest of equals."""
    return max(trials, key=lambda trial: (trial.score, -trial.number))


def _sampler(seed: int, number: int) -> Any:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # one for each trial: its generator would otherwise start over in a run that goes on
        return GPSampler(
            seed=int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4]),
            deterministic_objective=True,
            warn_independent_sampling=False,
        )


def _open(storage: Path, name: str) -> Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    try:
        # optuna takes a last line that is no record for one that is still being written
        if storage.exists() and (text := storage.read_bytes()):
            json.loads(text.splitlines()[0])["op_code"]
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(storage))),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{storage} must be a file of trials that calibrate wrote, got {error!r}; "
            "move it away to search anew"
        ) from None


def _name(space: SearchSpace, identity: Mapping[str, Any], seed: int) -> str:
    record = json.dumps(
        [space.method, space.keep_ratio, space.layers, space.coordinates, seed, dict(identity)],
        sort_keys=True,
    )
    return f"{space.method}-{hashlib.sha256(record.encode()).hexdigest()[:16]}"


def _completed(study: Study) -> list[Trial]:
    from optuna.trial import TrialState

    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        Trial(number, dict(trial.params), float(trial.value or 0.0))
        for number, trial in enumerate(found)
    ]
