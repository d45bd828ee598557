"""Rules about the source, read from its syntax trees: one home for Fenwick bookkeeping, imports one way.

Each rule is a function from source text to a list of complaints, and is tried on text that breaks it before
the package is judged by it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "loglinear"
MODULES = sorted(PACKAGE.rglob("*.py"))
BOOKKEEPING = PACKAGE / "fenwick.py"

# A module may import its own stage and earlier ones. Modules that are in no stage are the package's own front
# (`__init__`, `__main__`), which may import everything.
STAGES = [
    {"fenwick"},
    {"window"},
    {"state"},
    {"ops"},
    {"layers"},
    {"models"},
    {
        "data",
        "train",
        "generate",
        "conversation",
        "interactive",
        "evals",
        "bench",
        "folders",
        "plots",
        "quickstart",
        "serve",
    },
    {"cli"},
]

BIT_OPERATORS = {
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitXor: "^",
    ast.BitAnd: "&",
}
BIT_NAMES = {
    "bit_length",
    "bit_count",
    "bitwise_and",
    "bitwise_left_shift",
    "bitwise_not",
    "bitwise_or",
    "bitwise_right_shift",
    "bitwise_xor",
    "clz",
    "ctz",
    "ffs",
    "frexp",
    "left_shift",
    "log2",
    "popc",
    "popcount",
    "right_shift",
}


def bit_tricks(source: str, kernels: bool = False) -> list[str]:
    """Names every place where `source` handles the bits of integers.

    `<<`, `>>`, `^` and `&` are refused outright (boolean tensors have `logical_and`, sets `intersection`),
    as are `log2`, `bit_length` and their like. `|` is refused except where it can be seen to join types, or a
    dictionary or set written out on either side. In `kernels`, where masks have no other way to be joined, `&` and
    `|` may join anything with a comparison.
    """
    tree = ast.parse(source)
    unions = set(_unions_of_types(tree))
    collections = _names_of_collections(tree)
    complaints = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.AugAssign)):
            symbol = BIT_OPERATORS.get(type(node.op))
            if kernels and isinstance(node, ast.BinOp) and _is_mask(node):
                continue
            if isinstance(node.op, ast.BitOr) and node not in unions and not _joins_collections(node, collections):
                symbol = "|"
            if symbol is not None:
                complaints.append(f"line {node.lineno}: {symbol}")
        name = _name(node)
        if name is not None and name.strip("_") in BIT_NAMES:
            complaints.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return complaints


def backward_imports(source: str, stage: int) -> list[str]:
    """Names every import at module level in `source`, a module of stage number `stage`, from a later stage.

    Imports inside functions are allowed (a command imports what it needs when it runs), and so are those of
    `if TYPE_CHECKING`. Relative imports are complained of too: inside the package they are written in full.
    """
    later = {module: number for number, modules in enumerate(STAGES) for module in modules if number > stage}
    complaints = []
    for node in _module_level(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                complaints.append(f"line {node.lineno}: relative import")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            imported = rest.partition(".")[0]
            if first == "loglinear" and imported in later:
                complaints.append(f"line {node.lineno}: {name}")
    return complaints


def stage_of(path: Path) -> int | None:
    """The stage number of a module of the package; None for the package's own front."""
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if top in ("__init__", "__main__"):
        return None
    for number, modules in enumerate(STAGES):
        if top in modules:
            return number
    raise ValueError(f"{top} is in no stage: give it its place in STAGES")


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.alias):
        return node.name.rpartition(".")[2]
    return None


def _unions_of_types(tree: ast.AST) -> Iterator[ast.AST]:
    """Operators where types are written: annotations, names for types, `isinstance`, `cast`, `… | None`."""
    for node in ast.walk(tree):
        places: list[ast.AST | None] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            places.append(node.returns)
        elif isinstance(node, ast.arg):
            places.append(node.annotation)
        elif isinstance(node, ast.AnnAssign):
            places.append(node.annotation)
        elif isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "issubclass"):
            places.extend(node.args[1:])
        elif isinstance(node, ast.Call) and _name(node.func) == "cast":
            places.extend(node.args[:1])
        elif isinstance(node, ast.Assign) and _names_a_type(node):
            places.append(node.value)
        elif isinstance(node, ast.BinOp) and any(_is_none(side) for side in (node.left, node.right)):
            places.append(node)
        for place in places:
            if place is not None:
                yield from (inner for inner in ast.walk(place) if isinstance(inner, ast.BinOp))


def _is_mask(node: ast.AST) -> bool:
    """Whether an expression is made of comparisons: one itself, a view of one, or joined with one."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.BitAnd, ast.BitOr)) and (_is_mask(node.left) or _is_mask(node.right))
    if isinstance(node, ast.Subscript):
        return _is_mask(node.value)
    return isinstance(node, ast.Compare)


def _is_none(node: ast.AST) -> bool:
    """Whether an expression is `None`, which only types can be joined with."""
    return isinstance(node, ast.Constant) and node.value is None


def _names_a_type(node: ast.Assign) -> bool:
    """Whether an assignment names a type: its one target is in CapWords, as types are."""
    target = node.targets[0]
    return len(node.targets) == 1 and isinstance(target, ast.Name) and bool(re.match("[A-Z].*[a-z]", target.id))


def _names_of_collections(tree: ast.AST) -> set[str]:
    """Names that are bound to a dictionary or set anywhere in the module, and never to anything else."""
    collections, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            (collections if _is_collection(node.value, set()) else others).update(names)
    return collections - others


def _is_collection(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is a dictionary or set: written out, made by a call, or one of `names`."""
    if isinstance(node, ast.Call):
        return _name(node.func) in ("dict", "set", "frozenset")
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and _joins_collections(node, names)
    return isinstance(node, (ast.Dict, ast.DictComp, ast.Set, ast.SetComp)) or (
        isinstance(node, ast.Name) and node.id in names
    )


