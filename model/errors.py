"""What can go wrong with encoders and releases, named by what the caller should do.

    ModelError
    ├── WeightsUnavailable       get the encoder's files, or name others
    ├── EncoderSettingsInvalid   change a setting (also a ValueError)
    ├── NonFiniteVectors         raise the precision, or take another base
    ├── PackageMissing           install an optional package, or do without
    ├── NothingToLearn           wait for more events, or take a longer span of them
    └── ReleaseError
        ├── ReleaseMissing       build a release, or point at the right folder
        ├── ReleaseCorrupt       delete the folder and build it again
        ├── ReleaseTooNew        upgrade this process
        ├── ReleaseOvertaken     another release went live: train from that one
        └── ReleaseUnwritable    make room, or name another folder

Each message is one line that says what is wrong and what to do about it, so that a
command-line tool can print it as it is.
"""

from __future__ import annotations


class ModelError(Exception):
    """Any failure of this package that its caller can do something about."""


class WeightsUnavailable(ModelError):
    """The encoder's files are not where they were said to be, or are not an encoder's."""


class EncoderSettingsInvalid(ModelError, ValueError):
    """A setting that this encoder or this machine cannot follow."""


class NonFiniteVectors(ModelError):
    """The tower gave NaN or infinity. Nothing was returned, so no profile was spoilt."""


class PackageMissing(ModelError):
    """What was asked for needs a package that is not installed."""


class NothingToLearn(ModelError):
    """The windows, or the catalogue, hold nothing that a model could be trained on."""


class ReleaseError(ModelError):
    """A release folder that cannot be used."""


class ReleaseMissing(ReleaseError):
    """There is no release where one was looked for."""


class ReleaseCorrupt(ReleaseError):
    """A release's files are not those that its manifest promises."""


class ReleaseTooNew(ReleaseError):
    """The release was written in a later format than this process reads."""


class ReleaseOvertaken(ReleaseError):
    """Another release went live since the one that this was measured against."""


class ReleaseUnwritable(ReleaseError):
    """The releases folder cannot be written to."""
