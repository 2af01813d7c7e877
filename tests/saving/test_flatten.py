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
from sa_hf.hf.checkpoints.flatten import carried_files, flatten_module


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
    import sa_hf.ops.sequences as module

    text = Path(module.__file__).read_text("utf-8")
    carried = carried_files()["sa_hf_ops_sequences.py"].removeprefix(HEADER)
    assert carried == re.sub(r"from sa_hf\.(\w+)", r"from .sa_hf_\1", text).replace(".sa_hf_ops.", ".sa_hf_ops_")


def test_nothing_of_the_tools(folder):
    names = " ".join(carried_files())
    assert not re.search("tools|tasks|models|drawing|flatten|cli|bench", names)
    with pytest.raises(ImportError, match=r"does not carry sa_hf\.patterns\.drawing"):
        exec_in_copy(folder, "sa_hf_config").SparseAttentionConfig.preview(sa_hf.SlidingWindowAttentionConfig(), 8)


def exec_in_copy(folder, name):
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    return importlib.import_module(f"{folder.name}.{name}")


def test_lives_beside_the_package(folder):
    """Operators and attention functions of the copy have names of their own; the numbers are the same."""
    copy = exec_in_copy(folder, "sa_hf_patterns")
    attention = exec_in_copy(folder, "sa_hf_hf_forward_adapter")
    from sa_hf.hf.state.activity import IMPLEMENTATION
    from sa_hf.layer import AttentionInputs, LayerSpec
    from sa_hf.ops.sequences import Sequences

    assert attention.IMPLEMENTATION != IMPLEMENTATION
    assert attention.IMPLEMENTATION.startswith(IMPLEMENTATION)
    q = torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    layer, sequences = exec_in_copy(folder, "sa_hf_layer"), exec_in_copy(folder, "sa_hf_ops_sequences")
    for cls, spec, given, seqs in (
        (sa_hf.SlidingWindowAttentionConfig, LayerSpec, AttentionInputs, Sequences),
        (copy.SlidingWindowAttentionConfig, layer.LayerSpec, layer.AttentionInputs, sequences.Sequences),
    ):
        layer = cls(window=5).build(spec(0, 1, 2, 2, 8, 16, True))
        outputs.append(layer(given(q, q, q, seqs.full(1, 70, 70), True, 0.3)))
    assert torch.equal(*outputs)


FORMS = {
    "import sa_hf.b": "from .sa_hf_b import __name__ as _sa_hf_b\n",
    "import sa_hf.b as x": "from .sa_hf_b import __name__ as _sa_hf_b\nfrom . import sa_hf_b as x\n",
    "from sa_hf import b": "from .sa_hf_b import __name__ as _sa_hf_b\nfrom . import sa_hf_b as b\n",
    "from sa_hf.b import (\n    c,\n    d as e,\n)": "from .sa_hf_b import c, d as e\n",
    "from .b import c": "from .sa_hf_b import c\n",
    "def f():\n    from sa_hf.b import c\n    return c": "def f():\n    from .sa_hf_b import c\n    return c\n",
    "import triton": "try:\n    import triton\nfinally:\n    pass\n",
    "import math, triton": "import math\ntry:\n    import triton\nfinally:\n    pass\n",
    "if TYPE_CHECKING:\n    from sa_hf.b import c": "if TYPE_CHECKING:\n    pass\n",
}


@pytest.mark.parametrize("source", FORMS)
def test_import_forms(package, source):
    package({"__init__.py": "", "a.py": source + "\n", "b.py": ""})
    text, imported = flatten_module("sa_hf.a")
    assert text == HEADER + FORMS[source]
    assert set(imported) == ({"sa_hf.b"} if "from .sa_hf_b" in text else set())


REFUSED = ["import sa_hf", "from sa_hf import patch_model", "from sa_hf.b import *", '"""\nfrom .b import c\n"""']


@pytest.mark.parametrize("source", REFUSED)
def test_what_cannot_be_flat_is_refused(package, source):
    package({"__init__.py": "", "a.py": source + "\n", "b.py": ""})
    with pytest.raises(SparseAttentionError, match=r"sa_hf\.a"):
        flatten_module("sa_hf.a")


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