def _joins_collections(node: ast.BinOp | ast.AugAssign, names: set[str]) -> bool:
    """Whether a side of a `|` is a dictionary or set."""
    sides = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
    return any(_is_collection(side, names) for side in sides)


def _module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: everything outside functions and `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))


def _identifier(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize(
    "source",
    [
        "height = 1 << level",
        "height = position >> 1",
        "node = chunk ^ 1",
        "low = rem & -rem",
        "keep = causal & same_sequence",
        "bits = low | high",
        "bits |= 1",
        "rem &= rem - 1",
        "position >>= 1",
        "height = (length - 1).bit_length()",
        "height = math.log2(length)",
        "from math import log2",
        "height = tl.math.clz(x)",
        "count = torch.bitwise_and(a, b)",
        "x: int = 3 | y",
        "def f(x: int | None = 1 << 3): pass",
        "isinstance(x, int) and y & 1",
        "isinstance(x | y, int)",
        "mask = (a == b) | (c == d)",
        "A = {1}\nA = 3\nB = A | 4",
        "FLAGS = LOW | HIGH",
    ],
)
def test_bit_tricks_are_seen(source: str) -> None:
    assert bit_tricks(source)


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: int | None) -> str | None: pass",
        "x: dict[str, int | None] = {}",
        "Sizes = list[int] | None",
        "isinstance(x, int | float)",
        "names = known | {'extra'}",
        "fields = dict(a) | b",
        "settings |= {'a': 1}",
        "A = {1}\nB = frozenset({2})\nC = A | B | other",
        "Index = slice | torch.Tensor",
        "parameter(annotation=kind | None)",
        "mask = torch.logical_and(a, ~b)",
        "x = 'a << b, log2, c ^ d'",
    ],
)
def test_other_operators_pass(source: str) -> None:
    assert not bit_tricks(source)


@pytest.mark.parametrize("source", ["rem & -rem", "chunk & 1", "low | high", "(a < b) << 1", "(a & 1)[:, None] & rows"])
def test_bit_tricks_in_kernels_are_seen(source: str) -> None:
    assert bit_tricks(source, kernels=True)


@pytest.mark.parametrize("source", ["(row < rows)[:, None] & (column < width)[None, :]", "mask & (offset < size)"])
def test_masks_in_kernels_pass(source: str) -> None:
    assert not bit_tricks(source, kernels=True) and bit_tricks(source)


@pytest.mark.parametrize("path", [path for path in MODULES if path != BOOKKEEPING], ids=_identifier)
def test_bookkeeping_stays_in_fenwick(path: Path) -> None:
    kernels = path.is_relative_to(PACKAGE / "ops" / "triton")
    complaints = bit_tricks(path.read_text(encoding="utf-8"), kernels)
    assert not complaints, f"bit tricks belong to fenwick.py, found in {_identifier(path)}: {complaints}"


def test_bookkeeping_exists() -> None:
    """The rule would be empty if the file that it exempts did not hold what it exempts."""
    assert bit_tricks(BOOKKEEPING.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import loglinear.layers",
        "from loglinear import models",
        "from loglinear.models.config import LogLinearConfig",
        "try:\n    import loglinear.cli\nexcept ImportError:\n    pass",
        "class A:\n    from loglinear.train import loop",
        "from . import reference",
    ],
)
def test_backward_imports_are_seen(source: str) -> None:
    assert backward_imports(source, stage_of(PACKAGE / "ops" / "interface.py"))


@pytest.mark.parametrize(
    "source",
    [
        "from loglinear.fenwick import level",
        "import loglinear.ops.families",
        "def command():\n    from loglinear.train import loop",
        "if TYPE_CHECKING:\n    from loglinear.layers import Mixer",
        "import torch.models",
    ],
)
def test_other_imports_pass(source: str) -> None:
    assert not backward_imports(source, stage_of(PACKAGE / "ops" / "interface.py"))


@pytest.mark.parametrize("path", MODULES, ids=_identifier)
def test_imports_go_one_way(path: Path) -> None:
    stage = stage_of(path)
    if stage is not None:
        complaints = backward_imports(path.read_text(encoding="utf-8"), stage)
        assert not complaints, f"{_identifier(path)} imports from a later stage: {complaints}"


@pytest.mark.parametrize("path", MODULES, ids=_identifier)
def test_no_block_pointers(path: Path) -> None:
    """`make_block_ptr` is gone from Triton 3.9: kernels use raw pointers and masks, or tensor descriptors."""
    assert "make_block_ptr" not in path.read_text(encoding="utf-8")
