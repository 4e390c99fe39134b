"""How far a run is, and when it validates, saves and ends: counted in steps, or within a given wall-clock time."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.support.console import counted, duration

# The first validation, which tells how long one takes, comes after this part of the time for training or these seconds;
# after that they take, with the checkpoints that follow them, about a twentieth of the time together.
FIRST_VALIDATION_PART, FIRST_VALIDATION_SECONDS = 0.2, 600.0
STEPS_PER_VALIDATION_TIME = 19.0
# On top of what validation and saving took before, and for the end of the program.
SAFETY, MARGIN_SECONDS, MARGIN_PART = 1.15, 1.0, 0.005
# On top of that for the last validation, which may be shorter than what one step differs from another.
SLACK_SECONDS, SLACK_PART = 1.0, 0.005
# What held-out scores take: distances and files on top of each case's prediction, and the report about all.
HELD_OUT_TIMES, REPORT_SECONDS, REPORT_PART = 2.0, 5.0, 0.1
# No more of the budget is kept free for them: cases for which it is too little are left out.
HELD_OUT_PART = 0.15
# To tell the time left: steps over which the mean time of one is taken.
TYPICAL_STEPS = 50
_POWER = 0.9  # of the polynomial schedule, as in nnU-Net


def learning_rate(config: OptimizerConfig, progress: float, updates: int) -> float:
    """The rate after `progress` (0 to 1), with a linear warm-up over the number of updates already made."""
    cosine, passed = config.scheduler == "CALR", min(progress, 1)
    left = (1 + math.cos(math.pi * passed)) / 2 if cosine else (1 - passed) ** _POWER
    rate = config.eta_min + (config.lr - config.eta_min) * left
    return rate * min(updates + 1, config.warmup_steps) / config.warmup_steps if config.warmup_steps else rate


def progress_in_steps(config: OptimizerConfig, updates: int) -> float:
    """Share of the periods of a constant rate that have passed after so many updates."""
    # The published loop steps its scheduler after the first update of the next epoch.
    late = int(config.schedule_step == "published")
    return min(max((updates - late) // config.steps_per_period, 0), config.t_max) / config.t_max


def report_seconds(budget: float) -> float:
    """What is kept free for a report, of a budget in seconds."""
    return min(REPORT_SECONDS, REPORT_PART * budget)


class Decision(NamedTuple):
    """After a step: whether it was the last, whether a validation is due, and the part of the time that is spent."""

    last: bool
    validate: bool
    fraction: float


class TimeBudget:
    """Time of a run in seconds since `started`, the start of the program; a resumed run goes on with what was spent.

    seconds: the budget, infinite for none; what is left of it after the first step is cut to one part in `parts`.
    to_first_step: of spent_before, the part until the first step was done. from_first_step: what a process does until
    its first step is done, such as compiling, takes nothing of the budget, nor do the scores at the end (`has_scores`).
    held_out: cases that are predicted at the end, as a multiple of those of a validation. validation_steps: steps that
    take as long as a validation probably does, until one is measured.
    """

    def __init__(
        self,
        seconds: float = math.inf,
        started: float = 0.0,
        spent_before: float = 0.0,
        to_first_step: float | None = None,
        parts: int = 1,
        from_first_step: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds, self.parts, self.held_out, self.validation_steps = seconds, parts, 0.0, 0.0
        self._clock, self._origin = clock, started - spent_before
        self.to_first_step, self._spent_before, self._waits = to_first_step, spent_before, from_first_step
        self.has_scores = not from_first_step
        self._steps: deque[float] = deque(maxlen=8)
        self._step_ended: float | None = None
        self._measured, self._step_seconds = 0, 0.0  # steps measured, and the mean time of the last ones
        self._validated: float | None = None
        self._validation_seconds = self._saving_seconds = 0.0
        self._compiled = False  # within _validation_seconds
        self.ended = self.ended_before = False  # by the last decision, and by the last checkpoint

    @property
    def limited(self) -> bool:
        """Whether there is an end in time at all."""
        return math.isfinite(self.seconds)

    def spent(self) -> float:
        """Seconds since the start, or since the first step where the budget begins with that."""
        return self._spent_before if self._waits else self._clock() - self._origin

    def left(self) -> float:
        """Seconds until the end of the budget."""
        return self.seconds - self.spent()

    def fraction(self) -> float:
        """Part of the budget that is spent, 0 to 1, counted from the end of the first step on."""
        if self.to_first_step is None:
            return 0.0
        training = self.seconds - self.to_first_step
        return min((self.spent() - self.to_first_step) / training, 1.0) if training > 0 else 1.0

    def step_ended(self) -> None:
        """Measure: a step has just ended."""
        if self._waits:
            self._waits, self._origin = False, self._clock() - self._spent_before
        now = self.spent()
        if self.to_first_step is None:
            self.to_first_step = now
            # The networks after this one do not compile, and shall have as much time to train.
            self.seconds, self.parts = now + max(self.seconds - now, 0.0) / self.parts, 1
        if self._step_ended is not None:
            self._steps.append(now - self._step_ended)
            self._measured += 1
            self._step_seconds += (self._steps[-1] - self._step_seconds) / min(self._measured, TYPICAL_STEPS)
        self._step_ended = now

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Measure a validation."""
        begun = self.spent()
        yield
        self._compiled = self._validated is None
        self._validated, self._step_ended = self.spent(), None
        self._validation_seconds = self._validated - begun

    def expect_validation(self, seconds: float | None) -> None:
        """How long the next validation takes, where the last one tells (the first one compiles)."""
        if seconds is not None:
            self._validation_seconds, self._compiled = seconds, False

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the writing of the checkpoints of a validation."""
        begun = self.spent()
        yield
        # The longest: most write `last` alone, some `best` before it.
        self._saving_seconds, self._step_ended = max(self._saving_seconds, self.spent() - begun), None

    def margin(self) -> float:
        """Seconds kept free for the end of the program."""
        return min(MARGIN_SECONDS + MARGIN_PART * self.seconds, 0.05 * self.seconds)

    def held_out_seconds(self, part: float = 1.0) -> float:
        """Seconds that scores and report of the held-out cases take, or those of a `part` of the cases; none where the
        budget does not include them."""
        if not self.held_out or not self.has_scores:
            return 0.0
        report = report_seconds(self.seconds)
        times = HELD_OUT_TIMES * part * self.held_out
        return (min(times, 1.0) if self._compiled else times) * self._validation_seconds + report

    def expected(self, steps: int, validations: int) -> float | None:
        """Seconds that so many of both, and the held-out scores after them, probably take; None before a step is known.

        Means of what was measured, so that it falls evenly.
        """
        if not self._measured:
            return None
        measured = self._validated is not None and not self._compiled
        validation = self._validation_seconds if measured else self.validation_steps * self._step_seconds
        seconds = steps * self._step_seconds + validations * (validation + self._saving_seconds)
        return seconds + (HELD_OUT_TIMES * self.held_out * validation + REPORT_SECONDS if self.held_out else 0.0)

    def must_save(self) -> bool:
        """Whether a validation has to be given up, so that the checkpoint is still written in time."""
        return self.limited and self.left() < SAFETY * self._saving_seconds + self.margin()

    def decide(self) -> Decision:
        """What comes after the step that has been started; the same on every host."""
        if not self.limited:
            return Decision(False, False, 0.0)
        step = max(self._steps, default=0.0)
        reserve = SAFETY * (self._validation_seconds + self._saving_seconds) + self.margin()
        reserve += min(SLACK_SECONDS, SLACK_PART * self.seconds)
        reserve += min(self.held_out_seconds(), HELD_OUT_PART * self.seconds)
        # The step under way ends first, and one more has to fit.
        last = self.ended_before or self.left() - reserve < 2 * step
        decision = np.array([last, self._validation_due(reserve), self.fraction()], np.float32)
        if jax.process_count() > 1:
            decision = np.asarray(multihost_utils.broadcast_one_to_all(decision))
        self.ended = bool(decision[0])
        return Decision(self.ended, bool(decision[1]), float(decision[2]))

    def _validation_due(self, reserve: float) -> bool:
        spent = self.spent()
        if self._validated is None:
            trained = 0.0 if self.to_first_step is None else spent - self.to_first_step
            return self.fraction() >= FIRST_VALIDATION_PART or trained >= FIRST_VALIDATION_SECONDS
        # With few cases the checkpoints take longer than the validation.
        pause = STEPS_PER_VALIDATION_TIME * (self._validation_seconds + self._saving_seconds)
        # Not so late that the last one follows at once.
        return spent - self._validated >= pause + self._saving_seconds and self.left() - reserve >= pause

    def to_json(self, validated: bool = True) -> dict[str, Any]:
        """What a run of a given time has to know of itself to be continued. validated: after its last step."""
        if not self.limited:
            return {}
        return {
            "seconds_in_all": self.seconds,
            "seconds_spent": self.spent(),
            "seconds_to_first_step": self.to_first_step,
            "ended": self.ended and validated,
        }


class Timeline:
    """Seconds of a process by what it did, one thing at a time: together they are all that has passed since `began`."""

    def __init__(self, began: float | None = None):
        self._seconds, self._doing = {"start": 0.0}, "start"
        self._since = time.monotonic() if began is None else began

    def begin(self, what: str) -> None:
        """Count what passes from now on for this."""
        now = time.monotonic()
        self._seconds[self._doing] += now - self._since
        self._seconds.setdefault(what, 0.0)
        self._doing, self._since = what, now

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Count what passes within for this, and afterwards for what went before."""
        before = self._doing
        self.begin(what)
        yield
        self.begin(before)

    def to_json(self) -> dict[str, float]:
        """Seconds until now of each, in the order in which they began."""
        self.begin(self._doing)
        return {what: round(seconds, 1) for what, seconds in self._seconds.items()}


