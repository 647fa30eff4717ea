"""The rules of the house, kept by reading the source; nothing is imported.

Each rule is a function from modules to complaints, and each has a test that shows it can fail.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

REPO = Path(__file__).parents[1]
PRODUCT = ("lora_runtime", "server")

MAX_FUNCTION_LINES = 50
MAX_KERNEL_BODY_LINES = 150

LAYERS = [
    ["lora_runtime.errors", "lora_runtime.temporary_folder", "lora_runtime.terminal"],
    ["lora_runtime.settings"],
    ["lora_runtime.config"],
    ["lora_runtime.core"],
    ["lora_runtime.text", "lora_runtime.kernels"],
    ["lora_runtime.base"],
    ["lora_runtime.adapters"],
    ["lora_runtime.engine", "lora_runtime.training"],
    ["protos"],
    ["server"],
]
"""A later one may import earlier ones; those side by side never import each other."""

CLIENT = "server.client"
SHARED_WITH_CLIENTS = {"server.errors", "server.wire", "lora_runtime.errors",
                       "lora_runtime.adapters.files.file_names",
                       "lora_runtime.adapters.files.open_folder", "protos"}  # fmt: skip
"""All that the client imports of ours: nothing of the service side."""

TORCH_FREE = [
    "lora_runtime",
    "lora_runtime.errors",
    "lora_runtime.settings",
    "lora_runtime.config",
    "lora_runtime.core",
    "lora_runtime.adapters",
    "lora_runtime.adapters.config",
    "lora_runtime.adapters.config.peft_config",
    "lora_runtime.adapters.config.verdicts",
    "lora_runtime.adapters.slot_table",
    "lora_runtime.base.layer_plan",
    "lora_runtime.engine",
    "lora_runtime.engine.block_key",
    "lora_runtime.engine.block_manager",
    "lora_runtime.engine.scheduler",
]
"""These, and everything of ours they import, import no torch."""
TENSOR_PACKAGES = {"torch", "numpy", "safetensors", "transformers", "bitsandbytes", "triton"}

GRPC_DOORS = [
    "server.grpc_server", "server.app", "server.errors", "server.client", "server.client.channel",
]  # fmt: skip
DOORS = {
    "accelerate": ["lora_runtime.base.streamed_load"],
    "bitsandbytes": ["lora_runtime.base.quant_linear", "lora_runtime.training.*"],
    "cuda": ["lora_runtime.kernels.cuda_product"],
    "gguf": ["lora_runtime.base.gguf"],
    "google.rpc": ["server.errors"],
    "grpc": GRPC_DOORS,
    "grpc_health": GRPC_DOORS,
    "grpc_reflection": GRPC_DOORS,
    "grpc_status": GRPC_DOORS,
    "huggingface_hub": ["lora_runtime.base.catalog"],
    "jinja2": ["lora_runtime.text.template_check"],
    "matplotlib": ["lora_runtime.training.report"],
    "prometheus_client": ["server.metrics"],
    "protos": ["server.*"],
    "pyarrow": ["lora_runtime.training.rows"],
    "pydantic": ["lora_runtime.settings", "lora_runtime.config", "lora_runtime.training.config",
                 "server.config", "server.cli.settings"],
    "regex": ["lora_runtime.adapters.config.matching"],
    "rich": ["lora_runtime.terminal", "lora_runtime.training.progress",
             "lora_runtime.training.trainer", "server.cli", "server.cli.*"],
    "safetensors": ["lora_runtime.adapters.files.folder", "lora_runtime.base.*",
                    "lora_runtime.training.checkpoint"],
    "starlette": ["server.http_gateway", "server.app"],
    "structlog": ["server.*"],
    "tokenizers": ["lora_runtime.base.*", "lora_runtime.text.*"],
    "transformers": ["lora_runtime.base.*", "lora_runtime.text.*",
                     "lora_runtime.training.*"],
    "triton": ["lora_runtime.kernels.*"],
    "typer": ["server.cli", "server.cli.*"],
    "uvicorn": ["server.app"],
    "yaml": ["server.cli.serve", "lora_runtime.settings"],
}  # fmt: skip
"""Third-party package → the only modules that may import it."""
EVERYWHERE = {"torch", "numpy"}
"""Third-party packages without a door."""

DISTRIBUTIONS = {
    "cuda": "cuda-bindings",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}
"""Import name → distribution, where they differ."""

ESTABLISHED_NAMES = {"lora_runtime.engine.block_manager"}
BANNED_WORDS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
OUTSIDE = ".." + "/shared"


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def is_kernel(self) -> bool:
        """Kernel bodies (Triton here, C++ elsewhere) are counted apart."""
        return self.name.startswith("lora_runtime.kernels.") and "triton" in self.imports

    @cached_property
    def imports(self) -> set[str]:
        """Every module named by an import, inside functions and TYPE_CHECKING too."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: write absolute imports"
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        return found

    @cached_property
    def functions(self) -> list[tuple[str, int]]:
        """(name, lines without its docstring) of every function and method."""
        return [
            (f"{self.name}.{node.name}", _function_lines(node))
            for node in ast.walk(self.tree)
            if isinstance(node, FUNCTIONS)
        ]


