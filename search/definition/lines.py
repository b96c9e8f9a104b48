"""Which line of a space module a message should name, read from the module's text; nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from search.definition.problem import Problem


def of_return(problem: Problem, function: str) -> str:
    """``path:line`` of the one ``return`` of a function of the module, of its ``def`` if there is not one; else the
    path alone."""
    for node in ast.parse(problem.source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            returns = [part for part in _own(node) if isinstance(part, ast.Return)]
            return f"{problem.path}:{returns[0].lineno if len(returns) == 1 else node.lineno}"
    return problem.path


def of_call(problem: Problem, method: str) -> str:
    """``path:line`` of the one call of a method such as ``compile`` in the module; the path alone if there are none or
    several, since a wrong line would be worse than none."""
    found = [
        node.lineno
        for node in ast.walk(ast.parse(problem.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    ]
    return f"{problem.path}:{found[0]}" if len(found) == 1 else problem.path


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Everything in a function but what belongs to functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
