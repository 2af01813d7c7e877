"""The code that a checkpoint carries: flat, complete, seen whole by Transformers, and alive beside the package."""

import ast
import importlib
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import check_imports, get_relative_import_files, get_relative_imports

import sa_hf
from sa_hf.errors import SparseAttentionError
from sa_hf.hf.checkpoints import flatten
from sa_hf.hf.checkpoints.files import HEADER, REMOTE_FILE
from sa_hf.hf.checkpoints.flatten import ROOT, carried_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carried") / "carried_sa_hf"
    folder.mkdir()
    for name, text in {**carried_files(), "__init__.py": ""}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made-up package in place of sa_hf: ``package({"a.py": text})``."""

    def build(files):
        for name, text in files.items():
            path = tmp_path / "sa_hf" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location(
            "sa_hf", tmp_path / "sa_hf" / "__init__.py", submodule_search_locations=[str(tmp_path / "sa_hf")]
        )
        monkeypatch.setattr(flatten.importlib.util, "find_spec", lambda name: spec)
        flatten._find.cache_clear()

    yield build
    flatten._find.cache_clear()


def test_transformers_sees_every_file(folder):
    """Transformers copies a local folder's code along the imports that its regular expression finds."""
    found = {path.rpartition("/")[2] for path in get_relative_import_files(folder / REMOTE_FILE)}
    direct = {f"{name}.py" for name in get_relative_imports(folder / REMOTE_FILE)}  # all that 5.5 copies
    assert found == direct == set(carried_files()) - {REMOTE_FILE}


def test_no_requirement_but_torch_and_transformers(folder, monkeypatch):
    """From the hub every file goes through Transformers' check of its imports: triton must not be required."""
    for name in ("triton", "sa_hf", "peft", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in carried_files():
        check_imports(folder / name)


def test_only_flat_imports_are_left(folder):
    for name, text in carried_files().items():
        assert text.startswith(HEADER), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import) and name != REMOTE_FILE:
                assert not any(alias.name.split(".")[0] == "sa_hf" for alias in node.names), name
            if isinstance(node, ast.ImportFrom) and name != REMOTE_FILE:
                assert node.level <= 1, name
                assert (node.module or "").split(".")[0] != "sa_hf", name
                if node.level == 1 and node.module:
                    assert f"{node.module}.py" in carried_files(), name


def test_code_and_comments_stay(folder):
    """A carried module differs from the package's own in its import lines and registered names alone."""
    text = carried_files()["sa_hf_ops.py"]
    for name in ("parts", "sequences", "host"):
        module = importlib.import_module(f"sa_hf.ops.{name}")
        source = Path(module.__file__).read_text("utf-8")
        start = text.index(f"# ---------- sa_hf.ops.{name} ---")
        carried = text[start : text.find("# ---------- sa_hf.", start + 1)].splitlines()
        bodies = [
            [line for line in lines if line.strip() and not re.match(r"\s*(from|import) |# -----", line)]
            for lines in (re.sub(r"import \([^)]*\)", "import", source).splitlines(), carried)
        ]
        assert bodies[0] == bodies[1]


def test_few_files(folder):
    """A room of the package is a file: whoever reads what they are asked to trust opens no more than twenty."""
    assert len(carried_files()) <= 20
    assert len(carried_files("sa_hf.models.forecasting")) <= 20


def test_nothing_of_the_tools(folder):
    carried = re.findall(r"^# -{10} (\S+) -+$", "".join(carried_files().values()), flags=re.MULTILINE)
    assert ROOT in carried
    assert not re.search("tools|tasks|models|drawing|flatten|cli|bench", " ".join(carried))
    with pytest.raises(ImportError, match=r"does not carry sa_hf\.patterns\.drawing"):
        exec_in_copy(folder, "sa_hf_config").SparseAttentionConfig.preview(sa_hf.SlidingWindowAttentionConfig(), 8)


def exec_in_copy(folder, name):
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    return importlib.import_module(f"{folder.name}.{name}")


def test_lives_beside_the_package(folder):
    """Operators and attention functions of the copy have names of their own; the numbers are the same."""
    copy = exec_in_copy(folder, "sa_hf_patterns")
    attention = exec_in_copy(folder, "sa_hf_hf_state")
    from sa_hf.hf.state.activity import IMPLEMENTATION
    from sa_hf.layer import AttentionInputs, LayerSpec
    from sa_hf.ops.sequences import Sequences

    assert attention.IMPLEMENTATION != IMPLEMENTATION
    assert attention.IMPLEMENTATION.startswith(IMPLEMENTATION)
    q = torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    layer, sequences = exec_in_copy(folder, "sa_hf_layer"), exec_in_copy(folder, "sa_hf_ops")
    for cls, spec, given, seqs in (
        (sa_hf.SlidingWindowAttentionConfig, LayerSpec, AttentionInputs, Sequences),
        (copy.SlidingWindowAttentionConfig, layer.LayerSpec, layer.AttentionInputs, sequences.Sequences),
    ):
        layer = cls(window=5).build(spec(0, 1, 2, 2, 8, 16, True))
        outputs.append(layer(given(q, q, q, seqs.full(1, 70, 70), True, 0.3)))
    assert torch.equal(*outputs)


