"""The errors a caller may want to tell apart.

SlipstreamError
├── ModelError        a model cannot be loaded or served; the user can mend it
│   ├── MisfitError       … and is not damaged: it is for another model, or of a newer version of Slipstream
│   └── UnreadableError   … at the moment: the operating system does not let its files be read
├── NoPlaceError      there is no place or no memory for it, which says nothing about it
├── SupersededError   a later decision came before this one took effect
├── RequestError      a request asks for what cannot be computed, and would again
├── ConfigError       an option is wrong; the user can mend it
└── EngineDiedError   the engine process is gone
    └── EngineLostError   … and is not started again; requests cannot be served any more
"""

from typing import Literal


class SlipstreamError(Exception):
    """Base of every error this project raises on purpose."""


class ModelError(SlipstreamError):
    """A model file is missing, broken, too large or of a kind that cannot be served."""


class MisfitError(ModelError):
    """A model file is sound, but not for what it would be used with here."""


class UnreadableError(ModelError):
    """The files of a model cannot be read now, which says nothing about what is in them."""


class NoPlaceError(SlipstreamError):
    """What was to be loaded has no place here, or no memory at the moment; it may be sound."""


class SupersededError(SlipstreamError):
    """What was decided is not done any more, because something else was decided since."""


class RequestError(SlipstreamError):
    """What a request asks for cannot be computed; the same would fail again."""


class ConfigError(SlipstreamError):
    """A configuration value is wrong or does not fit the others."""


class EngineDiedError(SlipstreamError):
    """The engine process ended while it was needed."""


class EngineLostError(EngineDiedError):
    """The engine process ended too often, or could not be started again."""


def kind_of(error: SlipstreamError) -> Literal["failed", "refused", "misfit", "superseded"]:
    """What who asked an engine for something is told of its failure: "refused" and "misfit" are verdicts on what was
    asked for, the others are none."""
    if isinstance(error, SupersededError):
        return "superseded"
    if isinstance(error, MisfitError):
        return "misfit"
    is_verdict = isinstance(error, ModelError | ConfigError) and not isinstance(error, UnreadableError)
    return "refused" if is_verdict else "failed"
