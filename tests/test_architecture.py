"""The shape of `search/`: who may import whom, what may load what, who may print, how long a file may be."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SEARCH = Path(__file__).resolve().parent.parent / "search"
# One part each: a protocol and what keeps it. Any other package groups files that are parts of their own.
WHOLE = {"samplers", "executors"}
GROUPS = {path.parent.name for path in SEARCH.glob("*/__init__.py")} - WHOLE - {"shipped"}
FILES = sorted(path for path in SEARCH.rglob("*.py") if path.parent.name not in GROUPS or path.name != "__init__.py")
MOST_LINES = 420

# From the bottom up. A file imports from rows below its own, and a package from itself; a new file
# needs a place here, which is the moment to think about what it may know.
LAYERS = (
    {"errors"},
    {"secrecy", "moving", "stylesheet", "findings", "serving", "answering"},
    {"trial", "disk", "channel", "problem", "files", "metrics", "chain", "journal_copy", "lock", "svg"},
    {"validation", "trials"},
    {"rows", "assets", "packing", "domain", "traces", "ranks", "intervals", "database_chain"},
    {"ledger"},
    {"template", "publishing", "watcher", "finalists"},
    {"split", "streams", "journal_file", "usage", "retries", "surroundings", "supervision", "pruners", "ends"},
    {"space", "store", "leakage", "mirror"},
    {"data", "failing", "rungs", "folds", "lines", "starting"},
    {"history", "tracing", "declaration", "scoring", "folding"},
    {"fused", "checkpoints", "best_epoch", "own_fit", "mended", "eventlog", "flops"},
    {"encoding", "transformers", "chance", "diagnosis"},
    {"feeding", "few_errors"},
    {"journal", "statistics", "salvage"},
    {"enqueueing", "trial_table", "importance", "panels", "markup"},
    {"runs", "asking", "parameter_panels", "suggestions"},
    {"publisher", "reading", "verdicts", "candidates", "places", "blending"},
    {"samplers", "executors", "keeping", "tracking", "registry", "training", "selection"},
    {"predicting", "backbones", "custom_metric", "preflight", "merging", "formats", "architecture"},
    {"study", "devices", "slots", "discovery", "recording", "job_server"},
    {"attempt", "agenda", "warm_start", "preprocessing", "submitting"},
    {"loading", "cost", "sanity", "board", "following"},
    {"withholding"},
    {"driver"},
    {"judge", "worker", "stopping", "repairing", "lifecycle", "removing", "storing", "reserving"},
    {"jobs", "belief", "picture", "garbage", "connecting", "agent", "sources"},
    {"calls"},
    {"ray_executor"},
    {"launching"},
    {"ensemble_words"},
    {"report"},
    {"page_record"},
    {"sections"},
    {"page"},
    {"final", "winner", "card"},
    {"freezing", "comparison"},
    {"evaluation"},
    {"wiring", "rehearsal", "reproduction", "ensemble_judging"},
    {"resuming"},
    {"export", "ensemble_export"},
    {"ensembling"},
    {"elsewhere"},
    {"view", "ui", "options"},
    {"printing"},
    {"cli_jobs"},
    {"cli_recorded"},
    {"", "cli"},  # "" is search/__init__.py, the documented functions
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# A Study's methods are the same functions by another name, and a launch ends in its test step: both
# import upwards, but only when called.
UPWARD_WHEN_CALLED = {
    ("study", "report"),
    ("study", "page"),
    ("study", "export"),
    ("study", "evaluation"),
}

# Loaded by the driver's process and by the template before it forks.
STDLIB_ONLY = {
    *("errors", "trial", "space", "domain", "traces", "history", "journal", "journal_file", "journal_copy", "driver"),
    *("study", "channel", "template", "devices", "problem", "executors", "publishing", "samplers", "wiring", "jobs"),
    *("usage", "retries", "surroundings", "supervision", "recording", "slots", "discovery", "attempt"),
    *("enqueueing", "warm_start", "lock", "stopping", "salvage", "repairing", "secrecy", "watcher"),
    *("places", "disk", "assets", "keeping", "lifecycle", "garbage", "reserving", "pruners", "ends", "agenda"),
    # A trial's own process, which trainings are forked from.
    *("validation", "folding"),
    *("board", "serving", "architecture", "trials", "packing"),
    *("mirror", "connecting", "launching", "agent", "sources"),
}

# Files of such a part that nothing loads but their name, once a study asks for that sampler.
BY_NAME = {"samplers/gp.py", "samplers/gaussian_process.py", "samplers/chart.py", "samplers/tpe.py"}

# Slow to import, so loaded by these files alone at the top; elsewhere inside the function that needs it.
SLOW = {
    "keras": {
        *("training", "tracing", "declaration", "feeding", "fused", "preflight", "custom_metric", "checkpoints"),
        *("best_epoch", "own_fit", "mended", "predicting", "backbones", "preprocessing", "merging", "diagnosis"),
        *("sanity", "flops", "eventlog"),
    },
    "keras_tuner": {"tracing", "mended"},
    "mlflow": {"tracking", "publisher", "reading", "removing", "storing"},
    "scipy": {"statistics", "intervals", "samplers"},
    "tensorflow": set(),
    "hyperopt": set(),
    "sklearn": set(),
    "matplotlib": {"picture"},
    "pandas": set(),
    "optuna": set(),
    "cmaes": set(),
    "torch": set(),
    "requests": set(),
    "psycopg": set(),
    "aiohttp": set(),
    "ray": {"calls", "ray_executor"},  # for a study that runs on it
}

# Files of trial-side and tracking processes that get a slow import from another file's top.
MAY_REACH = {
    "mlflow": {"tracking"},
    "keras_tuner": {"training", "preflight", "custom_metric", "predicting", "preprocessing", "sanity"},
}

# Processes of their own end without unwinding: a forked child must not run its parent's exit handlers.
MAY_LEAVE_AT_ONCE = {"channel", "template", "tracking", "removing", "storing"}


def part(path: Path) -> str:
    """The file's place in `LAYERS`: its own name, or its package's if that is one part."""
    first = path.relative_to(SEARCH).parts[0]
    return first if first in WHOLE else "" if first == "__init__.py" else path.stem


PARTS = {part(path) for path in FILES}


def part_of(dotted: list[str]) -> str:
    """The part that a name below `search` belongs to; "" for what search/__init__.py offers."""
    names = dotted[1:] if dotted and dotted[0] in GROUPS else dotted
    return names[0] if names and names[0] in PARTS | set(RANK) else ""


@functools.cache
def imports(path: Path) -> tuple[tuple[str, int, bool], ...]:
    """Every dotted name that the file imports, its line, and whether importing the file imports it."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}:{child.lineno}: relative imports hide the direction"
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", child.lineno, at_top
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            else:
                runs_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_top and not runs_later)

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8")), True))


