"""The space module: finding it, digesting it, and, in trial-side processes only, executing it."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import tokenize
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search import secrecy
from search.definition import moving
from search.errors import HeldoutError, SpaceError, TrialFailed

_CHECKOUT_SPACES = Path(__file__).resolve().parent.parent.parent / "spaces"
_SHIPPED_SPACES = Path(__file__).resolve().parent.parent / "shipped"
DEFAULT_EPOCHS = 30  # of a trial whose module and parameters do not say
_OWN_PACKAGES = {"search", "heldout"}


@dataclass(frozen=True)
class Problem:
    """One space module as text: what a study records and a trial-side process executes.

    Attributes:
        name: The file's stem; names the study and the MLflow experiment.
        path: Absolute path, for messages and for imports from the module's own folder.
        source: The text that was read when the study was opened. Trials execute this text, so an
            edit made while a study runs, or after it, does not change the study.
    """

    name: str
    path: str
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def to_json(self) -> dict[str, str]:
        """A JSON object for journal and jobs."""
        return asdict(self)

    def imports(self) -> list[str]:
        """Third-party modules that a trial would import, for the template to preload.

        Those inside ``load()`` and ``prepare()`` are left out: no trial calls them. They are read from the syntax tree:
        the module itself is never executed for this.
        """
        folder = Path(self.path).parent
        found: dict[str, None] = {}
        for node in _walk_but_load(ast.parse(self.source)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                root = name.split(".")[0]
                local = (folder / f"{root}.py").exists() or (folder / root).is_dir()
                if root not in sys.stdlib_module_names and root not in _OWN_PACKAGES and not local:
                    found[name] = None
        return list(found)


def folders() -> tuple[Path, Path]:
    """Where the spaces that come with Heldout are: one of the two is there, by how it was installed."""
    return _SHIPPED_SPACES, _CHECKOUT_SPACES


def shipped() -> list[str]:
    """Short names of the spaces that come with Heldout."""
    return sorted(
        {p.stem for folder in folders() for p in folder.glob("*.py")} - {"__init__"}
    )


def find(space: str) -> Problem:
    """The space module named by a path, a dotted name, or the short name of a shipped space.

    Raises:
        SpaceError: If there is no such module, it does not parse, or it lacks a part of the contract.
    """
    path = _locate(space)
    try:
        with tokenize.open(path) as file:  # by the encoding that the file declares, as Python itself reads it
            source = file.read()
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise SpaceError(f"{path}:{error.lineno}: the space module must be valid Python, but {error.msg}") from None
    except (OSError, ValueError) as error:
        raise SpaceError(f"cannot read the space module {path}: {error}") from None
    _check_names(path, tree)
    return Problem(name=path.stem, path=str(path), source=source)


def _locate(space: str) -> Path:
    given = Path(space).expanduser()
    if given.is_file():
        return given.resolve()
    if given.is_dir():
        raise SpaceError(f"a space is one Python file, but {space} is a folder; name the file in it")
    if os.sep in space or space.endswith(".py"):
        near = difflib.get_close_matches(given.stem, shipped(), n=1)
        hint = f"; did you mean the shipped space `{near[0]}`?" if near else ""
        raise SpaceError(f"no such file: {space}{hint}")
    for folder in folders():
        if (folder / f"{space}.py").is_file():
            return (folder / f"{space}.py").resolve()
    found = _module_file(space)
    if found is not None:
        return found
    raise SpaceError(
        f"no space called {space!r}: give a path (spaces/my_space.py), a dotted module name, "
        f"or one of the shipped spaces: {', '.join(shipped())}"
    )


def _module_file(name: str) -> Path | None:
    """The file of a dotted name, without importing the packages above it: that would execute the user's code here."""
    top, *rest = name.split(".")
    sys.path.insert(0, os.getcwd())
    try:
        # The second is for editable installs; of a space that `try_params` executed here it knows nothing.
        found = importlib.machinery.PathFinder.find_spec(top) or importlib.util.find_spec(top)
        for number, _ in enumerate(rest, start=2):
            if found is None or found.submodule_search_locations is None:
                return None
            part = ".".join(name.split(".")[:number])
            found = importlib.machinery.PathFinder.find_spec(part, list(found.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    finally:
        sys.path.pop(0)
    file = None if found is None else found.origin
    return Path(file).resolve() if file is not None and file.endswith(".py") else None


def _check_names(path: Path, tree: ast.Module) -> None:
    """Refuse at once, before any slow import, a module that plainly lacks a part of the contract."""
    names = set(_top_level_names(tree))
    if "*" in names:
        return
    if "load" not in names:
        raise SpaceError(f"{path}: a space module must define load(); add `def load(): return Dataset(x, y)`")
    if not names & {"build", "hypermodel"}:
        raise SpaceError(f"{path}: a space module must define build(hp) (or `hypermodel = ...`); add `def build(hp):`")
    if "objective" not in names:
        raise SpaceError(f'{path}: a space module must name its objective; add `objective = "val_accuracy"`')


def _walk_but_load(tree: ast.Module) -> Iterator[ast.AST]:
    for statement in tree.body:
        if not (isinstance(statement, ast.FunctionDef) and statement.name in ("load", "prepare")):
            yield from ast.walk(statement)


def _top_level_names(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        else:
            yield from _top_level_names(child)


class SpaceModule:
    """An executed space module, with its contract checked. Lives in trial-side processes only.

    Raises:
        SpaceError: If executing the module fails or a part has the wrong type.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._module = types.ModuleType(problem.name if problem.name not in sys.modules else f"{problem.name}_space")
        self._module.__file__ = problem.path
        sys.modules[self._module.__name__] = self._module
        sys.path.insert(0, str(Path(problem.path).parent))
        with self.blaming("the module"):
            exec(compile(problem.source, problem.path, "exec"), self._module.__dict__)
        self._hypermodel = self._get("hypermodel")
        self._is_of_hyperopt = moving.is_of_hyperopt(self._get("space"))
        self._check()

    def _get(self, name: str) -> Any:
        return getattr(self._module, name, None)

    def _check(self) -> None:
        where = self.problem.path
        if not isinstance(self.objective, str) or not self.objective.startswith("val_"):
            named = isinstance(self.objective, str) and self.objective
            hint = f', which is the value on train rows; write "val_{self.objective}"' if named else ""
            raise SpaceError(
                f'{where}: objective must be a validation metric such as "val_accuracy", but got '
                f"{self.objective!r}{hint}"
            )
        if self.direction not in (None, "min", "max"):
            raise SpaceError(f'{where}: direction must be "min" or "max", but got {self.direction!r}')
        if self.epochs is not None and (not isinstance(self.epochs, int) or self.epochs < 1):
            raise SpaceError(f"{where}: epochs must be a whole number of at least 1, but got {self.epochs!r}")
        for name in ("load", "build", "fit", "preprocess", "callbacks", "class_weight", "decode", "prepare"):
            part = self._get(name)
            if part is not None and not callable(part):
                raise SpaceError(f"{where}: {name} must be a function, but it is {type(part).__name__}")
        if not isinstance(self.assets, list | tuple) or not all(isinstance(a, str | os.PathLike) for a in self.assets):
            raise SpaceError(f"{where}: assets must be a list of paths, but got {self.assets!r}")
        if self._get("load") is None:
            raise SpaceError(f"{where}: a space module must define load(); add `def load(): return Dataset(x, y)`")
        if self._get("build") is None and self._hypermodel is None:
            raise SpaceError(f"{where}: a space module must define build(hp) (or `hypermodel = ...`)")
        if self._get("build") is None and not _is_hypermodel(self._hypermodel):
            is_function = isinstance(self._hypermodel, types.FunctionType)
            got = "a function; call it build" if is_function else repr(self._hypermodel)
            raise SpaceError(f"{where}: hypermodel must be an instance of a keras_tuner.HyperModel, but is {got}")

    @property
    def namespace(self) -> dict[str, Any]:
        """Everything that the module holds, by name."""
        return vars(self._module)

    @property
    def objective(self) -> Any:
        """The name of the validation metric that is searched for, such as ``val_accuracy``."""
        return self._get("objective")

    @property
    def direction(self) -> Any:
        """``"min"``, ``"max"``, or None for the scorer's own table."""
        return self._get("direction")

    @property
    def epochs(self) -> Any:
        """Epochs of one trial as the module sets them, or None."""
        return self._get("epochs")

    @property
    def allow_nan(self) -> bool:
        """Whether the module's model copes with NaN among the features."""
        return bool(self._get("allow_nan"))

    @property
    def preprocess(self) -> Callable[[Any], Any] | None:
        """The module's ``preprocess(train)``, or None."""
        part: Callable[[Any], Any] | None = self._get("preprocess")
        return part

    @property
    def prepare(self) -> Callable[[], Any] | None:
        """The module's ``prepare()``, or None."""
        part: Callable[[], Any] | None = self._get("prepare")
        return part

    @property
    def assets(self) -> Any:
        """Paths of what the module needs beside its rows."""
        given = self._get("assets")
        return [] if given is None else given

    @property
    def decode(self) -> Callable[[str], Any] | None:
        """The module's ``decode(path)``, or None."""
        part: Callable[[str], Any] | None = self._get("decode")
        return part

    def load(self) -> Any:
        """The module's rows, as ``load()`` returns them."""
        with self.blaming("load()"):
            return self._get("load")()

    def build(self, hp: Any) -> Any:
        """The module's model for these hyperparameters."""
        build = self._get("build")
        if build is None:
            return self._hypermodel.build(hp)
        return build(moving.hyperopt_params(self._get("space"), hp) if self._is_of_hyperopt else hp)

    @property
    def fit(self) -> Callable[..., Any] | None:
        """The module's own ``fit(hp, model, ...)``, a HyperModel's if it overrides it, or None."""
        own: Callable[..., Any] | None = self._get("fit")
        if own is not None or self._hypermodel is None:
            return own
        import keras_tuner

        kind = type(self._hypermodel)
        overridden = isinstance(self._hypermodel, keras_tuner.HyperModel) and kind.fit is not keras_tuner.HyperModel.fit
        theirs: Callable[..., Any] | None = self._hypermodel.fit if overridden else None
        return theirs

    def callbacks(self, hp: Any) -> list[Any]:
        """Fresh callbacks of the module for one trial, or none."""
        part = self._get("callbacks")
        return list(part(hp)) if part is not None else []

    def class_weight(self, hp: Any) -> dict[int, float] | None:
        """What the module lets a row of each class weigh in training, or None."""
        part = self._get("class_weight")
        return dict(part(hp)) if part is not None else None

    def line(self, error: BaseException) -> str:
        """``path:line`` of the innermost frame of ``error`` in the module's folder, or the path alone."""
        folder = str(Path(self.problem.path).parent) + os.sep
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            # A virtual environment may be in the same folder, and a library's line is not the one to change.
            if frame.filename.startswith(folder) and "site-packages" not in frame.filename
        ]
        return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else self.problem.path

    def blaming(self, what: str) -> _Blaming:
        """A context that turns any exception into a SpaceError naming the module's line."""
        return _Blaming(self, what)


def _is_hypermodel(given: Any) -> bool:
    """Whether it has KerasTuner's way to build; its class is not asked for, which would need a slow import."""
    return not isinstance(given, type) and callable(getattr(given, "build", None))


class _Blaming:
    def __init__(self, module: SpaceModule, what: str) -> None:
        self._module, self._what = module, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, HeldoutError | TrialFailed):
            traceback.print_exc()
            raise SpaceError(
                f"{self._module.line(error)}: {self._what} raised {type(error).__name__}: {first_line(error)}"
            ) from error


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, cut to a readable length, and what was noted on it."""
    # Without secrets before it is cut: half of one would not be known again.
    lines = [line.strip() for line in secrecy.scrub(str(error)).splitlines() if line.strip()]
    noted = [secrecy.scrub(note)[:300] for note in getattr(error, "__notes__", ())]
    return "; ".join([(lines[0] if lines else "no message")[:300], *noted])
