"""The training loop without a command line: phases, steps, what a state holds."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.tasks.data import FAMILIES, LEVELS, Batch
from bench.tasks.pictures import NO_LABEL
from bench.training.curriculum import Curriculum
from bench.training.model import DemoModel, ModelSpec
from bench.training.recipe import WINDOW, Recipe
from bench.training.state import StateError


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[B, 1, L, L]`: 0 where a token sees another, minus infinity elsewhere.

    A token sees what stands before it in its context and in its own segment.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    seen = causal & (same | (segments[:, None, :] == 0))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)[:, None]


class Trainer:
    """Model, optimizer and curriculum of one run.

    Attributes:
        step: Steps done, of both phases together.
        seconds: Time spent in steps, over all parts of the run.
    """

    def __init__(self, recipe: Recipe, spec: ModelSpec, device: str):
        self.recipe, self.device = recipe, torch.device(device)
        self.model = DemoModel(spec).to(self.device)
        self.curriculum = Curriculum(recipe.threshold, recipe.patience)
        self.step, self.seconds = 0, 0.0
        self._window: dict[str, float] = {}
        self.optimizers = self._build_optimizers()

    @property
    def phase(self) -> str:
        """`tower`, `decoder` or `done`."""
        if self.step < self.recipe.tower_steps:
            return "tower"
        return "decoder" if self.step < self.last_step else "done"

    @property
    def last_step(self) -> int:
        """Number of steps of a whole run."""
        return self.recipe.tower_steps + self.recipe.steps

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters of the present phase."""
        tower = self.phase == "tower"
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and tower == (".vision_tower." in name or name.startswith("patch_heads."))
        }

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Muon for the matrices inside the layers, and AdamW for all else."""
        trained = self._trained()
        inside = {name for name, p in trained.items() if ".layers." in name and p.ndim == 2}
        others = [p for name, p in trained.items() if name not in inside]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        matrices = [p for name, p in trained.items() if name in inside]
        return [
            torch.optim.Muon(matrices, weight_decay=0.02),
            torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8),
        ]

    def rate(self) -> float:
        """Return the factor of the next step's learning rates: up, flat, and linearly down."""
        recipe, first = self.recipe, self.phase == "tower"
        done = self.step if first else self.step - recipe.tower_steps
        total = recipe.tower_steps if first else recipe.steps
        left = (total - done) / max(1.0, total * recipe.decay)
        return max(0.0, min(1.0, (done + 1) / recipe.warmup, left))

    def plan(self, steps: int) -> list[tuple[Any, ...]]:
        """Return what the batches of the next steps are; `make_batches` makes them anywhere."""
        size = self.recipe.tower_size
        plans: list[tuple[Any, ...]] = []
        for step in range(self.step, self.step + steps):
            if step < self.recipe.tower_steps:
                share = step / self.recipe.tower_steps
                clutter = (0,) if share < 0.25 else (0, 1) if share < 0.4 else (0, 1, 2)
                plans.append(("tower", self.recipe.seed, step, clutter, size))
            else:
                levels = {t: self.curriculum.draw(self.recipe.seed, t, step) for t in LEVELS}
                plans.append(("decoder", self.recipe, step, levels))
        return plans

    def train_step(self, batches: Any) -> None:
        """Do one step with what `make_batches` returned for it."""
        was = self.phase
        rates = (self.recipe.matrix_rate, self.recipe.rate)
        for optimizer, highest in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self.rate() * highest
            optimizer.zero_grad(set_to_none=True)
        if was == "tower":
            self._tower_loss(*batches).backward()
        else:
            for track, (level, batch) in batches.items():
                self._answer_loss(track, level, batch).backward()
        torch.nn.utils.clip_grad_norm_(self._trained().values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.phase != was:
            self.optimizers = self._build_optimizers()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.half)

    def _tower_loss(self, pixels: Any, labels: dict[str, Any]) -> Tensor:
        with self._autocast():
            logits = self.model.patch_logits(torch.from_numpy(pixels).to(self.device))
        total = torch.zeros((), device=self.device)
        for name, values in logits.items():
            target = torch.from_numpy(labels[name]).to(self.device).flatten()
            values = values.flatten(0, 1).float()
            total = total + functional.cross_entropy(values, target, ignore_index=NO_LABEL)
            known = target != NO_LABEL
            right = (values.argmax(-1) == target)[known].float().mean()
            self._note(f"patch_{name}", right)
        self._note("loss_tower", total.detach())
        return total

    def _answer_loss(self, track: str, level: int, batch: Batch) -> Tensor:
        loss, right = self.answer(batch)
        self._note(f"loss_{track}", loss.detach())
        counts = family_counts(batch, right)
        self.curriculum.count(track, level, *counts)
        return loss

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the answer tokens and which questions `[Q]` are all right.

        Each answer token is predicted behind the right ones before it. An answer is right when
        every token, the closing one included, is the most likely: exactly then greedy decoding
        gives it.
        """
        logits, target = self._logits(batch)
        owners = torch.from_numpy(batch.answer_segments).to(self.device)
        wrong = (logits.argmax(-1) != target).float()
        mistakes = torch.zeros(len(batch.families), device=self.device).index_add(0, owners, wrong)
        return functional.cross_entropy(logits, target), mistakes == 0

    @torch.no_grad()
    def first_logits(self, batch: Batch) -> Tensor:
        """Return the logits `[V]` of the first answer token."""
        return self._logits(batch)[0][0].cpu()

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits `[A, V]` of all answer tokens, and the tokens `[A]`."""
        ids, positions, segments, answers = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.ids, batch.positions, batch.segments, batch.answers)
        )
        with self._autocast():
            features = None
            if batch.pixels is not None:
                with torch.no_grad():
                    pixels = torch.from_numpy(batch.pixels).to(self.device)
                    shown = torch.from_numpy(batch.patches).to(self.device)
                    features = self.model.patches(pixels).flatten(0, 1)[shown]
            mask = attention_mask(segments, torch.bfloat16 if self.recipe.half else torch.float32)
            logits = self.model.answer_logits(ids, positions, mask, answers, features)
        return logits.float(), ids[:, 1:][answers[:, 1:]]

    def _note(self, name: str, value: Tensor) -> None:
        total = self._window.get(name, 0.0)
        self._window[name] = total + float(value)

    def end_window(self) -> dict[str, Any]:
        """Return a line for the log and let the curriculum look at its window."""
        line: dict[str, Any] = {
            "step": self.step,
            "phase": self.phase,
            "seconds": round(self.seconds, 1),
            "rate": self.rate(),
            "levels": dict(self.curriculum.levels),
        }
        line |= {name: round(value / WINDOW, 4) for name, value in self._window.items()}
        accuracy = self.curriculum.accuracy()
        line["accuracy"] = {family: round(value, 4) for family, value in accuracy.items()}
        self.curriculum.advance()
        self._window = {}
        return line

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to go on as if never interrupted."""
        return {
            "recipe": asdict(self.recipe),
            "spec": asdict(self.model.spec),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "curriculum": self.curriculum.to_dict(),
            "window": dict(self._window),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], change_recipe: bool = False) -> None:
        """Go on from `state_dict` of an equal recipe, or of any recipe with `change_recipe`.

        Raises:
            StateError: The state belongs to another recipe or another model.
        """
        own = {"recipe": asdict(self.recipe), "model": asdict(self.model.spec)}
        saved = {"recipe": state["recipe"], "model": state["spec"]}
        for name in ("model",) if change_recipe else ("recipe", "model"):
            differing = [key for key in own[name] if own[name][key] != saved[name].get(key)]
            for key in differing[:1]:
                raise StateError(
                    f"{name} of a resumed run must be the one it began with, got "
                    f"{key}={own[name][key]} instead of {saved[name].get(key)}; "
                    "choose another --state folder"
                    + ("" if name == "model" else ", or pass --change-recipe")
                )
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizers = self._build_optimizers()
        for optimizer, saved_moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_moments)
        self.curriculum = Curriculum.from_dict(
            state["curriculum"]
            | {"threshold": self.recipe.threshold, "patience": self.recipe.patience}
        )
        self._window = dict(state["window"])
        torch.set_rng_state(state["rng"])


def family_counts(batch: Batch, right: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many questions of each family are right, and how many there are."""
    flags = right.cpu().numpy()
    asked = np.bincount(batch.families, minlength=len(FAMILIES))
    correct = np.bincount(batch.families[flags], minlength=len(FAMILIES))
    present = {FAMILIES[i]: i for i in np.flatnonzero(asked).tolist()}
    return (
        {family: int(correct[i]) for family, i in present.items()},
        {family: int(asked[i]) for family, i in present.items()},
    )