def _function_lines(node: FUNCTIONS) -> int:
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def read_modules() -> list[Module]:
    modules = []
    for package in PRODUCT:
        for path in sorted((REPO / package).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            modules.append(Module(name, path.read_text(encoding="utf-8")))
    return modules


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules()


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(name: str) -> tuple[int, str] | None:
    for level, packages in enumerate(LAYERS):
        for package in packages:
            if is_within(name, package):
                return level, package
    return None


def wrong_direction(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        own = layer_of(module.name)
        for imported in sorted(module.imports):
            other = layer_of(imported)
            if own is None or other is None or own[1] == other[1]:
                continue
            if other[0] >= own[0]:
                yield f"{module.name} imports {imported}, which stands to its right"


def unlayered(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        if layer_of(module.name) is None and module.name != "lora_runtime":
            yield f"{module.name} has no place in the import order"


def tensors_in_torch_free(modules: Iterable[Module]) -> Iterator[str]:
    """Follows imports of our own modules, so that no torch comes in by a side door."""
    by_name = {module.name: module for module in modules}
    for start in TORCH_FREE:
        seen, waiting = set(), [start]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in by_name:
                continue
            seen.add(name)
            for imported in by_name[name].imports:
                if imported.partition(".")[0] in TENSOR_PACKAGES:
                    yield f"{start} must be free of tensors: {name} imports {imported}"
                waiting.append(imported)
            waiting.append(name.rpartition(".")[0])


def service_in_client(modules: Iterable[Module]) -> Iterator[str]:
    """And the service imports nothing of the client."""
    own = {module.name for module in modules}
    for module in modules:
        is_client = is_within(module.name, CLIENT)
        is_service = module.name.startswith("server.") and not is_within(module.name, "server.cli")
        for imported in sorted(module.imports):
            if is_client and imported.partition(".")[0] in (*PRODUCT, "protos"):
                allowed = (*SHARED_WITH_CLIENTS, CLIENT)
                is_package = any(name.startswith(f"{imported}.") for name in own)
                if not is_package and not any(is_within(imported, name) for name in allowed):
                    yield f"{module.name} imports {imported}, which is not for clients"
            if is_service and not is_client and is_within(imported, CLIENT):
                yield f"{module.name} imports {imported}, which is for clients"


def wrong_door(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        for imported in sorted(module.imports):
            for package, doors in DOORS.items():
                if is_within(imported, package) and not any(opens(d, module.name) for d in doors):
                    yield f"{module.name} imports {imported}; its doors are {', '.join(doors)}"


def opens(door: str, name: str) -> bool:
    return name.startswith(door[:-1]) if door.endswith("*") else name == door


def third_party(modules: Iterable[Module]) -> set[str]:
    found = {imported.partition(".")[0] for module in modules for imported in module.imports}
    return found - set(sys.stdlib_module_names) - set(PRODUCT) - {"protos"}


def without_door(modules: Iterable[Module]) -> set[str]:
    known = {package.partition(".")[0] for package in DOORS} | EVERYWHERE
    return third_party(modules) - known


def prints(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
                yield f"{module.name}:{node.lineno} prints"


def undocumented(modules: list[Module]) -> Iterator[str]:
    """Modules, public classes, functions and methods; a property's name says it, and a method
    may be explained by the class it is inherited from, an RPC by its proto."""
    explained = {
        node.name
        for module in modules
        for owner in ast.walk(module.tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, FUNCTIONS) and ast.get_docstring(node) is not None
    }
    for module in modules:
        if ast.get_docstring(module.tree) is None:
            yield f"{module.name} has no docstring"
        for node in _public(module.tree):
            if ast.get_docstring(node) is None:
                yield f"{module.name}.{node.name} has no docstring"
            for method in _public(node) if isinstance(node, ast.ClassDef) else ():
                is_constructor = any(_last_name(d) == "classmethod" for d in method.decorator_list)
                is_property = any(_last_name(d).endswith("property") for d in method.decorator_list)
                is_rpc = method.name[0].isupper()
                if is_constructor or is_property or is_rpc or method.name in explained:
                    continue
                if ast.get_docstring(method) is None:
                    yield f"{module.name}.{node.name}.{method.name} has no docstring"


def _public(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | FUNCTIONS) and not child.name.startswith("_"):
            yield child


def _last_name(node: ast.expr) -> str:
    return getattr(node, "attr", None) or getattr(node, "id", "")


def oversized(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        limit = MAX_KERNEL_BODY_LINES if module.is_kernel else MAX_FUNCTION_LINES
        for name, num_lines in module.functions:
            if num_lines > limit:
                yield f"{name} has {num_lines} lines, over {limit}"


def badly_named(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        banned = BANNED_WORDS & set(re.split(r"[._]", module.name))
        if banned and module.name not in ESTABLISHED_NAMES:
            yield f"{module.name} is called {', '.join(banned)}"


def undeclared(modules: Iterable[Module], pyproject: dict) -> set[str]:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    optional = [entry for name in extras.keys() - {"test", "bench"} for entry in extras[name]]
    declared = {
        re.split(r"[^A-Za-z0-9-]", requirement)[0].lower()
        for requirement in [*project["dependencies"], *optional]
    }
    return {name for name in third_party(modules) if DISTRIBUTIONS.get(name, name) not in declared}


def unpackaged(modules: Iterable[Module], pyproject: dict) -> set[str]:
    found = find_namespace_packages(
        str(REPO), **pyproject["tool"]["setuptools"]["packages"]["find"]
    )
    paths = {module.name: REPO.joinpath(*module.name.split(".")) for module in modules}
    packages = {name if path.is_dir() else name.rpartition(".")[0] for name, path in paths.items()}
    return (packages | {"protos.loramux.v1"}) - set(found)


def text_files() -> Iterator[Path]:
    """What is kept in git, as far as a file's place shows it."""
    skipped = re.compile(
        r"\.(git|venv|\w+_cache|hypothesis)|build|dist|demo-output|__pycache__|.*egg-info"
    )
    suffixes = {
        ".py",
        ".pyi",
        ".md",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
        ".proto",
        ".cpp",
        ".json",
        "",
    }
    waiting = [REPO]
    while waiting:
        for path in waiting.pop().iterdir():
            if skipped.fullmatch(path.name):
                continue
            if path.is_dir():
                waiting.append(path)
            elif path.suffix in suffixes:
                yield path


def complaints(found: Iterable[str]) -> str:
    return "\n".join(sorted(found))


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def test_imports_go_one_way(modules):
    assert complaints(wrong_direction(modules)) == ""
    assert complaints(unlayered(modules)) == ""


def test_deciding_code_is_free_of_tensors(modules):
    assert complaints(tensors_in_torch_free(modules)) == ""


def test_client_and_service_know_nothing_of_each_other(modules):
    assert complaints(service_in_client(modules)) == ""


def test_every_third_party_package_has_its_door(modules):
    assert complaints(wrong_door(modules)) == ""
    assert without_door(modules) == set(), "give it a door in DOORS"


def test_peft_is_for_tests_only(modules):
    assert "peft" not in third_party(modules)


def test_what_is_imported_is_declared_and_what_is_written_is_packaged(modules, pyproject):
    assert undeclared(modules, pyproject) == set()
    assert unpackaged(modules, pyproject) == set()


def test_no_prints(modules):
    assert complaints(prints(modules)) == ""


def test_public_names_are_documented(modules):
    assert complaints(undocumented(modules)) == ""


def test_names_say_something(modules):
    assert complaints(badly_named(modules)) == ""


def test_functions_are_short(modules):
    assert complaints(oversized(modules)) == ""


def test_nothing_refers_to_files_outside_the_repository():
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        assert OUTSIDE not in text, path.relative_to(REPO)


BAD_SOURCES = {
    wrong_direction: [
        ("lora_runtime.core", "import lora_runtime.engine.engine"),
        ("lora_runtime.text.tokenizer", "from lora_runtime.kernels import types"),
        ("lora_runtime.engine.loop", "def f():\n    from lora_runtime.training import trainer"),
        ("lora_runtime.config", "from server import config"),
        ("lora_runtime.engine.loop", "from protos.loramux.v1 import types_pb2"),
    ],
    tensors_in_torch_free: [
        ("lora_runtime.errors", "import torch"),
        ("lora_runtime.engine.scheduler", "from torch import Tensor"),
        ("lora_runtime.engine", "import numpy as np"),
    ],
    wrong_door: [
        ("server.service", "import grpc.aio"),
        ("server.registry", "from google.rpc import status_pb2"),
        ("lora_runtime.core", "import structlog"),
        ("lora_runtime.engine.engine", "from transformers import AutoConfig"),
        ("server.app", "from prometheus_client import Counter"),
        ("lora_runtime.base.loader", "import triton.language as tl"),
    ],
    service_in_client: [
        ("server.client.uploads", "from server.uploads import Upload"),
        ("server.client", "from lora_runtime.engine import loop"),
        ("server.grpc_server", "from server.client.channel import Stubs"),
    ],
    without_door: [("server.service", "import requests")],
    prints: [("server.app", "def f():\n    print(1)")],
    undocumented: [
        ("server.app", "x = 1"),
        ("server.app", '"""Doc."""\nclass A: pass'),
        ("server.app", '"""Doc."""\nclass A:\n    """Doc."""\n    def run(self): pass'),
        ("server.app", '"""Doc."""\nasync def f(): pass'),
    ],
    oversized: [
        ("server.app", "def f():\n" + "    x = 1\n" * 50),
        ("lora_runtime.kernels.lora", "import triton\ndef f():\n" + "    x = 1\n" * 150),
    ],
    badly_named: [("server.text_utils", ""), ("lora_runtime.common.text", "")],
}


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [(rule, *bad) for rule, sources in BAD_SOURCES.items() for bad in sources],
)
def test_each_rule_can_fail(rule, name, source):
    assert list(rule([Module(name, source)])) != []


def test_a_torch_free_module_may_not_reach_torch_through_another():
    modules = [
        Module("lora_runtime.engine.scheduler", "from lora_runtime.engine import batch"),
        Module("lora_runtime.engine.batch", "import torch"),
    ]
    assert complaints(tensors_in_torch_free(modules)) != ""


def test_documentation_does_not_count_as_length():
    long = 'def f():\n    """' + "words\n" * 60 + '"""\n    return 1\n'
    module = Module("server.app", "# why\n\n" + long)
    assert module.functions == [("server.app.f", 2)]
