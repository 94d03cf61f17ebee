"""Every error that llmsqueeze raises on purpose, and the exit code that the command line gives it.

LlmsqueezeError
├── RecipeError        2   the request itself is wrong: option, pattern, method
│   └── ResumeError    2   the state that is there is another run's, or there is none
├── CheckpointError    3   the checkpoint is missing, damaged, unsupported or inconsistent
│   ├── SourceChanged  3   its files were changed while they were read
│   └── SourceDamaged  3   a tensor of it holds what is no number
├── DataError          3   calibration or evaluation text is missing, unreadable or too short
├── CalibrationError   3   the model produced values that no statistic can use
├── EnvironmentFault   4   a package, device or service that the request needs is not there
├── ResourceError      5   out of memory or disk
├── Stopped           75   stopped on request where the same command can go on
└── RankLost          75   another process of the same run is gone

A message is one line that says what is wrong and what to do about it.
"""

from __future__ import annotations


class LlmsqueezeError(Exception):
    """Base of all expected failures; anything else that escapes is a bug (exit code 70)."""

    exit_code = 70


class RecipeError(LlmsqueezeError):
    """key: the path of what is wrong in a recipe file, ("prune", "target", "sparsity"); () if it is none."""

    exit_code = 2

    def __init__(self, reason: str = "", key: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.key = reason, key

    def __str__(self) -> str:
        return f"recipe: {'.'.join(self.key)}: {self.reason}" if self.key else self.reason

    def within(self, section: str) -> RecipeError:
        """The same, of a recipe that is a section of another."""
        return RecipeError(self.reason.removeprefix("recipe: "), (section, *self.key))


class ResumeError(RecipeError):
    pass


class CheckpointError(LlmsqueezeError):
    exit_code = 3


class SourceChanged(CheckpointError):
    pass


class SourceDamaged(CheckpointError):
    pass


class DataError(LlmsqueezeError):
    exit_code = 3


class CalibrationError(LlmsqueezeError):
    exit_code = 3


class EnvironmentFault(LlmsqueezeError):
    exit_code = 4


class ResourceError(LlmsqueezeError):
    exit_code = 5


class Stopped(LlmsqueezeError):
    exit_code = 75


class RankLost(LlmsqueezeError):
    exit_code = 75
