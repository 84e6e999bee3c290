"""A user's callbacks: methods with the names of Lightning's hooks, which the training loop calls. No torch.

A callback is code, so its name is taken from a recipe or the command line alone, never from a configuration that was stored.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.log import logger

HOOKS = (
    "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_end",
    "on_save_checkpoint", "on_train_end", "on_exception",
)  # fmt: skip
"""Those that are called, with the arguments that Lightning gives them."""
OTHER_HOOKS = ("setup", "teardown", "state_dict", "load_state_dict")
"""Lightning's hooks whose names do not begin with `on_`."""
LIBRARIES = ("lightning", "pytorch_lightning")
"""Packages whose class `Callback` has every hook, doing nothing."""


class UserCallbacks:
    """Callbacks in the order in which they are called."""

    def __init__(self, callbacks: Sequence[object]):
        self._callbacks = callbacks

    def call(self, hook: str, *arguments: object) -> None:
        """Call one of `HOOKS` of each callback that has it.

        Raises:
            UserError: a callback has failed; its traceback is in the log.
        """
        assert hook in HOOKS
        for callback in self._callbacks:
            method = getattr(callback, hook, None)
            if method is None:
                continue
            try:
                method(*arguments)
            except UserError:
                raise
            except Exception as error:
                name = f"{type(callback).__module__}.{type(callback).__qualname__}"
                logger.exception("%s.%s failed", name, hook)
                raise UserError(
                    "callbacks",
                    f"{name}.{hook} raised {type(error).__name__}: {error}",
                    "a callback that leaves training alone",
                    "Its traceback is above. The newest checkpoint is good; mend the callback or leave it out, and repeat the command.",
                ) from error


def load_callbacks(paths: Sequence[str]) -> list[object]:
    """Make the callbacks that `callbacks` names by the path to import them by, such as `my_package.watching.Watcher`.

    Raises:
        UserError: a path does not import, or what it leads to is no callback.
    """
    callbacks = []
    for path in paths:
        make = import_callback(path)
        try:
            callback = make()
        except Exception as error:
            logger.exception("%s() failed", path)
            raise _wrong(path, f"cannot be made: {type(error).__name__}: {error}") from error
        _check_hooks(path, type(callback))
        callbacks.append(callback)
    return callbacks


def check_callbacks(paths: Sequence[str]) -> None:
    """Import the callbacks without making them; raises UserError as `load_callbacks`."""
    for path in paths:
        if isinstance(make := import_callback(path), type):
            _check_hooks(path, make)


def import_callback(path: str) -> Callable[[], object]:
    """Return what an import path leads to: a class, or a function that makes a callback."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise _wrong(path, "is no path to import")
    # Where the command is run: workers look there first, and a launcher that was started from elsewhere is to agree with them.
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError):
            logger.exception("importing %s failed", module_name)
        raise _wrong(path, f"cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        own = [other for other, value in vars(module).items() if isinstance(value, type)]
        raise _wrong(path, f"is not there: {module_name} has no {name}", nearest(name, own))
    if not callable(found):
        raise _wrong(path, f"is a {type(found).__name__}")
    return found


def _check_hooks(path: str, kind: type) -> None:
    """Refuse what has no hook, and a hook that would never be called."""
    own = {
        name
        for base in kind.__mro__
        if not (base.__name__ == "Callback" and base.__module__.partition(".")[0] in LIBRARIES)
        for name, value in vars(base).items()
        if callable(value) and (name.startswith("on_") or name in OTHER_HOOKS)
    }
    if uncalled := sorted(own - set(HOOKS)):
        raise _wrong(path, f"has {', '.join(uncalled)}, which the training loop does not call")
    if not own:
        raise _wrong(path, "has none of the methods that the training loop calls")


def _wrong(path: str, problem: str, fix: str = "") -> UserError:
    return UserError(
        "callbacks",
        f"{path} {problem}",
        f"the import path of a class with some of the methods {', '.join(HOOKS)}, in the folder of the command or on PYTHONPATH",
        fix,
    )