def loaded(own: str) -> dict[str, str]:
    """Everything that importing a part of `search` imports, and the chain of files that leads there."""
    found: dict[str, str] = {}
    waiting = [(own, own)]
    while waiting:
        at, chain = waiting.pop()
        for path in FILES:
            # Names inside a package are imported by its users one by one; only its __init__ comes along.
            if part(path) != at or (path.parent.name in WHOLE and path.name != "__init__.py"):
                continue
            for name, _, at_top in imports(path):
                root, *rest = name.split(".")
                target = part_of(rest) or root if root == "search" else root
                if at_top and target not in found and root not in sys.stdlib_module_names:
                    found[target] = f"{chain} -> {target}"
                    if root == "search":
                        waiting.append((target, found[target]))
    return found


def label(path: Path) -> str:
    return str(path.relative_to(SEARCH))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    assert own in RANK, f"{label(path)} has no place in LAYERS: give it one"
    for name, line, at_top in imports(path):
        root, *rest = name.split(".")
        if root != "search":
            continue
        target = part_of(rest)
        assert target in RANK, f"{target} has no place in LAYERS: give it one"
        if target == own and own in {"samplers", "executors", ""}:
            continue
        if not at_top and (own, target) in UPWARD_WHEN_CALLED:
            continue
        assert RANK[target] < RANK[own], f"{label(path)}:{line} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_what_loads_at_import(path: Path) -> None:
    for name, line, at_top in imports(path):
        root = name.split(".")[0]
        if not at_top or root == "search" or root in sys.stdlib_module_names:
            continue
        where = f"{label(path)}:{line}"
        assert part(path) not in STDLIB_ONLY or label(path) in BY_NAME, (
            f"{where} imports {root}, but may load the standard library only"
        )
        if root in SLOW:
            assert part(path) in SLOW[root], f"{where} imports {root} when loaded; import it where it is used"


