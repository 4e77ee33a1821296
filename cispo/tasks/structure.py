"""The structure of a program: its syntax tree with every name and every constant erased.

Names are erased wholly, those of built-in functions and methods too, so `max(xs)` and `sum(ys)` have one structure; a
negated constant counts as a constant. Operators, comparisons and the places of the parts of a slice stay.
"""

import ast


def structure(source: str) -> str:
    """A text that two programs share exactly if they differ in names and constants alone."""
    return _shape(ast.parse(source))


def _shape(node: ast.AST) -> str:
    if isinstance(node, ast.Constant | ast.Name):
        return "_" if isinstance(node, ast.Constant) else "n"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return "_"
    parts = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.expr_context):
            continue
        if isinstance(value, ast.AST):
            parts.append(f"{name}={_shape(value)}")
        elif isinstance(value, list):
            parts.append(f"{name}=[{','.join(_shape(item) for item in value if isinstance(item, ast.AST))}]")
    return f"{type(node).__name__}({' '.join(parts)})"
