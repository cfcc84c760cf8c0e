"""Docstrings say what a reader of the signature cannot see: shapes and dtypes of tensors.

Public are functions of a module and methods of a public class whose names have no underscore in
front. Three rules hold for them; the first two for those that annotate a tensor, as a parameter or
as what they return.

They give shapes: dimensions in square brackets, `[S, H, D]`, `[]` for a scalar; or "any shape".

They give dtypes, a name, `int64`, `bool`, `fp32`, or the word itself, saying whose it is: "the
model's dtype", "same dtype", "any floating dtype". Each statement that gives a shape gives one, an
argument's, the result's or a sentence, unless another says that all are of one.

Each method speaks for itself. One without a docstring may override a method that has one with
shapes and dtypes, in a base class of this project: they are then the same.

A docstring begins with a verb or with the name of what is returned, not with a question word.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_dattn"
FOLDERS = ("tools", "benchmarks", "examples")
PACKAGES = [
    *sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}),
    *FOLDERS,
]

# A bracket behind a name or another bracket is an index, a type, `list[int]`, or an argument.
_SHAPE = re.compile(r"(?<![\w\])(])\[[^\[\]\"':=]*\]")
_DTYPE = re.compile(r"\b(bool|u?int(8|16|32|64)|b?float(16|32|64)|bf16|fp(32|64)|dtypes?)\b", re.I)
_OF_ALL = re.compile(r"\ball of one [\w' ]*dtype", re.I)
_ENTRY = re.compile(r"\n(?=\s*(?:[a-z_]\w*(?:, [a-z_]\w*)*|Args|Returns|Raises): ?)")
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
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in (PACKAGE, *(ROOT / name for name in FOLDERS))
    for path in sorted(folder.rglob("*.py"))
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


def gives_dtypes(doc: str) -> bool:
    if not _DTYPE.search(doc) or _OF_ALL.search(doc):
        return bool(_DTYPE.search(doc))
    return all(_DTYPE.search(text) for text in _statements(doc) if _SHAPE.search(text))


def _statements(doc: str) -> Iterator[str]:
    """What is said of each argument and of the result, sentence by sentence."""
    for entry in _ENTRY.split(doc):
        for paragraph in entry.split("\n\n"):
            yield from re.split(r"(?<=\.)\s", paragraph)


def lacks(function: Function, gives: Callable[[str], bool]) -> bool:
    """Whether a rule on tensors is broken."""
    if not function.has_tensors() or gives(function.doc):
        return False
    if function.owner is None or function.doc:
        return True
    in_hf = "/hf/" in function.place
    return not any(map(gives, _inherited_docs(function.owner, function.node.name, in_hf)))


def _functions_of(package: str) -> list[Function]:
    return [
        function
        for path, tree in TREES.items()
        if package in path.relative_to(ROOT).parts[:2]
        for function in _functions(tree, str(path.relative_to(ROOT)))
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_tensors_have_shapes(package: str) -> None:
    assert not [f.place for f in _functions_of(package) if lacks(f, gives_shapes)]


@pytest.mark.parametrize("package", PACKAGES)
def test_tensors_have_dtypes(package: str) -> None:
    assert not [f.place for f in _functions_of(package) if lacks(f, gives_dtypes)]


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_do_not_begin_with_a_question_word(package: str) -> None:
    assert not [f.place for f in _functions_of(package) if _QUESTION.match(f.doc)]


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


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Their number, int64 [].", True),
        ("Rotated, [S, H], of the same dtype.", True),
        ("The sum in bfloat16.", True),
        ("Points in an integer grid [S].", False),
        ("Chosen.\n\nArgs:\n    tokens: int64 [N].\n    states: [N, H].", False),
        ("Chosen.\n\nArgs:\n    tokens: int64 [N].\n    states: [N, H], any floating dtype.", True),
        ("The sum in fp32 [N]. Of states [N, H].", False),
        ("Output [N, H]. States [N, H]. All of one dtype.", True),
    ],
)
def test_dtypes_are_told_from_other_words(doc: str, expected: bool) -> None:
    assert gives_dtypes(doc) is expected


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
    'Of tokens [..., hidden], float32.'

    def forward(self, tokens: Tensor) -> Tensor:
        'Into [..., hidden].'
        return tokens

    def start(self, weight: Tensor) -> None:
        pass
"""
    functions = list(_functions(ast.parse(source), "a.py"))
    without_shapes = ["a.py: scale", "a.py: Child.added", "a.py: Norm.start"]
    assert [f.place for f in functions if lacks(f, gives_shapes)] == without_shapes
    without_dtypes = [*without_shapes[:2], "a.py: Norm.forward", "a.py: Norm.start"]
    assert [f.place for f in functions if lacks(f, gives_dtypes)] == without_dtypes
    assert _QUESTION.match(functions[0].doc)