@pytest.mark.parametrize("own", sorted(PARTS - {""}))
def test_what_loads_by_way_of_others(own: str) -> None:
    chains = loaded(own)
    if own in STDLIB_ONLY | {"cli"}:
        slow = set(SLOW) | ({"numpy"} if own != "cli" else {"numpy", "rich"})
        assert not slow & set(chains), [chains[name] for name in sorted(slow & set(chains))]
    for name in ("keras", "tensorflow", "keras_tuner", "mlflow"):  # loaded in processes of their own
        assert name not in chains or own in SLOW[name] | MAY_REACH.get(name, set()), chains[name]


@pytest.mark.parametrize("path", FILES, ids=label)
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Name | ast.Attribute):  # called, or handed to something that calls it
            used = ast.unparse(node)
            if used == "os._exit":
                assert part(path) in MAY_LEAVE_AT_ONCE, f"{where} uses os._exit"
            elif part(path) != "cli":
                forbidden = {"print", "input", "exit", "quit", "breakpoint", "sys.exit", "sys.stdout.write"}
                assert used not in forbidden, f"{where} uses {used}; only cli.py prints or exits"
        elif isinstance(node, ast.Raise) and node.exc is not None and part(path) != "cli":
            assert not ast.unparse(node.exc).startswith("SystemExit"), f"{where} exits; only cli.py does"


# What turns bytes into code, or a text into a command. Nothing of ours may, wherever the bytes come from: a trial, the
# network and other users write the same kind of files. The one exception is the user's own module.
FORBIDDEN_MODULES = {"pickle", "_pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "yaml"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "pty.spawn", "torch.load", "pandas.read_pickle"),
    "keras.config.enable_unsafe_deserialization",
}
STARTS_PROCESSES = {"Popen", "run", "call", "check_call", "check_output"}
MAY_EXECUTE = {("problem", "exec")}


def dangers(own: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines of a file that could run what somebody else wrote, and why."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((line, f"imports {n}") for n in names if n.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Attribute | ast.Name) and (used := ast.unparse(node)) in FORBIDDEN_CALLS:
            if (own, used) not in MAY_EXECUTE:
                yield line, f"uses {used}"
        if not isinstance(node, ast.Call):
            continue
        named = {word.arg: ast.unparse(word.value) for word in node.keywords}
        called = ast.unparse(node.func)
        for word, value in (("shell", "False"), ("allow_pickle", "False"), ("safe_mode", "True")):
            if named.get(word, value) != value:
                yield line, f"has {word}={named[word]}"
        if called in ("np.load", "numpy.load", "np.save", "numpy.save") and "allow_pickle" not in named:
            yield line, f"leaves allow_pickle of {called} to NumPy"
        first = node.args[0] if node.args else next((w.value for w in node.keywords if w.arg == "args"), None)
        if called.split(".")[-1] in STARTS_PROCESSES and called.startswith(("subprocess.", "Popen")):
            if isinstance(first, ast.JoinedStr) or (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                yield line, "starts a process by a text instead of a list of words"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_turns_bytes_into_code_or_text_into_commands(path: Path) -> None:
    found = list(dangers(part(path), ast.parse(path.read_text(encoding="utf-8"))))
    assert not found, [f"{label(path)}:{line} {why}" for line, why in found]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=maybe)",
        "keras.models.load_model(path, safe_mode=False)",
        "keras.config.enable_unsafe_deserialization()",
        "eval(text)",
        "run(exec)",
        "os.system(text)",
        "subprocess.run('ls', check=True)",
        "subprocess.Popen(args=f'ls {folder}')",
        "subprocess.run(command, shell=True)",
        "import yaml; yaml.load(text)",
    ],
)
def test_the_rule_against_code_from_elsewhere_finds(line: str) -> None:
    assert list(dangers("worker", ast.parse(line)))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_is_short_and_says_what_it_owns(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MOST_LINES, (
        f"{label(path)} has {lines} lines; at most {MOST_LINES}: split it by what it owns"
    )
    assert "util" not in path.stem, f"{label(path)}: name a file after what it owns"
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert first, f"{label(path)} must begin with a docstring whose first line says what it owns"


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_package_says_what_it_groups_and_nothing_else(group: str) -> None:
    (said,) = ast.parse((SEARCH / group / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant) and isinstance(said.value.value, str)


def test_the_table_has_no_leftovers() -> None:
    assert set(RANK) == {part(path) for path in FILES}