def carried(root):
    """``{file: text}`` of a made-up package's root, without what stands above the first module."""
    files = carried_files.__wrapped__(root)
    return {name: re.split(r"# -{10} .*\n\n", text, maxsplit=1)[-1] for name, text in files.items()}


FORMS = {
    "import sa_hf.b": "from .sa_hf_b import __name__ as _sa_hf_b\n",
    "from sa_hf.b import (\n    c,\n    d as e,\n)": "from .sa_hf_b import c, d as e\n",
    "from .b import c": "from .sa_hf_b import c\n",
    "def f():\n    from sa_hf.b import c\n    return c": "def f():\n    from .sa_hf_b_late import c\n    return c\n",
    "import triton": "try:\n    import triton\nfinally:\n    pass\n",
    "import math, triton": "import math\ntry:\n    import triton\nfinally:\n    pass\n",
    "if TYPE_CHECKING:\n    from sa_hf.b import c": "if TYPE_CHECKING:\n    pass\n",
    "from __future__ import annotations\nx = 1": "x = 1\n",
}


@pytest.mark.parametrize("source", FORMS)
def test_import_forms(package, source):
    package({"__init__.py": "", "a.py": source + "\n", "b.py": ""})
    files = carried("sa_hf.a")
    assert files["sa_hf_a.py"] == FORMS[source]
    b = {"sa_hf_b_late.py"} if "_late" in FORMS[source] else {"sa_hf_b.py"} if "sa_hf_b" in FORMS[source] else set()
    assert files.keys() == {"sa_hf_a.py", REMOTE_FILE, *b}


REFUSED = {
    "import sa_hf": "cannot be carried",
    "import sa_hf.b as x": "cannot be carried",
    "from sa_hf import b": "cannot be carried",
    "from sa_hf import patch_model": "cannot be carried",
    "from sa_hf.b import *": "cannot be carried",
    '"""\nfrom .b import c\n"""': "reword the docstring",
    "sum = 1": "'sum' names two things, in Python and sa_hf.a",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_cannot_be_flat_is_refused(package, source):
    package({"__init__.py": "", "a.py": source + "\n", "b.py": ""})
    with pytest.raises(SparseAttentionError, match=REFUSED[source]):
        carried("sa_hf.a")


ROOM = {
    "__init__.py": "",
    "r/__init__.py": "",
    "r/top.py": "from sa_hf.r.low import one as two\nfrom sa_hf.s.other import three\n\nx = two + three\n",
    "r/low.py": "one = 1\n\n\ndef late():\n    from sa_hf.r.low import one\n    return one\n",
    "s/__init__.py": "",
    "s/other.py": "from sa_hf.r.low import one\n\nthree = one + 2\n",
}


def test_a_room_is_a_file(package, tmp_path, monkeypatch):
    """Each module after those that it needs; what needs another room that needs this one goes into a file above."""
    package(ROOM)
    files = carried_files.__wrapped__("sa_hf.r.top")
    assert files.keys() == {"sa_hf_r.py", "sa_hf_s.py", "sa_hf_r_2.py", REMOTE_FILE}
    (tmp_path / "copied_room").mkdir()
    for name, text in {**files, "__init__.py": ""}.items():
        (tmp_path / "copied_room" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("copied_room.sa_hf_r_2").x == 4
    assert importlib.import_module("copied_room.sa_hf_r").late() == 1
    package({"r/top.py": "from sa_hf.r.low import one as two\nx = two\n"})
    flatten._find.cache_clear()
    assert "two = one\nx = two\n" in carried_files.__wrapped__("sa_hf.r.top")["sa_hf_r.py"]


def test_a_name_means_one_thing_in_a_file(package):
    files = {"__init__.py": "", "r/__init__.py": "", "r/b.py": "one = 1\n"}
    package({**files, "r/a.py": "from sa_hf.r.b import one\n\none = 2\n"})
    with pytest.raises(SparseAttentionError, match=r"'one' names two things, in sa_hf\.r\.b and sa_hf\.r\.a"):
        carried("sa_hf.r.a")


def test_files_do_not_import_each_other(package):
    package({
        "__init__.py": "", "r/__init__.py": "", "s/__init__.py": "", "r/a.py": "from sa_hf.s.b import x\n",
        "s/b.py": "x = 1\n", "r/c.py": "y = 1\n", "s/d.py": "from sa_hf.r.c import y\n",
        "root.py": "import sa_hf.r.a\nimport sa_hf.s.d\n",
    })  # fmt: skip
    with pytest.raises(SparseAttentionError, match="import each other"):
        carried("sa_hf.root")


FIXED_PATHS = {
    "trainer": ["SparseTrainer", "SparseAttentionCallback"],
    "saving": ["remote_attribute", "sparse_class"],
    "losses": ["collected_losses"],
    "centroids": ["update_centroids"],
}


@pytest.mark.parametrize("name", FIXED_PATHS)
def test_fixed_paths_stay(name):
    """What checkpoints, errors and cards name is found where it was in 0.1.0, and is the thing itself."""
    module = importlib.import_module(f"sa_hf.hf.{name}")
    for thing in FIXED_PATHS[name]:
        found = getattr(module, thing)
        assert found is getattr(importlib.import_module(found.__module__), thing)


def test_a_checkpoint_imports_a_fixed_path():
    assert "from sa_hf.hf import saving" in carried_files()[REMOTE_FILE]
