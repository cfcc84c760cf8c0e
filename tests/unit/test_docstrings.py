"""Docstrings say what a reader of the signature cannot see: shapes of tensors, and what is done.

Public are functions of a module and methods of a public class whose names have no underscore in
front. Two rules hold for them.

A function that annotates a tensor, as a parameter or as what it returns, gives shapes: dimensions
in square brackets, `[S, H, D]`, `[]` for a scalar; or it says "any shape". The shapes of a method
may stand elsewhere in two cases: it has no docstring of its own and overrides a method that gives
them, in a base class of this project; or it is the `forward` of a class whose docstring gives them.

A docstring begins with a verb or with the name of what is returned, not with a question word.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_dattn"
ROOMS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})

# A bracket behind a name or another bracket is an index, a type, `list[int]`, or an argument.
_SHAPE = re.compile(r"(?<![\w\])(])\[[^\[\]\"':=]*\]")
_QUESTION = re.compile(r"(What|Which|How|Whether|Why|Who|Whose|Where|When)\b")


@dataclass(frozen=True)
class Function:
    """A function or method, and the classes that it may be documented in."""

    place: str
    node: ast.FunctionDef
    owner: ast.ClassDef | None = None

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    def has_tensors(self) -> bool:
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
        annotations = [argument.annotation for argument in named] + [self.node.returns]
        return any(re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations if a)


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _functions(tree: ast.Module, place: str) -> Iterator[Function]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _is_public(node.name):
            yield Function(f"{place}: {node.name}", node)
        if isinstance(node, ast.ClassDef) and _is_public(node.name):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and _is_public(method.name):
                    yield Function(f"{place}: {node.name}.{method.name}", method, node)


def _base_names(owner: ast.ClassDef) -> list[str]:
    """Last parts of the names of its bases, without type parameters."""
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in owner.bases)
    return [ast.unparse(base).split(".")[-1] for base in bases]


TREES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}
# hf/ holds exported twins of our classes under the same names, and knows no others.
CLASSES = {
    (path.parent.name == "hf", node.name): node
    for path, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
}


def _inherited_docs(owner: ast.ClassDef, method: str, in_hf: bool) -> Iterator[str]:
    for name in _base_names(owner):
        if base := CLASSES.get((in_hf, name)):
            for node in base.body:
                if isinstance(node, ast.FunctionDef) and node.name == method:
                    yield ast.get_docstring(node) or ""
            yield from _inherited_docs(base, method, in_hf)


def gives_shapes(doc: str) -> bool:
    return bool(_SHAPE.search(doc)) or "any shape" in doc


def lacks_shapes(function: Function) -> bool:
    """Whether the first rule is broken."""
    if not function.has_tensors() or gives_shapes(function.doc):
        return False
    owner, name = function.owner, function.node.name
    if owner is None:
        return True
    if name == "forward" and gives_shapes(ast.get_docstring(owner) or ""):
        return False
    inherited = _inherited_docs(owner, name, "/hf/" in function.place)
    return bool(function.doc) or not any(map(gives_shapes, inherited))


def _functions_of(room: str) -> list[Function]:
    return [
        function
        for path, tree in TREES.items()
        if path.relative_to(PACKAGE).parts[0] == room
        for function in _functions(tree, str(path.relative_to(ROOT)))
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_tensors_have_shapes(room: str) -> None:
    assert not [f.place for f in _functions_of(room) if lacks_shapes(f)]


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_do_not_begin_with_a_question_word(room: str) -> None:
    assert not [f.place for f in _functions_of(room) if _QUESTION.match(f.doc)]


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Output [Nq, Hq, D] of the part.", True),
        ("Their number, int64 [].", True),
        ("Of the shape [..., hidden].", True),
        ("Tensors of any shape.", True),
        ("A list[Tensor] of `shards[0]`, see `select([1, 2])`.", False),
        ("What the layer adds.", False),
    ],
)
def test_shapes_are_told_from_indices(doc: str, expected: bool) -> None:
    assert gives_shapes(doc) is expected


def test_a_function_without_shapes_is_seen() -> None:
    """Negative control: the rules are able to fail, and an override may rely on its base."""
    source = """
def scale(x: "Tensor") -> list[torch.Tensor]:
    'Whether it is scaled.'

class Child(Backend):
    def forward(self, query: Tensor) -> Tensor:
        return query

    def added(self, query: Tensor) -> None:
        pass

class Norm(nn.Module):
    'Of tokens [..., hidden].'

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens

    def start(self, weight: Tensor) -> None:
        pass
"""
    functions = list(_functions(ast.parse(source), "a.py"))
    assert [f.place for f in functions if lacks_shapes(f)] == [
        "a.py: scale",
        "a.py: Child.added",
        "a.py: Norm.start",
    ]
    assert _QUESTION.match(functions[0].doc)