class Clock(NamedTuple):
    """When the program started, the seconds that it is given, and the number of networks that they are for.

    from_first_step: see `TimeBudget`.
    """

    started: float = 0.0
    seconds: float = math.inf
    parts: int = 1
    from_first_step: bool = False

    def budget(self, earlier: Mapping[str, Any] | None) -> TimeBudget:
        """The time of a run, which goes on with what it has spent according to its last checkpoint."""
        known = earlier or {}
        budget = TimeBudget(
            known.get("seconds_in_all", self.seconds),
            self.started,
            known.get("seconds_spent", 0.0),
            None if earlier is None else known.get("seconds_to_first_step", 0.0),
            parts=self.parts if earlier is None else 1,
            from_first_step=self.from_first_step,
        )
        # What is left then is for the scores of the cases held out.
        budget.ended_before = known.get("ended", False)
        return budget


class Due(NamedTuple):
    """What is due after a step, and the learning rate of the next one."""

    validate: bool
    save: bool
    stop: bool
    rate: float


@dataclass(frozen=True)
class Schedule:
    """When things happen. Within a budget `total_steps` is None, and `val_every` None leaves validations to it."""

    optimizer: OptimizerConfig
    total_steps: int | None
    steps_per_epoch: int
    val_every: int | None
    checkpoint_every: int | None = None
    budget: TimeBudget = field(default_factory=TimeBudget)

    def after(self, step: int) -> Due:
        """What is due after `step` updates; the same on every host."""
        last, validate, fraction = self.budget.decide()
        # The budget says when to validate where the user did not.
        validate = (validate and self.val_every is None) or self.validates(step) or last
        progress = fraction if self.total_steps is None else progress_in_steps(self.optimizer, step)
        return Due(
            validate=validate,
            save=validate or _divides(self.checkpoint_every, step),
            stop=last or self.ends(step),
            rate=learning_rate(self.optimizer, progress, step),
        )

    def done(self, step: int) -> tuple[float, float | None]:
        """How far a run is after a step, and how far it goes: in seconds where they are limited, else in steps."""
        if self.budget.limited:
            return self.budget.spent(), self.budget.seconds
        return step, self.total_steps

    def seconds_left(self, step: int, validated: bool) -> float | None:
        """Time from the end of a step, or of its validation, until that of the run; None where nothing tells."""
        if self.budget.limited:
            return max(self.budget.left(), 0.0) / self.budget.parts
        if self.total_steps is None:
            return None
        total, begin, every = self.total_steps, step + validated, self.val_every or self.total_steps
        validations = total // every - (begin - 1) // every + (total % every > 0) if begin <= total else 0
        return self.budget.expected(total - step, validations)

    def validates(self, step: int) -> bool:
        """Whether the number of steps asks for a validation."""
        return _divides(self.val_every, step) or step == self.total_steps

    def ends(self, step: int) -> bool:
        """Whether the number of steps is reached."""
        return self.total_steps is not None and step >= self.total_steps

    def __str__(self) -> str:
        length = f"{self.total_steps} steps"
        if self.budget.limited:
            length = f"{duration(self.budget.seconds)}, of which {duration(self.budget.spent())} are spent"
            if self.budget.parts > 1:
                length = f"1/{self.budget.parts} of what the first step leaves of {length}"
        validation = (
            "validation as time allows" if self.val_every is None else f"validation every {self.val_every} steps"
        )
        return f"{length}; {counted(self.steps_per_epoch, 'step')} an epoch; {validation}"


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
