"""Registries of classes that a user chooses by name, each class registered in the file that defines it.

@register_sampler("ddim")           # in bidm_cli/sampling/samplers/ddim.py, or in a module of your own
class DDIM(Sampler): ...

SAMPLERS.find("ddim")               # the class
SAMPLERS.names()                    # what recipes and ``sampler`` take
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from bidm_cli.errors import BidmError

Class = TypeVar("Class", bound=type)


class Registry:
    """Classes by name.

    Args:
        what: what the classes are, for messages.
        home: package whose modules register bidm's own classes; imported at the first look-up, so that rooms
            below it can check names without importing upward.
    """

    def __init__(self, what: str, home: str) -> None:
        self.what = what
        self._home: str | None = home
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Class decorator that makes a class available as ``name``.

        Raises:
            ValueError: another class has that name.
        """

        def add(cls: Class) -> Class:
            known = self._classes.setdefault(name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"the {self.what} {name!r} is registered twice: {known!r} and {cls!r}")
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._import_home()
        return sorted(self._classes)

    def find(self, name: str) -> Any:
        """Class registered as ``name``; BidmError if there is none."""
        self._import_home()
        if name not in self._classes:
            raise BidmError(f"unknown {self.what} {name!r}; use {', '.join(self.names())}")
        return self._classes[name]

    def _import_home(self) -> None:
        if self._home is not None:
            package = importlib.import_module(self._home)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._home}.{module.name}")
            self._home = None


SAMPLERS = Registry("sampler", "bidm_cli.sampling.samplers")
"""Samplers by the names that recipes and ``sampler`` use (:mod:`bidm_cli.sampling.samplers.base`)."""
